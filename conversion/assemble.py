"""Builds a Pisces checkpoint from public parts: a language model, two vision towers and a diffusion decoder.

    python -m conversion.assemble --language_model meta-llama/Llama-3.1-8B-Instruct --language_model_revision COMMIT \\
        --vision_tower google/siglip-so400m-patch14-384 --vision_tower_revision COMMIT \\
        --gen_vision_tower emu2/gen_vision_tower --decoder emu2/decoder --dtype bfloat16 --output pisces

The parts' weights are copied byte by byte and never loaded as a whole. Everything that can be wrong with them is
looked for first; then the folder is written and appears under its name at once. Projectors, head and rows for new
tokens start untrained and are listed. Which tensor goes where is decided in `assembly_plan.py`, what the tokenizer
gets in `vocabulary.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from conversion.assembly.chat_formats import FORMAT_NAMES, ChatTemplate
from conversion.assembly.config import AssembleArguments, make_config, make_generation_config, make_processor
from conversion.assembly.decoder import check_decoder_part, write_decoder_part
from conversion.assembly.parts import Part, open_part
from conversion.assembly.plan import DTYPE_FLAGS, AssemblyPlan, plan_tensors
from conversion.assembly.provenance import write_provenance
from conversion.assembly.vocabulary import Vocabulary, prepare_tokenizer
from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import check_output, new_folder
from conversion.storage.write import write_shards
from modeling_pisces.checkpoint.files import check_checkpoint, read_json
from modeling_pisces.modeling_pisces_heads import GEN_HEADS
from pisces_commands.arguments import COUNT, SEED, whole_number


PARTS = {
    "language_model": "decoder-only language model with its tokenizer, or a GGUF file of one",
    "vision_tower": "understanding tower, or a SigLIP or CLIP pair or a Pisces that holds one",
    "gen_vision_tower": "generation tower, or a Pisces that holds one; without it the model only understands",
    "decoder": "diffusers folder that draws the generation tower's vectors, or a Pisces that holds one",
}


def assemble(
    run: AssembleArguments, output: str | Path, overwrite: bool = False, max_shard_size: int | str = "5GB"
) -> AssemblyPlan:
    """Write the checkpoint folder `output`, whole or not at all.

    Returns:
        the plan that was written.

    Raises:
        ValueError: before anything large is written: the parts do not fit; names part, key, found and expected.
    """
    check_output(output, overwrite)
    parts = open_parts(run)
    vocabulary = prepare_tokenizer(parts["language_model"])
    config = make_config(run, parts, vocabulary)
    processor, chat = make_processor(run, parts, vocabulary, config)
    generation_config = make_generation_config(parts["language_model"], vocabulary, chat.end_token)
    plan = plan_tensors(run, parts, vocabulary, config)
    if "decoder" in parts:
        check_decoder_part(parts["decoder"], config)
    report(parts, vocabulary, plan, chat)

    with new_folder(output, overwrite) as folder:
        processor.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        config.save_pretrained(folder)
        withheld = (folder / "config.json").rename(folder / "config.json.partial")  # nothing loads without it
        records = write_shards(plan.tensors, folder, max_shard_size)
        if "decoder" in parts:
            records += write_decoder_part(parts["decoder"], folder, max_shard_size)
        write_provenance(folder, records, parts, plan.new_tensors)
        forget_this_machine(folder)
        withheld.rename(folder / "config.json")
        check_checkpoint(folder, with_decoder="decoder" in parts)
    return plan


def open_parts(run: AssembleArguments) -> dict[str, Part]:
    """Open every part that is named; only headers and JSON are read.

    Raises:
        ValueError: a license is given for what is no part of this run.
    """
    if unknown := sorted(set(run.licenses) - {role for role in PARTS if getattr(run, role) is not None}):
        raise ValueError(f"--license {unknown[0]}={run.licenses[unknown[0]]}: expected a part that is given here.")
    parts = {}
    for role in PARTS:
        if (name := getattr(run, role)) is not None:
            part = open_part(name, getattr(run, f"{role}_revision"), role, run.allow_pickle)
            parts[role] = replace(part, license=run.licenses.get(role, part.license))
    return parts


def report(parts: dict[str, Part], vocabulary: Vocabulary, plan: AssemblyPlan, chat: ChatTemplate) -> None:
    """Print what is about to be written: where each part comes from, and everything that is new."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        sizes[tensor.part] = sizes.get(tensor.part, 0) + prod(tensor.shape)
    for role, part in parts.items():
        count = f"{sizes[role]:,} parameters, " if role in sizes else ""
        origin = f"{part.name} at revision {part.revision}" if part.revision else part.name
        stored = f", dequantized from {types}" if (types := part.origin.get("dequantized_from")) else ""
        print(f"{role}: {count}{origin}{stored}, license {part.license or f'not stated (--license {role}=ID)'}")
    for name in (name for name in sizes if name not in parts):
        print(f"{name}: {sizes[name]:,} parameters, new, untrained")
    for key in (tensor.name for tensor in plan.tensors if tensor.part in parts and tensor.name in plan.new_tensors):
        print(f"{key}: new rows, {plan.new_tensors[key]}")
    for new, old in vocabulary.renamed.items():
        print(f"token {new}: takes the place of {old}")
    sameness = {None: "the language model has no template of its own", True: "as", False: "otherwise than"}[
        chat.matches_own
    ]
    ending = "" if chat.matches_own is None else " the language model's own template writes text"
    print(f"chat format: {chat.name}, {sameness}{ending}")


