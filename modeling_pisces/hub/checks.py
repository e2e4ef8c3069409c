"""What a folder must hold before it is published: every file, whole, loadable without the package, and no pickles.

`modeling_pisces/hub/export.py` calls `check_hub_folder` after an export and before every push. Only JSON, the card and
safetensors headers are read; whether a plain checkpoint folder is whole is left to
`modeling_pisces/checkpoint/files.py`.
"""

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from ..checkpoint.files import check_checkpoint, read_json, read_safetensors_header, read_weight_map, weight_files
from .cards import check_card


PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
ALLOWED_SUFFIXES = {".gif", ".jinja", ".jpg", ".json", ".md", ".model", ".png", ".py", ".safetensors", ".txt", ".webp"}
ALLOWED_NAMES = {".gitattributes", "LICENSE", "NOTICE"}
REQUIRED_FILES = (
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "README.md",
)


def check_repo_id(repo_id: str) -> None:
    """Refuse a repository name that the Hub refuses, and one with a dot: remote code becomes a Python module name.

    Raises:
        ValueError: with the name and what is expected.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id {repo_id!r}: {error}. Give owner/name.") from error
    if "." in repo_id.split("/")[-1]:
        raise ValueError(
            f"repo_id {repo_id!r}: the name has a dot, which remote code cannot carry in a module name. "
            f"Use for example {repo_id.replace('.', '-')!r}."
        )


def check_hub_folder(folder: Path, with_card: bool = True) -> list[Path]:
    """Check everything that can be checked without loading weights.

    Args:
        folder: what `export_to_folder` wrote.
        with_card: whether the card must be complete; before a push it must.

    Returns:
        the files to publish, relative to `folder`, sorted.

    Raises:
        ValueError: naming the first file that is missing, broken or does not belong here.
    """
    files = _list_files(folder)
    has_decoder = (folder / "model_index.json").exists()
    check_checkpoint(folder, with_decoder=has_decoder)
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found. Write the folder with export_to_folder.")
    _check_weights(folder, "model")
    if has_decoder:
        for part in ("unet", "vae"):
            if (folder / part).is_dir():
                _check_weights(folder / part, "diffusion_pytorch_model")
    _check_code(folder, has_decoder)
    if with_card:
        check_card(folder / "README.md")
    return files


def _list_files(folder: Path) -> list[Path]:
    """Every file below the folder; a pickle or a stranger is refused, because a push cannot be taken back."""
    files = []
    for root, _, names in os.walk(folder):
        files += [Path(root, name) for name in names]
    for path in sorted(files):
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(
                f"{path}: a pickle, which runs code when it is loaded. Publish safetensors only; remove it."
            )
        if path.suffix not in ALLOWED_SUFFIXES and path.name not in ALLOWED_NAMES:
            raise ValueError(f"{path}: this file is no part of a checkpoint. Remove it, or export the folder again.")
    return sorted(path.relative_to(folder) for path in files)


def _check_weights(folder: Path, stem: str) -> None:
    """The index and the headers of the shards must name the same tensors, and no stray weight file may lie around."""
    paths = weight_files(folder, stem)
    strays = sorted(set(folder.glob("*.safetensors")) - set(paths))
    if strays:
        raise ValueError(f"{strays[0]}: no index names this file, but servers would load it. Remove it.")
    stored = {path.name: {tensor.name for tensor in read_safetensors_header(path)} for path in paths}
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.exists():
        return
    for name, shard in read_weight_map(index_path).items():
        if name not in stored[shard]:
            raise ValueError(f"{folder / shard}: lacks {name}, which {index_path.name} places there. Export again.")
        stored[shard].remove(name)
    for shard, extra in stored.items():
        if extra:
            raise ValueError(
                f"{folder / shard}: holds {min(extra)}, which {index_path.name} does not name. Export again."
            )


def _check_code(folder: Path, has_decoder: bool) -> None:
    """The Auto classes and diffusers must find their code in the folder itself."""
    references = dict(read_json(folder / "config.json").get("auto_map") or {})
    processor_map = read_json(folder / "processor_config.json").get("auto_map") or {}
    if "AutoModel" not in references or "AutoProcessor" not in processor_map:
        raise ValueError(
            f"{folder}: has no auto_map, so nobody could load it without the package. Write it with export_to_folder."
        )
    modules = {reference.split(".")[0] for reference in (references | processor_map).values()}
    if has_decoder:
        class_name = read_json(folder / "model_index.json").get("_class_name")
        if not isinstance(class_name, list):
            raise ValueError(
                f"{folder / 'model_index.json'}: _class_name is {class_name!r}, expected [module, class]; without it "
                "the pipeline loads only where the package is installed. Write the folder with export_to_folder."
            )
        modules.add(class_name[0])
    for module in sorted(modules):
        path = folder / f"{module}.py"
        try:
            missing = [] if path.is_file() else [path]
            missing += [needed for needed in get_relative_import_files(path) if not Path(needed).is_file()]
        except FileNotFoundError as error:
            missing = [error.filename]
        if missing:
            raise ValueError(f"{missing[0]}: not found, though the code of the folder needs it. Export again.")
