"""Makes an installed `modeling_pisces` known to vLLM: the entry point of the group `vllm.general_plugins`.

vLLM loads it in every process, whatever model is served, so this file stands outside the package and imports nothing:
torch, transformers and vLLM come in when `register` runs. Pisces then runs on vLLM's Transformers modeling backend,
which wraps `PiscesModel` and needs no code of ours; what it asks of model and processor is held by
tests/modeling_pisces/hub/test_serving_engines.py.
"""

import logging


ARCHITECTURE = "PiscesForConditionalGeneration"
BACKEND = "TransformersMultiModalForCausalLM"  # vLLM's name for "images and text in, text out"; read in 0.33.0

logger = logging.getLogger(__name__)


def register() -> None:
    """Register Pisces with transformers' Auto classes and with vLLM's registry of models; again is the same as once.

    Quiet where vLLM is missing. Never raises for what is installed: vLLM calls it unguarded, also for other models.
    """
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    known = ModelRegistry.get_supported_archs()
    if BACKEND not in known:
        logger.warning("Pisces is not registered: this vLLM has no %s. Upgrade vLLM.", BACKEND)
        return
    try:
        import modeling_pisces  # noqa: F401  -- registers configuration, model and processor with transformers
    except ImportError as error:
        logger.warning("Pisces is not registered: modeling_pisces cannot be imported here (%s).", error)
        return
    if ARCHITECTURE not in known:
        ModelRegistry.register_model(ARCHITECTURE, f"vllm.model_executor.models.transformers:{BACKEND}")
