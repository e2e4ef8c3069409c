"""Merges a PEFT adapter into its base: base + adapter -> a dense checkpoint that draws and answers the same.

`python -m conversion.merge_adapter --base PISCES --adapter FOLDER --output FOLDER`. The adapter is plain PEFT on a
`PiscesForConditionalGeneration`, with or without `modules_to_save`. The merge is done in fp32 and compared with the
adapter on a probe (`probe.py`) before anything is saved. Tensors that the adapter does not touch keep their bytes;
the others are rounded once, to the dtype that the base stores them in. Processor and decoder are carried along.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from conversion.checks.probe import draw_vectors, largest_difference, make_probe, predict_vectors, text_logits
from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import carry_files, carry_provenance, check_output, new_folder
from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor, index_tensors
from conversion.storage.write import write_shards
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_config, read_json
from modeling_pisces.checkpoint.loading import load_model
from pisces_commands.arguments import finite_number


# fp32 rounds W x + B A x and (W + B A) x differently; worst of twelve adapters on tiny models: 1.2e-6
TOLERANCE = 1e-5
ADAPTER_WEIGHTS = "adapter_model"
_PREFIX = "base_model.model."  # what PEFT puts in front of a module's name


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    revision: str | None = None,
    adapter_revision: str | None = None,
    tolerance: float = TOLERANCE,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the dense checkpoint that computes what base and adapter compute together.

    Args:
        base: folder or Hub id of the checkpoint that the adapter was trained on; loaded in fp32, on the CPU.
        adapter: folder or Hub id of the adapter.
        output: folder to write; whole or not there.
        revision, adapter_revision: branch, tag or commit of a Hub id.
        tolerance: largest difference between adapter and merged model, relative to the largest value.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: the adapter was made for another base (naming a tensor), cannot be
            merged, changes nothing, or the merged model does not compute the same.
    """
    check_output(output, overwrite)
    source = find_checkpoint(str(base), revision)
    check_checkpoint(source)
    adapter_folder = find_checkpoint(str(adapter), adapter_revision)
    check_adapter(adapter_folder, read_config(source), index_tensors(source))
    merged, differences = _merge(source, adapter_folder, tolerance)
    plan, changed = _plan(index_tensors(source), merged)
    if not changed:
        raise ValueError(f"{adapter}: changes no tensor of {base}; nothing to merge. Was it saved before training?")
    with new_folder(output, overwrite) as folder:
        carry_files(source, folder)
        write_shards(plan, folder, max_shard_size)
        carry_provenance(source, folder, changed, "merged with an adapter")
    measured = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"{output}: {len(changed)} of {len(plan)} tensors changed; adapter against merged, fp32: {measured}")
    return Path(output)


def check_adapter(folder: Path, config: PiscesConfig, base: Mapping[str, SourceTensor]) -> None:
    """Compare the adapter's tensors with what its settings ask for on this base, by name and shape; reads no weights.

    Raises:
        ValueError: naming the tensor that does not fit, or what else cannot be merged.
    """
    settings = read_adapter_config(folder)
    expected = _expected_tensors(folder, settings, config)
    found = {name: place.shape for name, place in index_tensors(folder, ADAPTER_WEIGHTS).items()}
    hint = f"It was made for another base than this one (its own note: {settings.base_model_name_or_path})."
    for name in sorted(expected.keys() | found.keys()):
        plain = name.removeprefix(_PREFIX)
        # an embedding that was saved beside the adapter
        is_whole_tensor = plain in base and base[plain].shape == found.get(name)
        if name not in found:
            raise ValueError(f"{folder}: {plain} is missing, which the adapter's config asks for. {hint}")
        if name not in expected and not is_whole_tensor:
            raise ValueError(f"{folder}: {plain} has no place in this base. {hint}")
        if name in expected and found[name] != expected[name]:
            raise ValueError(f"{folder}: {plain} has the shape {found[name]}, the base needs {expected[name]}. {hint}")