def forget_this_machine(folder: Path) -> None:
    """Drop what the libraries note about where a part was loaded from; it would differ from run to run."""
    for path in sorted(folder.rglob("*config.json*")):
        content = read_json(path)
        if (kept := _without_origin(content)) != content:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_origin(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_origin(item) for item in content]
    if not isinstance(content, dict):
        return content
    origin = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
    return {key: _without_origin(value) for key, value in content.items() if key not in origin}


def _read_licenses(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        role, _, license = text.partition("=")
        if role not in PARTS or not license.strip():
            raise ValueError(f"--license {text}: expected PART=ID with a part of {', '.join(PARTS)}.")
    return {role: license.strip() for role, _, license in (text.partition("=") for text in texts)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("assemble", "Build a Pisces checkpoint from public parts.")
    for role, about in PARTS.items():
        required = role in ("language_model", "vision_tower")
        parser.add_argument(f"--{role}", required=required, metavar="PART", help=f"{about}: a folder or a Hub id")
        parser.add_argument(f"--{role}_revision", metavar="COMMIT", help="commit of the Hub id, 40 hexadecimal digits")
    parser.add_argument(
        "--gen_pool_stride",
        type=COUNT,
        help="patches averaged per side into one drawn vector (default: that of the Pisces the tower is from, or 4)",
    )
    parser.add_argument("--gen_head_type", choices=tuple(GEN_HEADS), default="mlp", help="mlp is the paper's")
    parser.add_argument(
        "--vision_feature_layer",
        type=whole_number(-1000, 1000),
        help="hidden state to read instead of the last, such as -2",
    )
    parser.add_argument(
        "--vision_feature_select_strategy",
        choices=("full", "default"),
        help="default drops a class token; chosen by the tower if absent",
    )
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja template instead of the one that fits the language model"
    )
    parser.add_argument(
        "--chat_format",
        choices=FORMAT_NAMES,
        help="how turns are written, where the language model has no chat template that can be followed",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPE_FLAGS), help="convert all weights but the decoder's (default: as they are)"
    )
    parser.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="PART=ID",
        help="license of a part whose card does not state it, such as language_model=apache-2.0",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of everything that is new")
    parser.add_argument("--allow_pickle", action="store_true", help="also read .bin weights, with weights_only=True")
    flags = vars(parser.parse_args(arguments))
    output, overwrite, size = flags.pop("output"), flags.pop("overwrite"), flags.pop("max_shard_size")
    flags["licenses"] = _read_licenses(flags.pop("license"))
    assemble(AssembleArguments(**flags), output, overwrite, size)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
