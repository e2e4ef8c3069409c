"""docs/scale.md and the configs it names: accelerate reads them, and the lines are complete."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from finetune.training.recipe import JointArguments, parse_flags
from tests.fixtures import make_model


ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "finetune/configs/accelerate"
LINES = re.findall(r"```bash\n(.*?)\n```", (ROOT / "docs/scale.md").read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_accelerate_reads_the_configs(name, kind):
    """It refuses a key that it does not know."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.name == kind and config.num_machines == 1


def test_fsdp2_wraps_the_layers_of_the_language_model_alone():
    """Layers of a tower are gathered only where there is a picture; the other processes would wait."""
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    wrapped = config["fsdp_transformer_layer_cls_to_wrap"]
    places = [name for name, module in make_model().named_modules() if type(module).__name__ == wrapped]
    assert places == [f"model.language_model.layers.{index}" for index in range(2)]


def test_fsdp2_and_zero3_write_whole_weights():
    assert load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert load_config_from_file(str(CONFIGS / "deepspeed_zero3.yaml")).deepspeed_config["zero3_save_16bit_model"]


@pytest.mark.parametrize("line", LINES)
def test_launcher_and_recipe_know_every_flag_of_a_line(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    parser = launch_command_parser() if words[0] == "accelerate" else get_args_parser()
    launch = parser.parse_args(words[2:] if words[0] == "accelerate" else words[1:])
    assert launch.module and launch.training_script == "finetune.lora_joint"
    if words[0] == "accelerate":
        assert Path(launch.config_file).is_file()
    on_cpu = ["--use_cpu", "True", "--bf16", "False"]  # the 8B config asks for bf16, which needs a GPU
    _, training, _ = parse_flags(JointArguments, [*launch.training_script_args, *on_cpu])
    assert training.output_dir.startswith("runs/")


def test_the_page_has_one_line_per_config_and_for_several_machines():
    page = " ".join(LINES)
    assert all(f"finetune/configs/accelerate/{path.name}" in page for path in CONFIGS.glob("*.yaml"))
    assert "--machine_rank 0 --main_process_ip" in page and "--node_rank 0 --master_addr" in page
