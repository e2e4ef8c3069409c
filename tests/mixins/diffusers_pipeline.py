"""`PiscesPipeline` in diffusers' common pipeline tests. Copied and run by `run_diffusers_mixins.py`, not by `make test`."""

import unittest

import torch
from diffusers import DDIMScheduler
from diffusers.utils import is_scipy_available

from modeling_pisces import PiscesPipeline
from tests.fixtures import make_model, make_processor
from tests.modeling_pisces.pipeline.pipeline_fixtures import make_unet, make_vae, vectors

from ..pipeline_params import TEXT_TO_IMAGE_BATCH_PARAMS, TEXT_TO_IMAGE_IMAGE_PARAMS, TEXT_TO_IMAGE_PARAMS
from ..test_pipelines_common import PipelineKarrasSchedulerTesterMixin, PipelineLatentTesterMixin, PipelineTesterMixin


# ready vectors are called image_vectors here, and there are no attention processors to pass settings to
ABSENT = {"prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs"}


class PiscesPipelineTest(
    PipelineLatentTesterMixin, PipelineKarrasSchedulerTesterMixin, PipelineTesterMixin, unittest.TestCase
):
    pipeline_class = PiscesPipeline
    params = TEXT_TO_IMAGE_PARAMS - ABSENT
    batch_params = TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = TEXT_TO_IMAGE_IMAGE_PARAMS
    image_latents_params = TEXT_TO_IMAGE_IMAGE_PARAMS
    callback_cfg_params = frozenset()  # the negative side is no part of the tensors that callbacks see

    def get_dummy_components(self):
        return {
            "unet": make_unet(),
            "scheduler": DDIMScheduler(),
            "vae": make_vae(),
            "vision_language_model": make_model(),
            "processor": make_processor(),
        }

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a red cube",
            "generator": torch.Generator("cpu").manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "output_type": "np",
        }

    def test_save_load_optional_components(self):
        """Without VAE, language model and processor: a decoder on pixels that draws from vectors."""
        unet = make_unet(in_channels=3, out_channels=3)
        absent = dict.fromkeys(PiscesPipeline._optional_components)
        inputs = {name: value for name, value in self.get_dummy_inputs("cpu").items() if name != "prompt"}
        inputs |= {"image_vectors": vectors(), "negative_image_vectors": vectors(seed=1)}
        self.get_dummy_components = lambda: {"unet": unet, "scheduler": DDIMScheduler(), **absent}
        self.get_dummy_inputs = lambda device, seed=0: {**inputs, "generator": torch.Generator().manual_seed(seed)}
        super().test_save_load_optional_components()

    @unittest.skipUnless(is_scipy_available(), "one of the schedulers, LMSDiscreteScheduler, needs scipy")
    def test_karras_schedulers_shape(self):
        super().test_karras_schedulers_shape()

    @unittest.skip("finds the text half by names with 'text' or 'tokenizer'; test_pipeline_prompts.py tests the same")
    def test_encode_prompt_works_in_isolation(self):
        pass
