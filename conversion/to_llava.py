"""Writes the understanding side of a Pisces as a stock LLaVA checkpoint, which engines serve without our code.

`python -m conversion.to_llava --checkpoint PISCES --output FOLDER`. Tensors are copied byte by byte under the names of
the Hub's LLaVA checkpoints; the generation side is left out. What LLaVA cannot say is refused by name, or said in
other words if asked (`formats/llava.py`). The processor is LLaVA's, with this checkpoint's image processor,
tokenizer and chat template. Names and settings are translated in `llava_keys.py`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, GenerationConfig, LlavaConfig, LlavaProcessor

from conversion.formats.llava import (
    TOWERS_OF_LLAVA,
    add_norm_layer,
    check_pisces_config,
    check_tensors,
    config_to_llava,
    listed,
    rename_all,
    table_to_llava,
    tower_type,
)
from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import check_output, copy_generation_config, new_folder
from conversion.storage.tensors import PlannedTensor, index_tensors
from conversion.storage.write import write_shards
from modeling_pisces import PiscesConfig, PiscesProcessor
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_config, read_json
from modeling_pisces.configuration_pisces import num_prefix_tokens, own_generation_config


def to_llava(
    checkpoint: str | Path,
    output: str | Path,
    revision: str | None = None,
    add_norm: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the LLaVA that computes what a Pisces computes on text and shown pictures.

    Args:
        checkpoint: folder or Hub id of a Pisces; with or without a generation side.
        output: folder to write; whole or not there.
        revision: branch, tag or commit of a Hub id.
        add_norm: write the final norm of a SigLIP tower, which LLaVA does not read, as one more layer; then the
            numbers are the same up to rounding only. No effect where nothing reads that norm.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: no Pisces, a setting that LLaVA does not have, or a tensor that is
            missing, unknown or misshapen.
    """
    check_output(output, overwrite)
    source = find_checkpoint(str(checkpoint), revision)
    check_checkpoint(source)
    config = read_config(source)
    adds_norm = add_norm and config.vision_feature_layer is None and tower_type(config) == "siglip_vision_model"
    if not adds_norm:
        check_pisces_config(config, str(checkpoint))
    found = index_tensors(source)
    check_tensors(found, config, str(checkpoint))
    extras = read_json(source / "config.json")
    plan = {name: PlannedTensor(name, tensor) for name, tensor in found.items()}
    if adds_norm:
        config, plan = add_norm_layer(config, found)
    llava_config = config_to_llava(config, extras)
    tensors, left_out = rename_all(plan, table_to_llava(config), str(checkpoint))
    processor = _build_processor(AutoProcessor.from_pretrained(source), config, llava_config)
    with new_folder(output, overwrite) as folder:
        llava_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_generation_config(source, llava_config, folder)
        write_shards([replace(tensor, name=name) for name, tensor in tensors.items()], folder, max_shard_size)
    num_copied = sum(tensor.source is not None for tensor in tensors.values())
    print(f"{output}: {num_copied} of {len(tensors)} tensors byte by byte; load it with LlavaForConditionalGeneration")
    if left_out:
        print(f"left out, LLaVA does not draw: {listed(left_out)}")
    if tower_type(config) not in TOWERS_OF_LLAVA:
        print(f"note: transformers loads it; engines may not know a LLaVA with a {tower_type(config)}")
    return Path(output)


def _build_processor(pisces: PiscesProcessor, config: PiscesConfig, llava_config: LlavaConfig) -> LlavaProcessor:
    tower: Any = config.vision_config
    processor = LlavaProcessor(
        image_processor=pisces.image_processor,
        tokenizer=pisces.tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=llava_config.vision_feature_select_strategy,
        chat_template=pisces.chat_template,
        image_token=pisces.image_token,
        num_additional_image_tokens=num_prefix_tokens(tower),
    )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"processor: {pisces.image_token} is token {processor.image_token_id}, but config.json has image_token_id "
            f"{config.image_token_id}. Give the checkpoint its own tokenizer."
        )
    return processor


def _write_generation_config(source: Path, config: LlavaConfig, folder: Path) -> None:
    own = source / "generation_config.json"
    if not own.is_file():
        own_generation_config(GenerationConfig.from_model_config(config)).save_pretrained(folder)
    else:
        copy_generation_config(own, folder / own.name, leave_out=("image_temperature",))


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("to_llava", "Write the understanding side of a Pisces as a stock LLaVA checkpoint.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PISCES", help="folder or Hub id of a Pisces checkpoint"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--add_norm_layer",
        action="store_true",
        dest="add_norm",
        help="write the final norm of a SigLIP tower as one more layer, where vision_feature_layer is None",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    to_llava(**options)


if __name__ == "__main__":
    run_command(main)
