"""Turns an SDXL-base repository into a decoder that reads the vectors of another generation tower.

`python -m conversion.from_sdxl --sdxl FOLDER_OR_HUB_ID --gen_vector_size 1792 --output FOLDER` writes U-Net, VAE and
scheduler for `conversion.assemble --decoder`. The U-Net's cross attention and added embedding are resized; what is
kept, what is new and how it starts is printed and written to provenance.json. A decoder made here draws nothing
sensible before it is trained on the tower's vectors.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.assembly.parts import Part, read_license
from conversion.assembly.provenance import write_provenance
from conversion.storage.command import make_parser, run_command
from conversion.storage.decoder import (
    WEIGHTS,
    build_component,
    change_scheduler,
    check_shapes,
    read_component,
    read_scheduler,
    state_shapes,
    write_decoder,
)
from conversion.storage.hub_files import find_folder, weight_patterns
from conversion.storage.output_folder import check_output, new_folder
from conversion.storage.tensors import PlannedTensor, SourceTensor
from modeling_pisces.checkpoint.files import read_json
from modeling_pisces.pipeline_checks_pisces import check_decoder
from pisces_commands.arguments import COUNT, SEED


PART = "sdxl"
NUM_SIZES = 6  # SDXL's added embedding: height and width of the original, crop, target size (arXiv 2307.01952)
ADDED_EMBEDDING = "add_embedding.linear_1.weight"
# the only weights whose shape depends on the width of the condition
CROSS_ATTENTION = re.compile(r".*\.attn2\.to_[kv]\.weight")
CARD = """\
---
{license}---
# A decoder for vectors of width {size}, to be trained

U-Net, VAE and scheduler of {name} ({origin}), with a cross attention for vectors of width {size}. Kept are
{kept} tensors of the U-Net and the whole VAE; {new} tensors of the U-Net are new or partly new, so this decoder draws
nothing sensible until it is trained. provenance.json lists every tensor and how it started. The terms of {name} go on
to hold.
"""


def from_sdxl(
    sdxl: str,
    gen_vector_size: int,
    output: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    seed: int = 0,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a decoder folder whose U-Net reads vectors of width `gen_vector_size`.

    Args:
        sdxl: folder or Hub id of a diffusers repository with unet/, vae/ and scheduler/.
        gen_vector_size: width Dg of the generation tower's vectors; `pisces info` prints it.
        output: folder to write; whole or not there.
        revision: commit of a Hub id.
        variant: the word in the names of the weight files, such as "fp16"; "none" or None for files without one.
        seed: of the new weights.
        prediction_type: what the U-Net will be trained to predict; None keeps the scheduler's own.
        zero_terminal_snr: let the schedule end in pure noise (arXiv 2305.08891); needs "v_prediction".
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: no such U-Net, a misshapen tensor, or settings that exclude each other.
    """
    check_output(output, overwrite)
    if gen_vector_size < 1:
        raise ValueError(f"gen_vector_size is {gen_vector_size}; expected the width of the vectors, such as 1792.")
    part, variant = _open_sdxl(sdxl, revision, variant), None if variant == "none" else variant
    scheduler = change_scheduler(read_scheduler(sdxl, part.path), prediction_type, zero_terminal_snr)
    configs, plans, started = _plan(part, variant, gen_vector_size, seed)
    with new_folder(output, overwrite) as folder:
        records = write_decoder(folder, configs, plans, scheduler, max_shard_size)
        new = {f"unet.{name}": how for name, how in started.items()}
        write_provenance(folder, records, {PART: part}, new)
        num_kept = len(plans["unet"]) - len(started)
        (folder / "README.md").write_text(_card(part, gen_vector_size, num_kept, len(started)), encoding="utf-8")
    _report(output, plans, started)
    return Path(output)


