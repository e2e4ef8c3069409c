"""Publishing: `export_to_folder` writes the folder that transformers and diffusers both load, `push_folder` sends it.

Users and `conversion.export` call the two. The folder carries the code it needs, so it loads with
`trust_remote_code=True` where this package is not installed. What a publishable folder must hold is checked in
`modeling_pisces/hub/checks.py`, sending is done in `modeling_pisces/hub/push.py`. Only files at the top of the package
are published.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from pisces_commands.writing import whole_folder

from ..checkpoint.files import DECODER_PARTS, check_checkpoint, read_json, weight_files
from ..configuration_pisces import own_generation_config, read_generation_config
from ..pipeline_checks_pisces import check_decoder
from .cards import check_card, default_card
from .checks import check_hub_folder
from .push import PushReport, push_folder


# The same Auto classes that importing the package registers. Written into the exported JSON only: on a live config or
# class it would make every later save_pretrained of the user copy code.
AUTO_MAP = {
    "AutoConfig": "configuration_pisces.PiscesConfig",
    "AutoModel": "modeling_pisces.PiscesModel",
    "AutoModelForCausalLM": "modeling_pisces.PiscesForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_pisces.PiscesForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_pisces.PiscesForConditionalGeneration",
    "AutoProcessor": "processing_pisces.PiscesProcessor",
}
PIPELINE_CLASS = ["pipeline_pisces", "PiscesPipeline"]


def export_to_folder(
    model: Any,
    processor: Any,
    output: str | os.PathLike,
    pipeline: Any = None,
    decoder_folder: str | os.PathLike | None = None,
    card: str | os.PathLike | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder that loads with `trust_remote_code=True` where the package is not installed.

    Everything is written beside `output`, checked, and renamed at the end: `output` is whole or not there.

    Args:
        model: a `PiscesForConditionalGeneration`, or a checkpoint folder, whose weights are copied bit for bit without
            building the model.
        processor: a `PiscesProcessor`; None takes the one in the checkpoint folder.
        output: the folder to write.
        pipeline: a `PiscesPipeline` whose U-Net, VAE and scheduler are saved. A checkpoint folder that has a decoder
            brings its own.
        decoder_folder: a folder in the diffusers layout to copy the decoder from, instead of `pipeline`.
        card: the model card: a file, or its text. None takes the checkpoint folder's README.md, or writes a short one
            that leaves out what cannot be known, such as the license.
        max_shard_size: largest weight file. 5 GB: transformers' own default of 50 GB is too large to download.
        overwrite: replace an earlier export in `output`; nothing else is ever replaced.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: `output` is taken, or model, processor and decoder do not fit together.
    """
    output = Path(os.path.abspath(output))
    source = Path(model) if isinstance(model, (str, os.PathLike)) else None
    _check_output(output, overwrite)
    config, processor = _check_source(model, source, processor)
    _check_processor(config, processor)
    if pipeline is not None and decoder_folder is not None:
        raise ValueError("pipeline and decoder_folder are both given; the folder has one decoder. Pass one of them.")
    if source is not None and pipeline is None and decoder_folder is None and (source / "model_index.json").exists():
        decoder_folder = source
    _check_parts(config, pipeline, decoder_folder)

    with whole_folder(output, partial(_check_output, output, overwrite)) as folder:
        _write_card(card, source, config, folder)
        _write_model(model, source, config, max_shard_size, folder)
        processor.save_pretrained(folder)
        _write_decoder(pipeline, decoder_folder, max_shard_size, folder)
        _write_code(folder)
        check_hub_folder(folder, with_card=card is not None)
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ValueError(f"{output}: this is a file. Give a folder to write.")
    if not overwrite:
        raise ValueError(f"{output}: exists already. Choose another folder, or pass overwrite=True to replace it.")
    config = output / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "pisces":
        raise ValueError(
            f"{output}: holds something else than a Pisces checkpoint and is not replaced. Empty it first."
        )


def _check_source(model: Any, source: Path | None, processor: Any) -> tuple[Any, Any]:
    """The config of the model and its processor; a model that could not be loaded again as it is now is refused."""
    if source is not None:
        check_checkpoint(source)
        return AutoConfig.from_pretrained(source), processor or AutoProcessor.from_pretrained(source)
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries adapters. Merge them first: model = model.merge_and_unload().")
    if getattr(getattr(model, "config", None), "model_type", None) != "pisces" or not hasattr(model, "lm_head"):
        raise ValueError(
            f"the model is a {type(model).__name__}, expected PiscesForConditionalGeneration or a checkpoint folder. "
            "Load it with AutoModelForMultimodalLM; AutoModel leaves out the lm_head."
        )
    if processor is None:
        raise ValueError("processor is None. Pass the PiscesProcessor of this model; it is published with it.")
    return model.config, processor


