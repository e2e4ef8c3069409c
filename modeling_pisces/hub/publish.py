"""`pisces push`: a checkpoint or an adapter as it lies in a folder, to a repository that loads by its name.

A plain checkpoint is exported first, so that it loads without the package too; of an adapter exactly the files that a
user needs are sent, never the states of optimizers. The card gets what its author said on the command line. Checks and
sending are those of `push`.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pisces_commands.writing import scratch_folder, write_json, write_whole

from ..checkpoint.adapters import MODEL_CONFIG, Adapter, find_adapter, is_adapter
from ..checkpoint.files import check_checkpoint, read_json
from ..checkpoint.safety import check_links, check_regular
from .cards import check_card
from .checks import check_repo_id
from .export import AUTO_MAP, export_to_folder
from .push import PushReport, push_folder, send_files


# What a user of an adapter needs; checkpoints of the run, pickles and logs stay at home.
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md", "run.yaml",
    "guard.json", "*.png", "processor_config.json", "preprocessor_config.json", "tokenizer*", "chat_template.jinja",
)  # fmt: skip
PROCESSOR_CONFIG = "processor_config.json"
DATA_HEADING = "## What it learned from"
SAMPLES_HEADING = "## Samples"


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = True,
    license: str | None = None,
    data: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PushReport:
    """Publish a checkpoint or an adapter with a filled card; nothing in the folder itself is changed.

    Args:
        folder: a checkpoint, an exported checkpoint, or an adapter of the language model, the decoder or both.
        repo_id: owner/name, without a dot; made if it does not exist.
        private: whether a repository that is made now is private.
        license: for the card's metadata; None keeps what the card says.
        data: what it was trained on, for the card.
        base: of an adapter, its base as others find it; None keeps the name in its configuration.
        revision: branch to push to.
        token: None takes that of `hf auth login`.

    Raises:
        ValueError: before anything is sent: what cannot be published as it is, and what to add.
        RuntimeError: the Hub refused or the connection broke; the same call goes on.
    """
    source = Path(folder).expanduser()
    if not source.is_dir():
        raise ValueError(f"{folder}: no such folder. Give a checkpoint or an adapter.")
    check_repo_id(repo_id)
    stage = _stage_adapter if is_adapter(source) else _stage_checkpoint
    if base is not None and stage is _stage_checkpoint:
        raise ValueError(f"--base {base}: {folder} is a whole checkpoint, which has no base. Leave it out.")
    # beside the folder: a checkpoint is large, and the system's temporary folder often is not
    with scratch_folder(source) as held:
        staged = held / "folder"
        send = stage(source, staged, base, repo_id)
        _fill_card(staged / "README.md", license, data)
        return send(staged, repo_id, private, token, revision)


Send = Callable[[Path, str, bool, str | None, str | None], PushReport]


def _stage_checkpoint(source: Path, staged: Path, base: str | None, repo_id: str) -> Send:
    check_checkpoint(source, with_decoder=(source / "model_index.json").exists())
    export_to_folder(source, None, staged)
    for name in ("provenance.json", "known_words.txt"):  # check_checkpoint has looked where they lead
        if (source / name).is_file():
            shutil.copyfile(source / name, staged / name)

    def send(folder: Path, repo_id: str, private: bool, token: str | None, revision: str | None) -> PushReport:
        return push_folder(folder, repo_id, private=private, token=token, revision=revision)

    return send


def stage_adapter(source: Path, staged: Path, base: str | None, repo_id: str) -> list[str]:
    """Copy what others need of an adapter, with its base named as they find it; the names of the files.

    Args:
        source: the adapter's folder, which stays as it is.
        staged: a folder to make.
        base: Hub id of the base; None takes the one that the adapter names.
        repo_id: where it is going; the card says it where it said the folder.

    Raises:
        ValueError: the adapter is not whole, or its base is no Hub id.
    """
    adapter = find_adapter(str(source))
    base = base or adapter.base
    if base is None or Path(base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise ValueError(
            f"{source}: its base is {base or 'not named'}, which others cannot find. Add --base OWNER/NAME, under "
            "which the base is published."
        )
    sheets = sorted((source / "guard").glob("step-*.png"))
    paths = [path for pattern in ADAPTER_FILES for path in source.glob(pattern)]
    for path in [*paths, *sheets[-1:]]:
        check_regular(path)
    check_links(source, [*paths, *sheets[-1:]])
    staged.mkdir()
    for path in paths:
        shutil.copyfile(path, staged / path.name)
    if sheets:
        shutil.copyfile(sheets[-1], staged / "guard.png")
    if (staged / MODEL_CONFIG).is_file():
        config = read_json(staged / MODEL_CONFIG) | {"base_model_name_or_path": base}
        write_json(staged / MODEL_CONFIG, config, indent=2)
    if (staged / PROCESSOR_CONFIG).is_file():
        # where the package is not installed, AutoProcessor would find no such class and give a bare tokenizer
        code = {"auto_map": {"AutoProcessor": f"{base}--{AUTO_MAP['AutoProcessor']}"}}
        write_json(staged / PROCESSOR_CONFIG, read_json(staged / PROCESSOR_CONFIG) | code, indent=2)
    _prepare_adapter_card(staged / "README.md", adapter, base)
    text = (staged / "README.md").read_text(encoding="utf-8").replace("this-folder", repo_id)
    write_whole(staged / "README.md", text.replace(str(source), repo_id))
    return sorted(path.name for path in staged.iterdir())


def _stage_adapter(source: Path, staged: Path, base: str | None, repo_id: str) -> Send:
    files = stage_adapter(source, staged, base, repo_id)

    def send(folder: Path, repo_id: str, private: bool, token: str | None, revision: str | None) -> PushReport:
        check_card(folder / "README.md")
        return send_files(folder, files, repo_id, private, token, revision, False, "Upload a Pisces adapter")

    return send


def _prepare_adapter_card(path: Path, adapter: Adapter, base: str) -> None:
    """Name the base as others find it, and show the samples; of an adapter without a card, write a short one."""
    if not path.is_file():
        write_whole(path, f"---\nlibrary_name: peft\n---\n\n# A Pisces adapter for {base}\n")
    card = ModelCard(path.read_text(encoding="utf-8"))
    tag = "text-to-image" if "decoder" in adapter.sides and len(adapter.sides) == 1 else "any-to-any"
    defaults = {"library_name": "peft", "pipeline_tag": tag, "base_model": base, "base_model_relation": "adapter"}
    for name, value in defaults.items():
        if name.startswith("base_model") or getattr(card.data, name, None) is None:
            setattr(card.data, name, value)
    if adapter.base and adapter.base != base:  # in the text alone: the metadata has it already
        card.text = re.sub(rf"(?<![\w./-]){re.escape(adapter.base)}(?![\w/-])", base, card.text)
    text = str(card)
    pictures = sorted(picture.name for picture in path.parent.glob("*.png"))
    if pictures and SAMPLES_HEADING not in text:
        text += f"\n\n{SAMPLES_HEADING}\n\n" + "\n\n".join(f"![{name}]({name})" for name in pictures) + "\n"
    write_whole(path, text)


def _fill_card(path: Path, license: str | None, data: str | None) -> None:
    """Write licence and data statement into a card.

    Raises:
        ValueError: the card names no licence and none was given.
    """
    card = ModelCard(path.read_text(encoding="utf-8"))
    values: Any = card.data
    if license is not None:
        values.license = license
    if not getattr(values, "license", None):
        raise ValueError(
            "the card names no license. Add --license, for example --license apache-2.0; it must allow what your data "
            "and the base allow."
        )
    text = str(card)
    if data is not None:
        said = f"{DATA_HEADING}\n\n{data.strip()}\n\n"
        pattern = rf"{re.escape(DATA_HEADING)}\n.*?(?=\n## |\Z)"
        found = re.search(pattern, text, flags=re.DOTALL)
        text = text[: found.start()] + said + text[found.end() :].lstrip("\n") if found else f"{text}\n\n{said}"
    write_whole(path, text)
