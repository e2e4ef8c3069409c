"""The commands that `tests/crash` disturbs, on the smallest models, and how their results are read.

A job is a command with everything it needs in a shared folder, `{s}`, and its output in a folder of its own, `{w}`.
`outcome` is what two undisturbed runs have in common: the bytes of every file without the words that differ from run
to run, or, for training, the losses and the weights.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


TEMPORARY = re.compile(r"\.partial|\.earlier|\.lock$|\.tmp|\.incomplete|^tmp")
VARYING = re.compile(  # entries of JSON that say when, how fast or where
    r'("(?:\w*(?:seconds|per_second|runtime|gib|commit|command|hardware|date|time)|\w+_s|output|path|folder|index)"\s*:)'
    r'\s*("[^"]*"|[^,\n}\]]*)'
)
TEXTS = (".json", ".jsonl", ".yaml", ".md", ".txt", ".csv")


class Job(NamedTuple):
    """A command.

    Attributes:
        words: its arguments; {w} and {s} are the folders.
        finished: the file in {w} that is there when it is done.
        compared: names of the files whose bytes two runs have in common.
        opens: opens a finished output as its readers do, and raises where it is not whole.
        goes_on: it leaves whole pieces of its work, from which it goes on.
        weight: how often it is chosen; those without a model take a second.
    """

    name: str
    module: str
    words: str
    finished: str
    opens: Callable[[Path], Any]
    compared: str = r".*"
    goes_on: bool = False
    weight: int = 1


def files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def outcome(job: Job, folder: Path) -> dict[str, str]:
    """Name -> digest of what two runs have in common."""
    found = {}
    for name, path in files_of(folder).items():
        if re.fullmatch(job.compared, name):
            content = path.read_bytes()
            if path.suffix in TEXTS:
                text = content.decode("utf-8").replace(str(folder), "{w}")
                content = VARYING.sub(r"\1", text).encode()
            found[name] = hashlib.sha256(content).hexdigest()[:16]
        elif path.name == "trainer_state.json":
            history = json.loads(path.read_text())["log_history"]
            losses = [(one["step"], one.get("loss"), one.get("grad_norm")) for one in history if "loss" in one]
            found[name] = hashlib.sha256(repr(losses).encode()).hexdigest()[:16]
    return found


def left_behind(folder: Path) -> list[str]:
    """Temporary files and folders, hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if TEMPORARY.search(p.name))


# ---- how a finished output is opened


def open_checkpoint(folder: Path) -> None:
    from modeling_pisces.checkpoint.loading import load_model

    load_model(folder, device="cpu")


def open_adapter(folder: Path) -> None:
    from safetensors.torch import load_file

    load_file(folder / "adapter_model.safetensors")
    json.loads((folder / "adapter_config.json").read_text())


def open_pictures(folder: Path) -> None:
    from PIL import Image

    for path in folder.rglob("*.png"):
        if not path.parent.name.endswith(".partial"):  # under no final name; the next run takes it away
            Image.open(path).load()
    open_texts(folder)


