"""`pisces space OUTPUT`: a folder that a Hugging Face Space can be made of, with the page and all code it needs.

The packages are copied in, because a Space can install only what an index has. A checkpoint or adapter that lies here
is copied too; one that is named by its Hub id is downloaded by the Space. Publishing the folder is left to the owner.
"""

import argparse
import json
import re
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData, SpaceHardware

from modeling_pisces.checkpoint.adapters import find_adapter, is_adapter
from modeling_pisces.checkpoint.files import check_checkpoint
from pisces_commands.arguments import UsageError
from pisces_commands.writing import whole_folder


GRADIO = "6.31.0"  # the release that the page was tested with; constraints.txt has the same
PYTHON = "3.12"  # of the versions that a Space may have, the newest one that ZeroGPU offers too
PACKAGES = ("modeling_pisces", "pisces_commands", "pisces_demo")
# gradio itself comes with the Space, and decides about pillow; `spaces` does nothing without ZeroGPU
REQUIREMENTS = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "filelock",
    "spaces",
)
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
SMALL = 2**30  # bytes of a checkpoint that two free CPU cores can be asked to run

README = """
# {title}

Chat with pictures, draw, edit, and an adapter beside its base: [Pisces](https://arxiv.org/abs/2506.10395) in the
browser. Written by `pisces space`.

- `app.py` starts the page; the model comes from {source}.
- Start it on your own machine: `pip install gradio=={gradio} -r requirements.txt`, then `python app.py`.
- Publish it: `hf upload OWNER/NAME . --repo-type space`.
"""

APP = '''"""Starts the page of this Space, here or on your own machine: `python app.py`."""

import spaces  # before torch: on ZeroGPU it lends a GPU to each call, elsewhere it does nothing

from pathlib import Path

from pisces_demo.app import open_page
from pisces_demo.page import launch


HERE = Path(__file__).resolve().parent
MODEL = {model}
ADAPTERS = {adapters}

page = open_page(MODEL, ADAPTERS, on_gpu=spaces.GPU, label={label!r})

if __name__ == "__main__":
    launch(page, server_name=None)  # a Space says in GRADIO_SERVER_NAME where to listen; elsewhere it is this machine
'''


def run_space(args: argparse.Namespace) -> int:
    """The command: write the folder, say where it is."""
    try:
        folder = write_space(args.output, args.model, args.adapter, args.title, args.license, args.hardware)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(json.dumps({"command": "space", "path": str(folder)}) if args.json else folder)
    return 0


def write_space(
    output: str | Path,
    model: str,
    adapters: list[str] | tuple[str, ...] = (),
    title: str | None = None,
    license: str = "apache-2.0",
    hardware: str | None = None,
) -> Path:
    """Write the folder whole or not at all.

    Args:
        output: a new or empty folder.
        model, adapters: folders, which are copied, or Hub ids.
        title: of the Space; None makes one of the model's name.
        license: of what is in the folder: its code, and the checkpoint that is copied.
        hardware: what the card suggests; None: free CPU cores for a small checkpoint that lies here, else ZeroGPU.

    Raises:
        ValueError: a name means nothing usable, or `output` is taken.
    """
    output = Path(output).expanduser()
    source = _checked_model(model)
    sources = [_checked_adapter(adapter) for adapter in adapters]
    label = model.rstrip("/").rpartition("/")[2] if source is None else source.resolve().name
    title = _checked_title(f"Pisces: {label}" if title is None else title)
    kinds = [kind.value for kind in SpaceHardware]
    if hardware not in (None, *kinds):
        raise ValueError(f"--hardware {hardware!r}: expected one of {', '.join(kinds)}.")
    if hardware is None:
        is_small = source is not None and sum(file.stat().st_size for file in _files(source)) <= SMALL
        hardware = "cpu-basic" if is_small else "zero-a10g"

    with whole_folder(output, lambda: _check_free(output)) as folder:
        for name in PACKAGES:
            _copy(Path(import_module(name).__file__ or "").parent, folder / name)
        if source is not None:
            _copy(source, folder / "model")
        names = _copy_adapters(sources, folder)
        places = [
            repr(adapter) if name is None else _place(name) for adapter, name in zip(adapters, names, strict=True)
        ]
        app = APP.format(
            model=repr(model) if source is None else _place("model"), adapters=f"[{', '.join(places)}]", label=label
        )
        (folder / "app.py").write_text(app, encoding="utf-8")
        (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in requirements()), encoding="utf-8")
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
        ids = [name for name, there in zip([model, *adapters], [source, *sources], strict=True) if there is None]
        (folder / "README.md").write_text(_readme(title, ids, license, hardware), encoding="utf-8")
    return output


def requirements() -> list[str]:
    """What the Space installs: the versions that are installed here, where the folder was made."""
    pins = []
    for name in REQUIREMENTS:
        try:
            pins.append(f"{name}=={version(name).partition('+')[0]}")  # without the mark of a CPU build
        except PackageNotFoundError:
            pins.append(name)
    return pins


def _readme(title: str, ids: list[str], license: str, hardware: str) -> str:
    data = SpaceCardData(
        title=title,
        emoji="\U0001f41f",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        license=license,
        models=ids or None,
        suggested_hardware=hardware,
        short_description="Chat about pictures, draw, edit",
        pinned=False,
    )
    source = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in ids) or "the folder `model/`"
    body = README.format(title=title, source=source, gradio=GRADIO)
    return str(SpaceCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _checked_model(name: str) -> Path | None:
    """The folder of a checkpoint; None for a Hub id."""
    folder = Path(name).expanduser()
    if not folder.exists() and re.fullmatch(HUB_ID, name):
        return None
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder. Give a checkpoint folder or a Hub id like owner/name.")
    if is_adapter(folder):
        raise ValueError(f"{name} is an adapter. Give both: --model BASE --adapter {name}.")
    check_checkpoint(folder, with_decoder=(folder / "model_index.json").is_file())
    return folder


def _checked_adapter(name: str) -> Path | None:
    if not Path(name).expanduser().exists() and re.fullmatch(HUB_ID, name.partition("@")[0]):
        return None
    return find_adapter(name).folder


def _checked_title(title: str) -> str:
    if not title.strip() or len(title) > 100 or any(not char.isprintable() for char in title):
        raise ValueError(f"--title {title[:40]!r}: expected one line of 1 to 100 characters.")
    return title.strip()


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and not empty. Give a new folder.")


def _copy_adapters(sources: list[Path | None], folder: Path) -> list[str | None]:
    """Where each adapter is, below the Space's folder; None for a Hub id."""
    places: list[str | None] = []
    for number, source in enumerate(sources):
        place = None if source is None else f"adapters/{number}_{source.resolve().name}"
        if source is not None and place is not None:
            _copy(source, folder / place)
        places.append(place)
    return places


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.pyc", "checkpoint-*"))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _place(name: str) -> str:
    return f"str(HERE / {name!r})"
