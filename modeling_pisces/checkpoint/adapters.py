"""Finds trained adapters, checks them, and puts them on a loaded Pisces: on its language model, its decoder, or both.

An adapter folder holds PEFT's files (`adapter_config.json`, `adapter_model.safetensors`) for the language model,
diffusers' (`pytorch_lora_weights.safetensors`) for the decoder's U-Net, or both. The console command, the
demonstration and the evaluations call `find_model` with what a user typed, load the checkpoint it names, and hand the
result to `attach_adapters`. Nothing here trains or merges.
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .files import StoredTensor, find_checkpoint, read_json, read_safetensors_header
from .safety import check_files


MODEL_CONFIG, MODEL_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DECODER_WEIGHTS = "pytorch_lora_weights.safetensors"


class Adapter(NamedTuple):
    """An adapter folder that was found and checked.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        sides: "language model", "decoder" or both.
        base: the checkpoint that it was trained on, as the folder names it; None if it does not say.
    """

    name: str
    folder: Path
    sides: tuple[str, ...]
    base: str | None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no checkpoint of its own."""
    return not (folder / "config.json").exists() and any(
        (folder / name).exists() for name in (MODEL_CONFIG, DECODER_WEIGHTS)
    )


def find_adapter(name: str, revision: str | None = None) -> Adapter:
    """The adapter that `name` means: a folder or a Hub id, of which `@` may name a branch, tag or commit.

    Raises:
        ValueError: there is no such folder, or it holds no whole adapter as safetensors.
    """
    source, _, version = name.partition("@") if not Path(name).exists() else (name, "", "")
    folder = find_checkpoint(source, version or revision)
    check_files(folder)
    sides = []
    if (folder / MODEL_CONFIG).is_file():
        _check_config(read_json(folder / MODEL_CONFIG), folder / MODEL_CONFIG)
        if not (folder / MODEL_WEIGHTS).is_file():
            raise ValueError(f"{name}: {MODEL_CONFIG} without {MODEL_WEIGHTS}. Download or train the adapter again.")
        read_safetensors_header(folder / MODEL_WEIGHTS)
        sides.append("language model")
    if (folder / DECODER_WEIGHTS).is_file():
        read_safetensors_header(folder / DECODER_WEIGHTS)
        sides.append("decoder")
    if not sides:
        what = "a whole checkpoint: give it with --model" if (folder / "config.json").is_file() else "no adapter"
        raise ValueError(
            f"--adapter {name}: {what}. Expected {MODEL_CONFIG} with {MODEL_WEIGHTS}, or {DECODER_WEIGHTS}."
        )
    return Adapter(name, folder, tuple(sides), _base_of(folder))


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse settings with which PEFT loads other adapters, or imports a module that the file names."""
    for name, what in (("adapters", "loads other adapters by name"), ("megatron_config", "imports another library")):
        if config.get(name):
            raise ValueError(
                f"{path}: {name} is {config[name]!r:.80}, which {what}. Remove it, or take an adapter of another kind."
            )


def _base_of(folder: Path) -> str | None:
    if (folder / MODEL_CONFIG).is_file():
        return read_json(folder / MODEL_CONFIG).get("base_model_name_or_path")
    if not (card := folder / "README.md").is_file():
        return None
    found = re.search(r"^base_model:\s*['\"]?([^'\"\n]+)", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return found[1].strip() if found else None


def find_model(
    name: str, adapters: Sequence[str] = (), revision: str | None = None
) -> tuple[Path, tuple[Adapter, ...]]:
    """The checkpoint folder and the adapters that a user means.

    An adapter in place of a checkpoint brings its base along; a line on standard error says so.

    Args:
        name: checkpoint or adapter, a folder or a Hub id.
        adapters: more of them, in the order in which they are attached.
        revision: of `name`, if that is a Hub id.

    Raises:
        ValueError: something of it cannot be found, or an adapter does not say what its base is.
    """
    folder = find_checkpoint(name, revision)
    found = tuple(find_adapter(adapter) for adapter in adapters)
    if not is_adapter(folder):
        return folder, found
    first = find_adapter(str(folder))._replace(name=name)
    if not first.base:
        raise ValueError(f"{name} is an adapter and does not name its base. Give both: --model BASE --adapter {name}.")
    try:
        base = find_checkpoint(first.base)
    except ValueError as error:
        raise ValueError(
            f"{name} is an adapter for {first.base}, which cannot be found ({error}) Give both: --model BASE "
            f"--adapter {name}."
        ) from error
    print(f"{name} is an adapter; its base {first.base} is loaded with it", file=sys.stderr)
    return base, (first, *found)


class AttachedAdapters:
    """Adapters on a loaded model; `with attached.off():` is the base again."""

    def __init__(self, peft_model: Any = None, pipeline: Any = None):
        self.peft_model, self.pipeline = peft_model, pipeline

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block every adapter is switched off."""
        if self.pipeline is not None:
            self.pipeline.disable_lora()
        try:
            if self.peft_model is None:
                yield
            else:
                with self.peft_model.disable_adapter():
                    yield
        finally:
            if self.pipeline is not None:
                self.pipeline.enable_lora()