def open_texts(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def open_rows(folder: Path) -> None:
    from finetune.data.load import load_data

    open_pictures(folder)
    assert list(load_data(str(next(folder.rglob("scenes.jsonl")))).iter_rows())


def open_cache(folder: Path) -> None:
    from finetune.data.picture_cache import PictureCache

    assert len(PictureCache(folder).keys if hasattr(PictureCache(folder), "keys") else [1])


def open_export(folder: Path) -> None:
    import pyarrow.parquet as pq

    for path in folder.rglob("*.parquet"):
        pq.read_table(path)
    open_texts(folder)


def open_decoder_adapter(folder: Path) -> None:
    from safetensors.torch import load_file

    load_file(folder / "pytorch_lora_weights.safetensors")


_TRAIN = (
    "--model_name_or_path {s}/checkpoint --data {s}/rows/rows.jsonl --max_steps 2 --per_device_train_batch_size 2 "
    "--save_steps 1 --logging_steps 1 --warmup_steps 1 --use_cpu True --disable_tqdm True --guard_steps 1000 "
    "--lora_r 2 --seed 3 --output_dir {w}/out"
)
_DRAW = _TRAIN.replace("{s}/rows", "{s}/drawings")
_WEIGHTS = r"out/adapter_model\.safetensors|out/pytorch_lora_weights\.safetensors"

JOBS = (
    Job("scenes", "finetune.scenes", "--output {w}/out --num_scenes 8 --seed 2", "out/scenes.jsonl", open_rows, goes_on=True, weight=5),
    Job("edits", "finetune.scenes.edits", "--output {w}/out --num_edits 9 --seed 2", "out/edits.jsonl", open_pictures, weight=5),
    Job("new_concept", "finetune.scenes.new_concept", "--num_pictures 4 --num_replay 4 --num_heldout 4 --output {w}/out",
        "out/concept.json", open_pictures, weight=4),
    Job("export", "conversion.export", "--checkpoint {s}/checkpoint --output {w}/out", "out/config.json", open_checkpoint),
    Job("export over an earlier one", "conversion.export", "--checkpoint {s}/checkpoint --output {w}/out --overwrite",
        "out/config.json", open_checkpoint),
    Job("to_llava", "conversion.to_llava", "--checkpoint {s}/for_llava --output {w}/out", "out/config.json", open_texts),
    Job("assemble", "conversion.assemble",
        "--language_model {s}/llama --vision_tower {s}/checkpoint --gen_vision_tower {s}/checkpoint --decoder {s}/checkpoint "
        "--output {w}/out", "out/config.json", open_checkpoint),
    Job("precompute", "finetune.precompute",
        "--checkpoint {s}/checkpoint --data {s}/rows/rows.jsonl --shard_size 2 --batch_size 2 --output {w}/out",
        "out/cache.json", open_texts, goes_on=True),
    Job("lora_generation", "finetune.lora_generation", _DRAW, "out/adapter_config.json", open_adapter, _WEIGHTS, True),
    Job("lora_joint", "finetune.lora_joint", _TRAIN, "out/adapter_config.json", open_adapter, _WEIGHTS, True),
    Job("lora_decoder", "finetune.lora_decoder", _DRAW.replace("--guard_steps 1000 ", "").replace("--use_cpu True --disable_tqdm True ", ""),
        "out/pytorch_lora_weights.safetensors", open_decoder_adapter, _WEIGHTS, True),
    Job("train_stages", "finetune.train_stages",
        "--checkpoint {s}/stage --data {s}/scenes --max_steps 2 --batch_size 2 --warmup_steps 1 --log_steps 1 --save_steps 1 "
        "--output {w}/out", "out/config.json", open_checkpoint, r"out/model\.safetensors", True),
    Job("draw_prompts", "evaluation.draw_prompts",
        "--model {s}/checkpoint --prompts own:{s}/prompts.jsonl --images_per_prompt 2 --num_inference_steps 1 --output {w}/out",
        "out/run.json", open_pictures, r".*\.png", True),
    Job("evaluation.scenes", "evaluation.scenes",
        "--model pisces-tiny --data {s}/scenes --num_questions 4 --num_reconstructions 1 --num_prompts 1 --images_per_prompt 1 --output {w}/out.json", "out.json", open_texts,
        goes_on=True),
    Job("best_of_n", "finetune.best_of_n",
        "--checkpoint {s}/checkpoint --prompts {s}/prompts.txt --scorer tests.test_full_disk:count_red --n 2 "
        "--num_inference_steps 1 --pairs True --output {w}/out", "out/pairs.jsonl", open_pictures, goes_on=True),
    Job("curation.run", "curation.run",
        "--config {s}/curation.yaml --data {s}/collection --rows_per_shard 6 --processes 1 --output {w}/out",
        "out/curation.json", open_export, goes_on=True),
    Job("pisces draw", "pisces_commands.console",
        "draw red blue --model {s}/checkpoint --steps 1 --num_images 2 --output {w}/out --sheet {w}/out/sheet.png",
        "out/sheet.png", open_pictures, goes_on=True),
)  # fmt: skip


def write_shared(folder: Path) -> Path:
    """Everything that the jobs read."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from finetune.parts import assemble as tiny
    from finetune.scenes.render import write_scenes
    from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel
    from tests.checkpoint_folder import write_checkpoint
    from tests.conversion.part_fixtures import write_language_model
    from tests.curation.curation_fixtures import encode, photo, write_collection, write_config
    from tests.finetune.lora_fixtures import make_rows, save_rows
    from tests.fixtures import make_model, make_processor

    write_checkpoint(folder / "checkpoint")
    make_model(vision_feature_layer=-2).save_pretrained(folder / "for_llava")
    make_processor().save_pretrained(folder / "for_llava")
    write_language_model(folder / "llama", "llama", "chatml", license=None)
    save_rows(folder / "rows", make_rows("uddudd"))
    save_rows(folder / "drawings", make_rows("dddddd"))
    (folder / "prompts.txt").write_text("a red circle\ntwo blue stars\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a star"}\n{"prompt": "a heart"}\n')
    write_scenes(folder / "scenes", num_scenes=12, seed=3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = SiglipVisionConfig(image_size=64, patch_size=16, vision_use_head=False, **small)
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    gen_vision = PiscesGenVisionConfig(image_size=64, patch_size=16, output_size=8, use_class_token=False, **small)
    PiscesGenVisionModel(gen_vision).save_pretrained(folder / "gen_vision")
    tiny.assemble(folder / "scenes", folder / "vision", folder / "gen_vision", folder / "stage", "flow", seed=0)
    pictures = {f"{number}.png": encode(photo(number, (64, 48))) for number in range(18)}
    write_collection(folder / "collection", pictures)
    write_config(folder / "curation.yaml")
    return folder
