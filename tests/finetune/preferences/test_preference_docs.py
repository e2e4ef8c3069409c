"""Every file of docs/preferences.md is written and every command of it run, in the order of the page, at toy size."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from finetune.preferences.rewards import REWARDS
from tests.checkpoint_folder import write_checkpoint
from tests.commands import load_command
from tests.finetune.data.data_files import write_pictures


ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/preferences.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(?:`([\w./]+)`\n)?```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
FILES = {name: body for name, _, body in BLOCKS if name}
COMMANDS = [line.split() for name, language, body in BLOCKS if language == "bash" for line in body.splitlines()]
TOY = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "lora_r": 4,
    "disable_tqdm": True,
}
TOY_OF = {
    "grpo": {"num_generations": 2, "max_completion_length": 4},
    "rejection_sampling": {"n": 2, "rounds": 2, "batch_size": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files in a folder that looks like a clone: a random checkpoint, and the configs cut down."""
    folder = tmp_path_factory.mktemp("page")
    unet = write_checkpoint(folder / "pisces-tiny") / "unet/config.json"
    settings = json.loads(unet.read_text()) | {"sample_size": 16}  # 32 pixels, the least that the scene detector reads
    unet.write_text(json.dumps(settings))
    write_pictures(folder, "cat.png", "dog.png")
    configs = folder / "finetune/configs"
    configs.mkdir(parents=True)
    for path in (ROOT / "finetune/configs").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        toy = TOY_OF.get(path.stem, {}) if path.stem == "rejection_sampling" else TOY | TOY_OF.get(path.stem, {})
        (configs / path.name).write_text(yaml.safe_dump(settings | toy), encoding="utf-8")
    for name, body in FILES.items():
        (folder / name).write_text(body, encoding="utf-8")
    return folder


@pytest.fixture
def clone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    own_modules = ("my_rewards", "my_scorer", "scene_score")
    for name in own_modules:  # other tests have modules of these names too
        sys.modules.pop(name, None)
    yield folder
    for name in own_modules:
        sys.modules.pop(name, None)


def test_the_commands_of_the_page_run_in_order(clone, capsys):
    from finetune.scenes.render import write_scenes

    write_scenes("scenes", 1, seed=0)
    prompts = Path("scenes/prompts.jsonl").read_text().splitlines()
    Path("scenes/prompts.jsonl").write_text("\n".join(prompts[:2]) + "\n")
    recipes = [words[2].removeprefix("finetune.") for words in COMMANDS]
    assert recipes == [
        "dpo_understanding",
        "grpo",
        "grpo",
        "best_of_n",
        "lora_generation",
        "best_of_n",
        "rejection_sampling",
        "dpo_generation",
    ]
    for words in COMMANDS:
        assert words[:2] == ["python", "-m"]
        load_command(words[2])(words[3:])
    for name in ("preferred", "counts", "short", "bright", "rejection/round_2/adapter", "liked"):
        assert (clone / "runs" / name / "adapter_model.safetensors").is_file(), name
    rows = [json.loads(line) for line in Path("drawings/metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == FILES["prompts.txt"].splitlines()
    assert all(len(row["scores"]) == 4 and row["score"] > 20 for row in rows)
    scored = [json.loads(line) for line in Path("scene_drawings/metadata.jsonl").read_text().splitlines()]
    assert all(0 <= score <= 1 for row in scored for score in row["scores"])
    assert len(yaml.safe_load(Path("runs/rejection/rounds.yaml").read_text())) == 2


def test_the_pairs_of_the_page_are_read(clone):
    from finetune.preferences.pairs import load_pairs
    from tests.fixtures import make_model, make_processor

    rows = load_pairs(["pairs.jsonl"], make_processor(), make_model(), None)
    assert rows.sides == {"answer": 3} and [pair["id"] for pair in rows.dataset] == ["1", "2", "3"]
    assert load_pairs(["liked.jsonl"], make_processor(), make_model(), None).sides == {"draw": 1}


def test_every_reward_and_every_config_is_on_the_page():
    assert all(f"`{name}`" in TEXT for name in REWARDS)
    for name in ("dpo_understanding", "grpo", "dpo_generation", "rejection_sampling"):
        assert f"finetune/configs/{name}.yaml" in TEXT
