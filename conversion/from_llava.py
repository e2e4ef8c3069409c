"""Turns a LLaVA checkpoint into a Pisces that understands: same tower, same trained projector, same language model.

`python -m conversion.from_llava --llava FOLDER_OR_HUB_ID --output FOLDER`. Tensors are copied byte by byte under
Pisces' names, so that the logits are the same numbers; `conversion.to_llava` undoes it. The image placeholder keeps
LLaVA's name and id. Names and settings are translated in `llava_keys.py`; with `--gen_vision_tower` the model also
gets a generation side (`llava_generation.py`), whose projector and head are still to be trained.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, GenerationConfig, LlavaConfig, LlavaProcessor

from conversion.assembly.parts import Part, open_part
from conversion.assembly.provenance import write_provenance
from conversion.formats.llava import (
    LLAVA_TO_PISCES,
    check_llava_config,
    check_tensors,
    config_to_pisces,
    listed,
    rename_all,
)
from conversion.formats.llava_drawing import GenerationSide, add_drawing_tokens, open_image_processor, plan_generation
from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import check_output, copy_generation_config, new_folder
from conversion.storage.tensors import DTYPES, PlannedTensor
from conversion.storage.write import write_shards
from modeling_pisces import PiscesConfig, PiscesProcessor
from modeling_pisces.configuration_pisces import own_generation_config
from modeling_pisces.modeling_pisces_heads import GEN_HEADS
from pisces_commands.arguments import COUNT, SEED


def from_llava(
    llava: str,
    output: str | Path,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    generation: GenerationSide | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the Pisces that computes what a LLaVA computes.

    Args:
        llava: folder or Hub id of a `LlavaForConditionalGeneration`.
        output: folder to write; whole or not there.
        revision: commit of a Hub id.
        chat_template: Jinja file for a LLaVA that has no template of its own.
        generation: what it shall draw with; None writes a model that only understands.
        allow_pickle: read `.bin` weights, with `weights_only=True`.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: no LLaVA, a setting that Pisces cannot follow, or a tensor that is
            missing, unknown or misshapen.
    """
    check_output(output, overwrite)
    part = open_part(llava, revision, role="raw", allow_pickle=allow_pickle)
    llava_config = _read_config(part)
    llava_processor = _read_processor(part, llava_config)
    parts = {"llava": part}
    own: dict[str, Any] = dict(_free_token_ids(part, llava_processor, llava_config))
    if generation is not None:
        add_drawing_tokens(llava_processor.tokenizer, own, part.name)
        parts["gen_vision_tower"], settings = generation.open()
        own |= {**settings, "new_token_ids": sorted(own.values())}  # their rows were never trained
    config = config_to_pisces(llava_config, part.config, own, part.name)
    tensors, left_out = rename_all(part.tensors, LLAVA_TO_PISCES, part.name)
    plan = [PlannedTensor(name, source, part="llava") for name, source in tensors.items()]
    new_tensors: dict[str, str] = {}
    if generation is not None:
        config.dtype = config.dtype or DTYPES[plan[0].stored_dtype]
        added, new_tensors = plan_generation(parts["gen_vision_tower"], config, generation.seed)
        plan += added
    check_tensors({tensor.name: tensor for tensor in plan}, config, part.name)
    processor = _build_processor(parts, llava_processor, config, chat_template)
    with new_folder(output, overwrite) as folder:
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_generation_config(part, config, folder)
        records = write_shards(plan, folder, max_shard_size)
        write_provenance(folder, records, parts, new_tensors)
    print(
        f"{output}: {len(tensors)} tensors of {part.name}, byte by byte; {config.num_image_tokens} vectors per image"
    )
    _report(parts, new_tensors, left_out, processor)
    return Path(output)


def _report(
    parts: Mapping[str, Part], new_tensors: Mapping[str, str], left_out: Sequence[str], processor: PiscesProcessor
) -> None:
    if left_out:
        print(f"left out, computed from the config: {listed(left_out)}")
    if "gen_vision_tower" not in parts:
        return
    print(f"gen_vision_tower: {parts['gen_vision_tower'].name}; new, untrained: {listed(new_tensors)}")
    if processor.gen_image_token not in processor.chat_template:
        print(
            f"note: the chat template never writes {processor.gen_image_token}, so drawings in assistant turns have "
            "no place in it. Pass one that does with --chat_template to train on them."
        )


