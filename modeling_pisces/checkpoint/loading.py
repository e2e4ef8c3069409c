"""Loads a checked checkpoint folder whole: every weight accounted for, on the right device, ready to answer or draw.

The console command and the demonstration call it. It goes through the Auto classes and `PiscesPipeline` like any user
would, and adds one thing: a weight that the file lacks is an error here, where the libraries would start it at random.
"""

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForMultimodalLM, AutoProcessor, ImageProcessingMixin
from transformers.utils import logging

from .chat_template import check_chat_template
from .files import DECODER_PARTS, check_checkpoint, read_config
from .values import (
    check_generation_values,
    check_part_settings,
    check_picture_sizes,
    check_processor,
    check_text_length,
    check_tokens,
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' loading reports and deprecations; show every other warning as one line.

    What the reports would say about a wrong load stops in `load_model`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def choose_device(name: str = "auto") -> torch.device:
    """Turn "auto" into the best device of this machine; refuse one that it does not have."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not has_mps):
        raise ValueError(f"--device {name}: this machine or this build of torch has none. Use --device auto or cpu.")
    return torch.device(name)


def load_model(
    folder: Path, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load the whole model and its processor from a folder, in evaluation mode.

    Args:
        folder: a checkpoint folder.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        trust_remote_code: allow Python code from the folder.

    Raises:
        ValueError: `check_checkpoint` refuses the folder, the processor or the model cannot be built from it, or
            weights are missing or misshapen.
    """
    torch_device, folder = choose_device(device), Path(folder)
    check_checkpoint(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each sub-processor has its own errors; all mean that a file here is wrong
        raise ValueError(f"{folder}: the processor cannot be built ({_one_line(error)}).") from error
    check_processor(folder, processor, read_config(folder))
    check_text_length(folder, processor.tokenizer)
    check_tokens(folder, processor)
    try:
        check_chat_template(processor)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    try:
        model, report = AutoModelForMultimodalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,  # a pickle beside them is never read
        )
    except Exception as error:  # of the libraries, of a quantizer that is not installed, of safetensors: all mean this
        raise ValueError(f"{folder}: the model cannot be loaded ({_one_line(error)}).") from error
    _check_loading_report(folder, report)
    check_picture_sizes(folder, processor, model.config)
    check_generation_values(folder, model.generation_config)
    # the processor refuses longer prompts; beyond its positions a language model answers nonsense without a word
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, context or sys.maxsize)
    return model.to(torch_device).eval(), processor


def _check_loading_report(folder: Path, report: dict[str, Any]) -> None:
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in report.get(problem) or ())
        if keys:
            raise ValueError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')} in the weights, the first is {keys[0]}. "
                "The weights do not belong to this config.json; download or save the checkpoint again."
            )


def load_image_processor(source: str | Path, revision: str | None = None) -> Any:
    """The image processor of a folder or Hub id; `AutoImageProcessor` without its need for torchvision before 5.19.

    Raises:
        ImportError: the class has no twin that does without torchvision.
        OSError, ValueError: there is no image processor, or none that transformers knows.
    """
    try:
        return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except ImportError:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        name = settings.get("image_processor_type", "").removesuffix("Fast").removesuffix("Pil")
        twin = getattr(transformers, f"{name}Pil", None)
        if twin is None:
            raise
        return twin.from_pretrained(source, revision=revision)


def load_pipeline(folder: Path, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """Load the drawing pipeline with its model and processor; arguments and errors as in `load_model`."""
    try:
        from diffusers.utils import logging as diffusers_logging
    except ImportError as error:
        raise ValueError(
            f"drawing needs diffusers ({error}). Install it: pip install 'modeling-pisces[draw]'."
        ) from error
    from ..pipeline_pisces import PiscesPipeline

    if not logging.is_progress_bar_enabled():
        diffusers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()  # its report of a wrong load runs over a screen; the error is below
    model, processor = load_model(folder, device, dtype, trust_remote_code)
    try:
        pipeline = PiscesPipeline.from_pretrained(
            folder, vision_language_model=model, processor=processor, dtype=model.dtype, use_safetensors=True
        )
        pipeline = pipeline.to(model.device)  # fails for a weight that the files lack; diffusers leaves it empty
        copy.deepcopy(pipeline.scheduler).set_timesteps(2)  # a setting that no scheduler knows fails only here
    except Exception as error:  # as above, and diffusers' own
        raise ValueError(f"{folder}: the decoder cannot be loaded ({_one_line(error)}).") from error
    for name in DECODER_PARTS:
        if (part := getattr(pipeline, name)) is not None:
            check_part_settings(folder / name, part)
    if processor.tokenizer.pad_token is None:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: pad_token is not set, without which nothing is drawn.")
    pipeline.set_progress_bar_config(disable=None, leave=False)  # None: only where a person watches
    return pipeline


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