class AdapterChoices:
    """Adapters on a loaded model of which one acts at a time, or none.

    Args:
        places: name -> what its sides are called in PEFT and in the pipeline; None for a side that it lacks.
    """

    def __init__(self, places: Mapping[str, tuple[str | None, str | None]], peft_model: Any, pipeline: Any):
        self.places, self.peft_model, self.pipeline = places, peft_model, pipeline

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Inside the block the adapter of this name acts; None is the base."""
        for_model, for_decoder = (None, None) if name is None else self.places[name]
        if self.pipeline is not None:
            if for_decoder is None:
                self.pipeline.disable_lora()
            else:
                self.pipeline.enable_lora()
                self.pipeline.set_adapters([for_decoder])
        if for_model is not None:
            self.peft_model.set_adapter(for_model)
        with nullcontext() if self.peft_model is None or for_model else self.peft_model.disable_adapter():
            yield


def attach_choices(adapters: Mapping[str, Adapter], model: Any, pipeline: Any = None) -> AdapterChoices:
    """Put adapters on a model to choose from; arguments and errors as those of `attach_adapters`.

    Args:
        adapters: name -> adapter. None of them acts before `use`.
    """
    for_model = [adapter for adapter in adapters.values() if "language model" in adapter.sides]
    for_decoder = [a for a in adapters.values() if "decoder" in a.sides and pipeline is not None]
    peft_model = _attach_to_model(for_model, model, together=False) if for_model else None
    _attach_to_decoder(for_decoder, pipeline)
    places = {name: (_place(adapter, for_model), _place(adapter, for_decoder)) for name, adapter in adapters.items()}
    return AdapterChoices(places, peft_model, pipeline if for_decoder else None)


def _place(adapter: Adapter, side: Sequence[Adapter]) -> str | None:
    return f"adapter_{side.index(adapter)}" if adapter in side else None


def attach_adapters(adapters: Sequence[Adapter], model: Any, pipeline: Any = None) -> AttachedAdapters:
    """Put adapters on a model, and on the pipeline around it where they have a part for the decoder.

    Several add up. A side that this use does not need is named in a warning and left out.

    Args:
        adapters: from `find_adapter` or `find_model`.
        model: a `PiscesForConditionalGeneration`; it is changed in place.
        pipeline: the `PiscesPipeline` around it; None where nothing is drawn.

    Raises:
        ValueError: PEFT is missing, or an adapter does not fit this checkpoint.
    """
    for_model = [adapter for adapter in adapters if "language model" in adapter.sides and model is not None]
    for_decoder = [adapter for adapter in adapters if "decoder" in adapter.sides]
    peft_model = _attach_to_model(for_model, model) if for_model else None
    if pipeline is None:
        for adapter in for_decoder:
            print(
                f"warning: the decoder's part of {adapter.name} has no effect here: nothing is drawn", file=sys.stderr
            )
        return AttachedAdapters(peft_model)
    names = _attach_to_decoder(for_decoder, pipeline)
    if names:
        pipeline.set_adapters(names)
    return AttachedAdapters(peft_model, pipeline if names else None)


def _attach_to_decoder(adapters: Sequence[Adapter], pipeline: Any) -> list[str]:
    names = []
    for number, adapter in enumerate(adapters):
        names.append(f"adapter_{number}")
        with _peft_warnings():
            pipeline.load_lora_weights(adapter.folder, adapter_name=names[-1], weight_name=DECODER_WEIGHTS)
    return names


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def _peft_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Catches what PEFT warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _attach_to_model(adapters: Sequence[Adapter], model: Any, together: bool = True) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"--adapter {adapters[0].name}: needs the package peft. Install it: pip install peft"
        ) from error
    peft_model, names = None, []
    for number, adapter in enumerate(adapters):
        _check_finite(adapter)
        names.append(f"adapter_{number}")
        try:
            with _peft_warnings() as caught:
                if peft_model is None:
                    peft_model = PeftModel.from_pretrained(model, adapter.folder, adapter_name=names[0])
                else:
                    peft_model.load_adapter(adapter.folder, adapter_name=names[-1])
            wrong = next((str(item.message) for item in caught if "adapter keys" in str(item.message)), None)
            if wrong:
                raise RuntimeError(wrong)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"--adapter {adapter.name}: does not fit this checkpoint ({reason:.200}). It was trained on "
                f"{adapter.base or 'another base'}; give that one with --model."
            ) from error
    assert peft_model is not None, "called with at least one adapter"
    if len(names) > 1 and together:
        try:
            peft_model.base_model.set_adapter(names)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{len(names)} adapters of the language model cannot act together ({reason:.200}). Those with copies "
                "of whole modules (--flavour full) go one at a time: merge one, conversion.merge_adapter."
            ) from error
    peft_model.eval()
    return peft_model


def _check_finite(adapter: Adapter) -> None:
    from safetensors import safe_open

    with safe_open(adapter.folder / MODEL_WEIGHTS, framework="pt") as file:
        for name in file.keys():
            if not file.get_tensor(name).isfinite().all():
                raise ValueError(f"--adapter {adapter.name}: {name} holds NaN or infinity. Train it again.")


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Sum up an adapter as plain data for JSON, from its configuration and the headers of its files."""
    info: dict[str, Any] = {"name": adapter.name, "path": str(adapter.folder), "base": adapter.base, "sides": {}}
    if "language model" in adapter.sides:
        config = read_json(adapter.folder / MODEL_CONFIG)
        info["sides"]["language model"] = {
            "type": config.get("peft_type"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "whole_modules": sorted(config.get("modules_to_save") or []),
            **_sizes(read_safetensors_header(adapter.folder / MODEL_WEIGHTS)),
        }
    if "decoder" in adapter.sides:
        tensors = read_safetensors_header(adapter.folder / DECODER_WEIGHTS)
        info["sides"]["decoder"] = {"type": "LORA", **_sizes(tensors)}
    return info


def _sizes(tensors: Sequence[StoredTensor]) -> dict[str, int]:
    return {
        "num_tensors": len(tensors),
        "num_parameters": sum(tensor.num_elements for tensor in tensors),
        "num_bytes": sum(tensor.num_bytes for tensor in tensors),
    }


def format_adapter(info: dict[str, Any]) -> str:
    """Lay out what `describe_adapter` found for a reader at a terminal."""
    lines = [f"adapter {info['name']}, for {info['base'] or 'a base that it does not name'}"]
    for side, facts in info["sides"].items():
        rank = f" of rank {facts['rank']}, alpha {facts['alpha']}" if facts.get("rank") else ""
        copies = f", with whole copies of {', '.join(facts['whole_modules'])}" if facts.get("whole_modules") else ""
        kind = str(facts["type"]).replace("LORA", "LoRA")
        size = f"{facts['num_parameters']:,} parameters, {facts['num_bytes'] / 2**20:.2f} MiB"
        lines.append(f"  {side:<15} {kind}{rank}{copies}; {size}")
    return "\n".join(lines)