def _read_config(part: Part) -> LlavaConfig:
    found = part.config.get("model_type")
    if found != "llava":
        raise ValueError(
            f"{part.name}: config.json: model_type is {found!r}, expected 'llava'. LLaVA-NeXT, OneVision and the "
            "original repositories of LLaVA compute something else; give a LlavaForConditionalGeneration."
        )
    if part.config.get("quantization_config"):
        raise ValueError(f"{part.name}: found quantization_config, expected full-precision weights.")
    try:
        config = LlavaConfig.from_pretrained(part.path)
    except Exception as error:  # strict configs raise their own classes; every one means a wrong value in this file
        raise ValueError(f"{part.name}: config.json: {' '.join(str(error).split())}") from error
    check_llava_config(config, part.name)
    return config


def _read_processor(part: Part, config: LlavaConfig) -> LlavaProcessor:
    try:
        processor = AutoProcessor.from_pretrained(part.path)
    except Exception as error:  # each sub-processor has its own errors; all mean that a file here is wrong
        raise ValueError(f"{part.name}: the processor cannot be built ({' '.join(str(error).split())}).") from error
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(f"{part.name}: the processor is a {type(processor).__name__}, expected a LlavaProcessor.")
    if processor.image_token_id != config.image_token_index:
        raise ValueError(
            f"{part.name}: {processor.image_token} is token {processor.image_token_id} of the tokenizer, but "
            f"config.json has image_token_index {config.image_token_index}."
        )
    return processor


def _free_token_ids(part: Part, processor: LlavaProcessor, config: LlavaConfig) -> dict[str, int]:
    """Ids of embedding rows without a token, for the drawing tokens, which an understanding model never reads."""
    size = config.text_config.vocab_size
    names = ("gen_image_token_id", "gen_start_token_id", "gen_end_token_id")
    free = range(max(processor.tokenizer.get_vocab().values()) + 1, size)
    if len(free) < len(names):
        raise ValueError(
            f"{part.name}: the vocabulary of {size} has {len(free)} rows without a token, but Pisces needs three for "
            "its drawing tokens. Give it some first: model.resize_token_embeddings(..., pad_to_multiple_of=64)."
        )
    return dict(zip(names, free, strict=False))


def _build_processor(
    parts: Mapping[str, Part], llava: LlavaProcessor, config: PiscesConfig, chat_template: str | Path | None
) -> PiscesProcessor:
    template = llava.chat_template if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
    if not template:
        raise ValueError(
            f"{parts['llava'].name}: has no chat template. Pass the one it was trained with: --chat_template FILE."
        )
    tower = parts.get("gen_vision_tower")
    return PiscesProcessor(
        image_processor=llava.image_processor,
        gen_image_processor=None if tower is None else open_image_processor(tower),
        tokenizer=llava.tokenizer,
        chat_template=template,
        num_image_tokens=config.num_image_tokens,
        num_gen_image_tokens=config.num_gen_image_tokens,
        image_token=llava.image_token,
    )


def _write_generation_config(part: Part, config: PiscesConfig, folder: Path) -> None:
    own = part.path / "generation_config.json"
    if own.is_file():
        copy_generation_config(own, folder / own.name)
    else:
        own_generation_config(GenerationConfig.from_model_config(config)).save_pretrained(folder)


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("from_llava", "Turn a LLaVA checkpoint into a Pisces with the same numbers.")
    parser.add_argument("--llava", required=True, metavar="PART", help="folder or Hub id of a LLaVA checkpoint")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a Hub id, 40 hexadecimal digits")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja file, for a LLaVA without a template")
    parser.add_argument(
        "--gen_vision_tower", metavar="PART", help="generation tower, for a model that can learn to draw"
    )
    parser.add_argument("--gen_vision_tower_revision", metavar="COMMIT", help="its commit, 40 hexadecimal digits")
    parser.add_argument(
        "--gen_pool_stride",
        type=COUNT,
        help="patches averaged per side into one drawn vector (default: that of the Pisces the tower is from, or 4)",
    )
    parser.add_argument("--gen_head_type", choices=tuple(GEN_HEADS), default="mlp", help="mlp is the paper's")
    parser.add_argument("--seed", type=SEED, default=0, help="of the new projector and head")
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin weights, with weights_only=True")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    names = ("gen_vision_tower", "gen_vision_tower_revision", "gen_pool_stride", "gen_head_type", "seed")
    tower, revision, pool_stride, head_type, seed = (options.pop(name) for name in names)
    side = None if tower is None else GenerationSide(tower, revision, pool_stride, head_type, seed)
    from_llava(**options, generation=side)


if __name__ == "__main__":
    run_command(main)