def _check_processor(config: Any, processor: Any) -> None:
    names = ["num_image_tokens", "num_gen_image_tokens", "image_token_id"]
    names += ["gen_image_token_id", "gen_start_token_id", "gen_end_token_id"] if config.has_generation else []
    for name in names:
        expected, found = getattr(config, name), getattr(processor, name)
        if found != expected:
            raise ValueError(
                f"processor: {name} is {found} but the model's is {expected}. Pass the processor of this model."
            )


class _Settings(dict):
    """A config.json with its entries as attributes; absent ones are None."""

    __getattr__ = dict.get
    config = property(lambda self: self)


def _check_parts(config: Any, pipeline: Any, decoder_folder: str | os.PathLike | None) -> None:
    """The decoder must read vectors of the width that this model draws."""
    if pipeline is not None:
        unet, vae = pipeline.unet, pipeline.vae
    elif decoder_folder is not None:
        folder = Path(decoder_folder)
        index = read_json(folder / "model_index.json")
        unet = _Settings(read_json(folder / "unet" / "config.json"))
        has_vae = (index.get("vae") or [None])[0] is not None
        vae = _Settings(read_json(folder / "vae" / "config.json")) if has_vae else None
    else:
        return
    if not config.has_generation:
        raise ValueError("a decoder is given, but gen_vision_config is None: this model does not draw. Leave it out.")
    check_decoder(unet, vae, config.gen_vector_size, "the model")


def _write_card(card: str | os.PathLike | None, source: Path | None, config: Any, folder: Path) -> None:
    path = folder / "README.md"
    if card is None:
        own = source / "README.md" if source is not None else None
        text = own.read_text(encoding="utf-8") if own is not None and own.is_file() else default_card(config)
        path.write_text(text, encoding="utf-8")
        return
    if isinstance(card, str) and "\n" in card:
        path.write_text(card, encoding="utf-8")
    else:
        shutil.copyfile(card, path)
    check_card(path)


def _write_model(model: Any, source: Path | None, config: Any, max_shard_size: int | str, folder: Path) -> None:
    """Config, generation config and weights."""
    if source is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    config.save_pretrained(folder)
    has_own = (source / "generation_config.json").is_file()
    settings = read_generation_config(source) if has_own else GenerationConfig.from_model_config(config)
    own_generation_config(settings).save_pretrained(folder)
    # tensors as stored: a loaded model would have cast a mixed-precision file to one dtype
    weights = {name: tensor for path in weight_files(source) for name, tensor in load_file(path).items()}
    save_torch_state_dict(weights, folder, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)


def _write_decoder(
    pipeline: Any, decoder_folder: str | os.PathLike | None, max_shard_size: int | str, folder: Path
) -> None:
    if pipeline is not None:
        pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    elif decoder_folder is not None:
        for part in DECODER_PARTS:
            for path in sorted((Path(decoder_folder) / part).glob("*")):
                if path.suffix in (".json", ".safetensors"):
                    (folder / part).mkdir(exist_ok=True)
                    shutil.copyfile(path, folder / part / path.name)
        shutil.copyfile(Path(decoder_folder) / "model_index.json", folder / "model_index.json")


def _write_code(folder: Path) -> None:
    """Name the classes in the folder's JSON files and copy the modules that they live in."""
    _change_json(folder / "config.json", {"auto_map": AUTO_MAP})
    _change_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}})
    if (folder / "model_index.json").exists():
        _change_json(folder / "model_index.json", {"_class_name": PIPELINE_CLASS})
    # what the libraries note about this machine: where a part was loaded from, and whether it was offline
    for path in folder.glob("*/config.json"):
        _change_json(path, {"_name_or_path": None})
    _change_json(folder / "tokenizer_config.json", {"is_local": None, "local_files_only": None})
    for path in code_files(with_decoder=(folder / "model_index.json").exists()):
        shutil.copyfile(path, folder / path.name)


def _change_json(path: Path, changes: dict[str, Any]) -> None:
    """Set entries of a JSON file; None removes one."""
    content = {
        name: value for name, value in (read_json(path) | changes).items() if value is not None or name not in changes
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def code_files(with_decoder: bool) -> list[Path]:
    """The modules of this package that a published folder carries: the entry points and all they import from it."""
    modules = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    if with_decoder:
        modules.add(PIPELINE_CLASS[0])
    paths = [Path(__file__).parents[1] / f"{module}.py" for module in modules]
    return sorted({*paths, *(Path(needed) for path in paths for needed in get_relative_import_files(path))})


__all__ = ["AUTO_MAP", "PushReport", "code_files", "export_to_folder", "push_folder"]
