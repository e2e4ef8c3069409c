"""Turns Emu2-Gen into the two parts that draw: its visual tower, and the diffusion decoder trained on that tower.

`python -m conversion.from_emu2_gen --emu2_gen BAAI/Emu2-Gen --revision COMMIT --output FOLDER` writes
`FOLDER/gen_vision_tower` and `FOLDER/decoder`, which `conversion.assemble` takes as `--gen_vision_tower` and
`--decoder`. Emu2's language model is left behind, and of a Hub repository only the files with the tower and the
decoder are fetched. Names are translated by the tables of `emu2_keys.py`; no weight is changed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from conversion.assembly.parts import Part
from conversion.assembly.provenance import write_provenance
from conversion.formats.emu2 import (
    DROPPED_KEYS,
    TOWER_PREFIX,
    check_names,
    expand_tower_keys,
    expand_zero_keys,
    tower_config,
)
from conversion.storage.command import make_parser, run_command
from conversion.storage.decoder import (
    WEIGHTS,
    build_component,
    check_shapes,
    read_component,
    read_scheduler,
    state_shapes,
    write_decoder,
)
from conversion.storage.hub_files import find_folder, index_variant, read_weight_map, weight_patterns
from conversion.storage.output_folder import check_output, new_folder
from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor
from conversion.storage.write import write_shards
from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel
from modeling_pisces.checkpoint.files import read_json
from modeling_pisces.pipeline_checks_pisces import check_decoder


PART = "emu2_gen"
# the model page and the README of github.com/baaivision/Emu (Emu2) say "Non-commercial license" of the weights; the
# repository's Apache-2.0 is for its code. Emu2 was initialised from LLaMA, whose own terms add to it
LICENSE = "emu2-non-commercial"
CARD = """\
---
license: other
license_name: {license}
license_link: https://github.com/baaivision/Emu/tree/main/Emu2#model-weights
base_model: BAAI/Emu2-Gen
---
# {title}

{text}

The weights are those of BAAI/Emu2-Gen ({origin}), renamed and otherwise unchanged. Its authors release them under a
**non-commercial license**, and say that the model was initialised from LLaMA. What is built on this folder is bound by
the same terms.
"""
CARD_TEXTS = {
    "gen_vision_tower": ("Generation tower of Emu2-Gen", "EVA-CLIP-E as Emu2 trained it, for `modeling_pisces`."),
    "decoder": ("Decoder of Emu2-Gen", "U-Net, VAE and scheduler that turn vectors of Emu2's tower into pictures."),
}


def from_emu2_gen(
    emu2_gen: str,
    output: str | Path,
    revision: str | None = None,
    variant: str | None = "bf16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the generation tower and the decoder of Emu2-Gen as parts of a Pisces.

    Args:
        emu2_gen: folder or Hub id of the diffusers-style repository.
        output: folder to write; whole or not there.
        revision: commit of a Hub id.
        variant: the word in the names of the weight files; "none" or None for files without one.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: a file, a key, a shape or a setting is not that of Emu2-Gen.
    """
    check_output(output, overwrite)
    variant = None if variant == "none" else variant
    part, names = open_emu2_gen(emu2_gen, revision, variant)
    config = tower_config(part.config.get("vision_config") or {})
    check_names(names, config.num_hidden_layers)
    tower = plan_tower(part.tensors, config)
    configs, plans = _plan_decoder(part, variant, config.hidden_size)
    scheduler = read_scheduler(emu2_gen, part.path)
    with new_folder(output, overwrite) as folder:
        tower_records = _write_tower(folder / "gen_vision_tower", config, tower, max_shard_size)
        decoder_records = write_decoder(folder / "decoder", configs, plans, scheduler, max_shard_size)
        _write_cards(folder, part, tower_records, decoder_records, expand_zero_keys(config.num_hidden_layers))
    _report(output, part, names, tower_records, decoder_records)
    return Path(output)


def open_emu2_gen(name: str, revision: str | None, variant: str | None) -> tuple[Part, set[str]]:
    """Find Emu2-Gen and say where the tensors of its tower lie.

    Returns:
        the part, with `multimodal_encoder/config.json` as its config, and the names of all tensors of the encoder.
    """
    encoder = "multimodal_encoder"
    patterns = [f"{encoder}/*.json", "unet/config.json", "vae/config.json", "scheduler/*.json", "README.md"]
    for component in ("unet", "vae"):
        patterns += weight_patterns(component, WEIGHTS, variant)
    path, commit = find_folder(name, revision, patterns)
    weight_map = read_weight_map(path / encoder, "model", variant)
    if weight_map is not None and not Path(name).expanduser().is_dir():  # few of its shards hold the tower
        shards = {file for key, file in weight_map.items() if key.startswith(TOWER_PREFIX)}
        path, _ = find_folder(name, revision, [f"{encoder}/{shard}" for shard in sorted(shards)])
    elif weight_map is None:
        path, _ = find_folder(name, revision, weight_patterns(encoder, "model", variant))
    config = read_json(path / encoder / "config.json")
    tensors, names = index_variant(path / encoder, "model", variant, prefix=TOWER_PREFIX)
    return Part(path, config, tensors, commit, LICENSE, name, "gen_vision_tower"), names


