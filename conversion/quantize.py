"""Quantizes the language model inside a Pisces checkpoint and leaves everything around it as it is.

`python -m conversion.quantize --checkpoint PISCES --method bnb_nf4 --output FOLDER`. Projectors, head, both towers and
`lm_head` stay in their dtype: what they round, every drawn vector carries on. Training scripts call
`quantization_config(method)` and give it to `from_pretrained`, for QLoRA on a 4-bit language model. bitsandbytes and
torchao are optional; only the package of the method that is asked for is imported.
"""

import argparse
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, BitsAndBytesConfig, TorchAoConfig

from conversion.checks.probe import largest_difference, make_probe, text_logits
from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import carry_files, carry_provenance, check_output, new_folder
from modeling_pisces import PISCES_QUANT_SKIP_MODULES
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_json


QUANTIZED_PART = "model.language_model."
# relative to the largest logit. Measured: 0 for all methods on the CPU; room for kernels that add in another order
TOLERANCE = 1e-3


def _bnb_nf4(skipped: list[str]) -> BitsAndBytesConfig:
    # QLoRA's own settings (arXiv 2305.14314): normal floats, scales quantized once more, bf16 arithmetic
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def _bnb_int8(skipped: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


def _torchao_int8(skipped: list[str]) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def _torchao_fp8(skipped: list[str]) -> TorchAoConfig:
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=skipped)


@dataclass(frozen=True)
class Method:
    """One way to quantize: the package it needs, what it builds from the names to skip, and what it is for."""

    package: str
    build: Callable[[list[str]], Any]
    purpose: str


METHODS = {
    "bnb_nf4": Method("bitsandbytes", _bnb_nf4, "4 bits, for QLoRA and small GPUs"),
    "bnb_int8": Method("bitsandbytes", _bnb_int8, "8 bits with outliers in 16, LLM.int8()"),
    "torchao_int8": Method("torchao", _torchao_int8, "8-bit weights, compiles well"),
    "torchao_fp8": Method("torchao", _torchao_fp8, "8-bit floating-point weights"),
}


def quantization_config(method: str) -> BitsAndBytesConfig | TorchAoConfig:
    """What `from_pretrained(..., quantization_config=...)` needs to quantize the language model and nothing else.

    Args:
        method: one of `METHODS`.

    Raises:
        ValueError: no such method, or its package is not installed.

    Example:
        >>> config = quantization_config("bnb_nf4")
        >>> model = AutoModelForMultimodalLM.from_pretrained("pisces", quantization_config=config)
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; expected one of {', '.join(METHODS)}.")
    package = METHODS[method].package
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"method {method} needs {package}, which is not installed. Run: pip install {package}")
    return METHODS[method].build(list(PISCES_QUANT_SKIP_MODULES))


def quantized_modules(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers whose weight is no longer a plain floating-point parameter."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        # bitsandbytes has parameters of integers, torchao tensors that call themselves bfloat16
        and (not module.weight.dtype.is_floating_point or type(module.weight.data) is not torch.Tensor)
    ]


def quantize(
    checkpoint: str | Path,
    output: str | Path,
    method: str,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint whose language model is quantized, and load it once to see that it computes the same.

    Args:
        checkpoint: folder or Hub id of a Pisces checkpoint in full precision.
        output: folder to write, with processor and decoder; whole or not there.
        method: one of `METHODS`.
        revision: branch, tag or commit of a Hub id.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        the path of `output`.

    Raises:
        ValueError: before anything is written: no such method, or no checkpoint to quantize. After it, and then
            nothing is left behind: the saved folder does not compute what the quantized model in memory does.
    """
    settings = quantization_config(method)
    check_output(output, overwrite)
    source = find_checkpoint(str(checkpoint), revision)
    check_checkpoint(source)
    if read_json(source / "config.json").get("quantization_config"):
        raise ValueError(f"{checkpoint}: is quantized already. Give the checkpoint in full precision.")
    model = _load(source, quantization_config=settings)
    names = check_quantized(model)
    with new_folder(output, overwrite) as folder:
        carry_files(source, folder)
        carry_provenance(source, folder, (f"{name}.weight" for name in names), f"quantized, {method}")
        # before its first forward pass: there, on CPUs with AVX512-BF16, bitsandbytes (0.50.2) repacks 4-bit weights,
        # and repacked ones are saved with other scales
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        difference = _compare(model, _load(folder))
        if difference > TOLERANCE:
            raise ValueError(
                f"{output}: the saved checkpoint computes other logits than the model in memory (largest relative "
                f"difference {difference:.1e}, tolerance {TOLERANCE}). Try another version of "
                f"{METHODS[method].package}."
            )
    print(f"{output}: {len(names)} linear layers of the language model as {method}; {_sizes(source, Path(output))}")
    print(f"saved, loaded again and compared: largest relative difference of the logits {difference:.1e}")
    return Path(output)


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto", **options).eval()


def check_quantized(model: torch.nn.Module) -> list[str]:
    """The quantized layers, which must be the linear layers of the language model and no others.

    Raises:
        ValueError: naming the first layer that is quantized and must not be, or the other way round.
    """
    names = quantized_modules(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected = [name for name in linears if name.startswith(QUANTIZED_PART)]
    if wrong := sorted(set(names) ^ set(expected)):
        found = "is" if wrong[0] in names else "is not"
        raise ValueError(
            f"{wrong[0]} {found} quantized; expected the linear layers of the language model and no others. The "
            "installed versions of transformers and the quantizer do not follow the list of names to skip."
        )
    return names


def _compare(model: Any, loaded: Any) -> float:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line per layer about the dtype of its inputs
    probe = {name: value.to(model.device) for name, value in make_probe(model.config).items()}
    return largest_difference(text_logits(loaded, probe).cpu(), text_logits(model, probe).cpu())


def _sizes(before: Path, after: Path) -> str:
    sizes = (sum(path.stat().st_size for path in folder.glob("model*.safetensors")) for folder in (before, after))
    return "{:,.1f} MB before, {:,.1f} MB now".format(*(size / 1e6 for size in sizes))


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("quantize", "Quantize the language model of a checkpoint; towers, projectors and head stay.")
    parser.add_argument("--checkpoint", required=True, metavar="PISCES", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    purposes = "; ".join(f"{name}: {method.purpose}" for name, method in METHODS.items())
    parser.add_argument("--method", required=True, choices=METHODS, help=purposes)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, Any] = vars(make_arguments().parse_args(arguments))
    quantize(**options)


if __name__ == "__main__":
    run_command(main)
