"""Pisces: one model that understands images and draws them, as a Hugging Face package.

Importing this package registers its classes with the Auto classes of transformers. The diffusers pipeline is imported
on first use, so that understanding never loads diffusers.
"""

from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_pisces import PiscesConfig, PiscesGenVisionConfig
from .generation_pisces import PiscesGenerateOutput
from .image_loading_pisces import load_image
from .modeling_pisces import (
    PISCES_PEFT_EXCLUDE_MODULES,
    PISCES_QUANT_SKIP_MODULES,
    PiscesForConditionalGeneration,
    PiscesModel,
)
from .modeling_pisces_gen_vision import PiscesGenVisionModel, pool_patches
from .processing_pisces import PiscesProcessor


if TYPE_CHECKING:
    from .pipeline_pisces import PiscesPipeline

__version__ = "0.1.0"

AutoConfig.register("pisces", PiscesConfig, exist_ok=True)
AutoConfig.register("pisces_gen_vision", PiscesGenVisionConfig, exist_ok=True)
AutoModel.register(PiscesConfig, PiscesModel, exist_ok=True)
AutoModel.register(PiscesGenVisionConfig, PiscesGenVisionModel, exist_ok=True)
AutoModelForCausalLM.register(PiscesConfig, PiscesForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(PiscesConfig, PiscesForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(PiscesConfig, PiscesForConditionalGeneration, exist_ok=True)
AutoProcessor.register(PiscesConfig, PiscesProcessor, exist_ok=True)


def __getattr__(name: str):
    if name == "PiscesPipeline":
        from .pipeline_pisces import PiscesPipeline

        return PiscesPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PISCES_PEFT_EXCLUDE_MODULES",
    "PISCES_QUANT_SKIP_MODULES",
    "PiscesConfig",
    "PiscesForConditionalGeneration",
    "PiscesGenVisionConfig",
    "PiscesGenVisionModel",
    "PiscesGenerateOutput",
    "PiscesModel",
    "PiscesPipeline",
    "PiscesProcessor",
    "load_image",
    "pool_patches",
]