def plan_tower(tensors: dict[str, SourceTensor], config: PiscesGenVisionConfig) -> list[PlannedTensor]:
    """Where every tensor of the generation tower comes from, in the order of the model.

    Args:
        tensors: the source's, with their full names.

    Raises:
        ValueError: a tensor has another shape than the config asks for, or another dtype than its neighbours.
    """
    with torch.device("meta"):
        expected = state_shapes(PiscesGenVisionModel(config))
    planned: dict[str, PlannedTensor] = {}
    for source_name, targets in expand_tower_keys(config.num_hidden_layers).items():
        for target, block in zip(targets, _equal_blocks(tensors[source_name], len(targets)), strict=True):
            if block.shape[:1] == (1,) and len(block.shape) > len(expected[target]):
                block = block.reshaped(*block.shape[-len(expected[target]) :])
            planned[target] = PlannedTensor(target, source=block, part=PART)
    dtype = _one_dtype(tensors)
    for target in expand_zero_keys(config.num_hidden_layers):
        zeros = torch.zeros(expected[target], dtype=DTYPES[dtype])
        planned[target] = PlannedTensor(target, tensor=zeros, part=PART)
    check_shapes("emu2_gen, tower", {name: tensor.shape for name, tensor in planned.items()}, expected)
    return [planned[name] for name in expected]


def _equal_blocks(tensor: SourceTensor, count: int) -> list[SourceTensor]:
    if count == 1:
        return [tensor]
    size, rest = divmod(tensor.shape[0], count)
    if rest:
        raise ValueError(f"emu2_gen, tower: {tensor.name} has {tensor.shape[0]} rows, expected a multiple of {count}.")
    return [tensor.rows(i * size, (i + 1) * size) for i in range(count)]


def _one_dtype(tensors: dict[str, SourceTensor]) -> str:
    first = next(iter(tensors.values()))
    for tensor in tensors.values():
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"emu2_gen, tower: {tensor.name} is {tensor.dtype} but {first.name} is {first.dtype}; expected one "
                "dtype. Download the folder again."
            )
    return first.dtype


def _plan_decoder(part: Part, variant: str | None, vector_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    configs, plans, models = {}, {}, {}
    for component in ("unet", "vae"):
        configs[component], tensors = read_component(part.name, part.path, component, variant)
        models[component] = build_component(component, configs[component])
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_shapes(f"emu2_gen, {component}", shapes, state_shapes(models[component]))
        plans[component] = [PlannedTensor(name, source=tensor, part=PART) for name, tensor in tensors.items()]
    check_decoder(models["unet"], models["vae"], vector_size, f"the tower of {part.name}")
    return configs, plans


def _write_tower(
    folder: Path, config: PiscesGenVisionConfig, plan: list[PlannedTensor], max_shard_size: int | str
) -> list[dict[str, Any]]:
    folder.mkdir()
    config.architectures = ["PiscesGenVisionModel"]
    config.dtype = DTYPES[plan[0].stored_dtype]
    config.save_pretrained(folder)
    side = {"height": config.image_size, "width": config.image_size}
    # as Emu2 prepares images: squeezed to a square with bicubic, never cropped; CLIP's mean and deviation
    CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False).save_pretrained(folder)
    return write_shards(plan, folder, max_shard_size)


def _write_cards(
    folder: Path, part: Part, tower: list[dict[str, Any]], decoder: list[dict[str, Any]], zeros: dict[str, str]
) -> None:
    """A card and a provenance.json in each of the two folders, which may go separate ways, and one over both."""
    origin = f"commit {part.revision}" if part.revision else "a local folder"
    for name, (title, text) in CARD_TEXTS.items():
        card = CARD.format(license=LICENSE, title=title, text=text, origin=origin)
        (folder / name / "README.md").write_text(card, encoding="utf-8")
    write_provenance(folder / "gen_vision_tower", tower, {PART: part}, zeros)
    write_provenance(folder / "decoder", decoder, {PART: part})
    every = [record | {"name": f"gen_vision_tower/{record['name']}"} for record in tower]
    every += [record | {"name": f"decoder/{record['name']}"} for record in decoder]
    write_provenance(folder, every, {PART: part}, {f"gen_vision_tower/{name}": why for name, why in zeros.items()})


def _report(
    output: str | Path, part: Part, names: set[str], tower: list[dict[str, Any]], decoder: list[dict[str, Any]]
) -> None:
    print(f"{output}/gen_vision_tower: {len(tower)} tensors, {len(part.tensors)} of {part.name} and zero key biases")
    print(f"{output}/decoder: {len(decoder)} tensors, unchanged")
    for start, reason in DROPPED_KEYS.items():
        count = sum(name.startswith(start) for name in names)
        print(f"left behind: {count} tensors {start}* ({reason})")
    print(f"license: {LICENSE} (non-commercial); written to both cards and to provenance.json")


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("from_emu2_gen", "Take the visual tower and the decoder out of Emu2-Gen.")
    parser.add_argument("--emu2_gen", required=True, metavar="PART", help="folder or Hub id, such as BAAI/Emu2-Gen")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a Hub id, 40 hexadecimal digits")
    parser.add_argument(
        "--variant", default="bf16", metavar="WORD", help='word in the names of the weights, or "none" (default: bf16)'
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    from_emu2_gen(**options)


if __name__ == "__main__":
    run_command(main)