def read_adapter_config(folder: Path) -> Any:
    """The adapter's PEFT config.

    Raises:
        ValueError: no adapter, a pickle, or a kind that has no dense form.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    read_json(folder / "adapter_config.json")
    if not (folder / f"{ADAPTER_WEIGHTS}.safetensors").is_file():
        pickles = ", ".join(path.name for path in sorted(folder.glob("adapter_model.*"))) or "no weights"
        raise ValueError(f"{folder}: found {pickles}, expected adapter_model.safetensors. Save the adapter again.")
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: adapter_config.json cannot be read ({' '.join(str(error).split())}).") from error
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(settings.peft_type)
    if settings.peft_type not in PEFT_TYPE_TO_PREFIX_MAPPING or not hasattr(tuner, "merge_and_unload"):
        raise ValueError(f"{folder}: an adapter of kind {settings.peft_type} has no dense form and cannot be merged.")
    return settings


def _expected_tensors(folder: Path, settings: Any, config: PiscesConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what PEFT would save for these settings on this base; built on the meta device."""
    from peft import get_peft_model, get_peft_model_state_dict

    settings = copy.deepcopy(settings)  # PEFT notes there which model it was last put on
    settings.base_model_name_or_path = None
    with torch.device("meta"):
        model = PiscesForConditionalGeneration(config)
    try:
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this base ({' '.join(str(error).split())}).") from error
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _merge(source: Path, adapter: Path, tolerance: float) -> tuple[PiscesForConditionalGeneration, dict[str, float]]:
    """The merged model in fp32 and how far its outputs are from the adapter's.

    Raises:
        ValueError: further than `tolerance`.
    """
    from peft import PeftModel

    model, _ = load_model(source, device="cpu", dtype="float32")
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    probe = make_probe(model.config)
    vectors = draw_vectors(adapted, probe) if model.config.has_generation else None
    before = _outputs(adapted, probe, vectors)
    merged = adapted.merge_and_unload(progressbar=True, safe_merge=True)
    after = _outputs(merged, probe, vectors)
    differences = {name: largest_difference(after[name], before[name]) for name in before}
    for name, difference in differences.items():
        if difference > tolerance:
            raise ValueError(
                f"{adapter}: adapter and merged model differ by {difference:.1e} in {name}, more than {tolerance:g} "
                "of the largest value. Nothing was written."
            )
    return merged, differences


def _outputs(model: Any, probe: dict[str, torch.Tensor], vectors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    outputs = {"text logits": text_logits(model, probe)}
    return outputs if vectors is None else outputs | {"drawn vectors": predict_vectors(model, probe, vectors)}


def _plan(
    base: Mapping[str, SourceTensor], merged: PiscesForConditionalGeneration
) -> tuple[list[PlannedTensor], list[str]]:
    """Where each tensor of the new folder comes from, and which ones the adapter changed.

    Raises:
        ValueError: the merge untied an `lm_head` that the base does not store.
    """
    state = merged.state_dict()
    tied = state.keys() - base.keys()
    embedding = merged.get_input_embeddings().weight
    for name in sorted(tied):
        if name != "lm_head.weight" or not torch.equal(state[name], embedding):
            raise ValueError(
                f"{name}: the adapter trained it apart from the embedding that it is tied to, and the base has "
                "tie_word_embeddings=True. Such an adapter has no place in a tied checkpoint."
            )
    plan, changed = [], []
    for name, source in tqdm(base.items(), desc="comparing", unit=" tensors"):
        value = state[name]
        if torch.equal(value, source.load().to(value.dtype)):
            plan.append(PlannedTensor(name, source=source, part="base"))
        else:
            plan.append(PlannedTensor(name, tensor=value.to(DTYPES[source.dtype]), part="adapter"))
            changed.append(name)
    return plan, changed


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("merge_adapter", "Merge a PEFT adapter into its base, and check that nothing else changed.")
    parser.add_argument("--base", required=True, metavar="PISCES", help="checkpoint that the adapter was trained on")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--adapter_revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument(
        "--tolerance",
        type=finite_number(0, 1000),
        default=TOLERANCE,
        help="largest difference between adapter and merged model in fp32, relative (default: %(default)g)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    merge_adapter(**options)


if __name__ == "__main__":
    run_command(main)