def _open_sdxl(name: str, revision: str | None, variant: str | None) -> Part:
    word = None if variant == "none" else variant
    patterns = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/*.json", "README.md"]
    for component in ("unet", "vae"):  # the repository holds five more copies of these weights
        patterns += weight_patterns(component, WEIGHTS, word)
    path, commit = find_folder(name, revision, patterns)
    config = read_json(path / "model_index.json")
    return Part(path, config, {}, commit, read_license(path), name, "decoder")


def _plan(
    part: Part, variant: str | None, gen_vector_size: int, seed: int
) -> tuple[dict[str, Any], dict[str, list[PlannedTensor]], dict[str, str]]:
    """Configs and plans of both components, and how the new tensors of the U-Net start."""
    unet_config, unet_tensors = read_component(part.name, part.path, "unet", variant)
    new_config = resized_config(unet_config, gen_vector_size)
    vae_config, vae_tensors = read_component(part.name, part.path, "vae", variant)
    vae = build_component("vae", vae_config)
    check_shapes("sdxl, vae", {name: tensor.shape for name, tensor in vae_tensors.items()}, state_shapes(vae))
    shapes = {name: tensor.shape for name, tensor in unet_tensors.items()}
    check_shapes("sdxl, unet", shapes, state_shapes(build_component("unet", unet_config)))
    new_unet = build_component("unet", new_config)
    check_decoder(new_unet, vae, gen_vector_size, f"--gen_vector_size {gen_vector_size}")
    unet_plan, started = resize_unet(unet_tensors, unet_config, state_shapes(new_unet), seed)
    vae_plan = [PlannedTensor(name, source=tensor, part=PART) for name, tensor in vae_tensors.items()]
    return {"unet": new_config, "vae": vae_config}, {"unet": unet_plan, "vae": vae_plan}, started


def resized_config(config: Mapping[str, Any], gen_vector_size: int) -> dict[str, Any]:
    """The U-Net's config with conditions of another width.

    Raises:
        ValueError: the U-Net takes its condition in a way that Pisces has no vectors for.
    """
    if config.get("encoder_hid_dim") is not None:
        raise ValueError(
            f"sdxl, unet: encoder_hid_dim is {config['encoder_hid_dim']}, expected None. Give a U-Net that reads its "
            "condition in the cross attention alone, such as SDXL-base."
        )
    changes: dict[str, Any] = {"cross_attention_dim": gen_vector_size}
    if config.get("addition_embed_type") == "text_time":
        size = gen_vector_size + NUM_SIZES * config["addition_time_embed_dim"]
        changes["projection_class_embeddings_input_dim"] = size
    return {**config, **changes}


def resize_unet(
    tensors: Mapping[str, SourceTensor],
    config: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    seed: int,
) -> tuple[list[PlannedTensor], dict[str, str]]:
    """Keep every tensor whose shape stays, and start the others.

    Args:
        tensors, config: of the source.
        expected: name -> shape of the resized U-Net.

    Returns:
        the plan in the order of `tensors`, and for each new tensor how it starts.
    """
    generator = torch.Generator().manual_seed(seed)
    plan, started = [], {}
    for name, tensor in tensors.items():
        if tensor.shape == expected[name]:
            plan.append(PlannedTensor(name, source=tensor, part=PART))
        elif name == ADDED_EMBEDDING:
            weight, started[name] = _start_added_embedding(tensor, config, expected[name])
            plan.append(PlannedTensor(name, tensor=weight, part=PART))
        else:
            assert CROSS_ATTENTION.fullmatch(name), f"{name} depends on the width of the condition"
            weight, started[name] = _start_projection(tensor, expected[name], generator, seed)
            plan.append(PlannedTensor(name, tensor=weight, part=PART))
    return plan, started


def _start_projection(
    tensor: SourceTensor, shape: tuple[int, ...], generator: torch.Generator, seed: int
) -> tuple[torch.Tensor, str]:
    # keys and values spread as SDXL's do for inputs of one size, so that the kept layers behind see familiar numbers
    old = tensor.load()
    std = old.float().std().item() * (old.shape[1] / shape[1]) ** 0.5
    weight = torch.empty(shape).normal_(std=std, generator=generator)
    return weight.to(
        old.dtype
    ), f"normal, std {std:.6g} (of the weight it replaces, x sqrt(old/new width)), seed {seed}"


def _start_added_embedding(
    tensor: SourceTensor, config: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[torch.Tensor, str]:
    # zeros: the U-Net starts as SDXL without a pooled text, its sizes and crop as they were trained
    num_kept = NUM_SIZES * config["addition_time_embed_dim"]
    old = tensor.load()
    weight = torch.zeros(shape, dtype=old.dtype)
    weight[:, -num_kept:] = old[:, -num_kept:]
    num_new = shape[1] - num_kept
    return (
        weight,
        f"columns 0 to {num_new - 1} (mean of the vectors): zeros; the {num_kept} of sizes and crop are kept",
    )


def _card(part: Part, gen_vector_size: int, num_kept: int, num_new: int) -> str:
    is_local = Path(part.name).expanduser().is_dir()
    return CARD.format(
        license=f"license: {part.license}\n" if part.license else "",
        size=gen_vector_size,
        name=part.path.resolve().name if is_local else part.name,
        origin=f"commit {part.revision}" if part.revision else "a local folder",
        kept=num_kept,
        new=num_new,
    )


def _report(output: str | Path, plans: Mapping[str, list[PlannedTensor]], started: Mapping[str, str]) -> None:
    def count(names: Sequence[str]) -> str:
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in plans["unet"] if tensor.name in names)
        return f"{len(names)} tensors, {parameters:,} parameters"

    kept = {tensor.name for tensor in plans["unet"]} - set(started)
    print(f"{output}: unet kept {count(sorted(kept))}; vae kept whole, {len(plans['vae'])} tensors")
    attention = [name for name in started if CROSS_ATTENTION.fullmatch(name)]
    if attention:
        print(f"new: cross attention, {count(attention)}: attn2.to_k and attn2.to_v, normal, as wide as SDXL's spread")
    if ADDED_EMBEDDING in started:
        print(f"partly new: {ADDED_EMBEDDING}, {started[ADDED_EMBEDDING]}")
    print("train the decoder on the generation tower's vectors before you use it" if started else "nothing is new")


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("from_sdxl", "Resize SDXL's U-Net for the vectors of another generation tower.")
    parser.add_argument("--sdxl", required=True, metavar="PART", help="folder or Hub id of an SDXL-base repository")
    parser.add_argument("--gen_vector_size", required=True, type=COUNT, metavar="DG", help="width of the vectors")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a Hub id, 40 hexadecimal digits")
    parser.add_argument("--variant", metavar="WORD", help="word in the names of the weights, such as fp16")
    parser.add_argument("--seed", type=SEED, default=0, help="of the new weights (default: 0)")
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what you will train the U-Net to predict (default: the scheduler's own)",
    )
    parser.add_argument(
        "--zero_terminal_snr", action="store_true", help="let the schedule end in pure noise; needs v_prediction"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    from_sdxl(**options)


if __name__ == "__main__":
    run_command(main)
