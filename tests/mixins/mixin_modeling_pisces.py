"""Our classes in transformers' common model and config tests. Copied and run by `run_mixins.py`, not by `make test`."""

import unittest

import torch
from fixtures import make_config
from transformers.models.auto import modeling_auto

from modeling_pisces import (
    PiscesConfig,
    PiscesForConditionalGeneration,
    PiscesGenVisionConfig,
    PiscesGenVisionModel,
    PiscesModel,
)

from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


torch.set_num_threads(2)
HAS_GENERATION_TESTS = hasattr(GenerationTesterMixin, "test_greedy_generate")
UNPADDED_ROWS = "joins rows of ids and leaves their images as they were; test_packed_rows.py tests joined rows"
NO_GENERATION_TESTS = "GenerationTesterMixin is not in the source distribution; give --source a checkout"
# random ids without placeholders: those need an image each
test_modeling_common.ids_tensor = lambda shape, vocab_size, *args: ids_tensor(shape, min(vocab_size, 250), *args)
# the common tests make labels by class name
NAME = "PiscesForConditionalGeneration"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["pisces"] = NAME
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["pisces"] = NAME
modeling_auto.MODEL_MAPPING_NAMES["pisces"] = "PiscesModel"  # these two have no loss
modeling_auto.MODEL_MAPPING_NAMES["pisces_gen_vision"] = "PiscesGenVisionModel"


class PiscesModelTester:
    """A batch of rows that each show one image and draw one."""

    batch_size = 7  # some tests fill a batch up to 7 rows with random ids, which would then lack their images
    seq_length = 23
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    image_size = 12
    num_image_tokens = 9
    has_images = True
    use_cache = None  # on the whole config, where some tests look for it

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> PiscesConfig:
        config = make_config()
        if self.use_cache is not None:
            config.use_cache = self.use_cache
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = torch.randint(0, 250, (self.batch_size, self.seq_length))
        if not self.has_images:
            return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids[:, 1:10] = config.image_token_id
        ids[:, 12] = config.gen_start_token_id
        ids[:, 13:17] = config.gen_image_token_id
        ids[:, 17] = config.gen_end_token_id
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": floats_tensor([self.batch_size, 3, 12, 12]),
            "gen_pixel_values": floats_tensor([self.batch_size, 3, 16, 16]),
        }
        return config, inputs


class PiscesModelWithNumberMask(PiscesModel):
    """`gen_image_mask` as numbers, for a test that subtracts everything it compares."""

    def forward(self, *args, return_dict: bool | None = None, **kwargs):
        outputs = super().forward(*args, return_dict=True, **kwargs)
        outputs.gen_image_mask = outputs.gen_image_mask.int()
        return outputs.to_tuple() if return_dict is False else outputs


class PiscesModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (PiscesModel, PiscesForConditionalGeneration)
    all_generative_model_classes = (PiscesForConditionalGeneration,)
    test_all_params_have_gradient = False  # the generation tower is frozen by construction
    additional_model_inputs = ("pixel_values", "gen_pixel_values")
    _is_composite = True

    def setUp(self):
        self.model_tester = PiscesModelTester(self)
        self.config_tester = ConfigTester(self, config_class=PiscesConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self):
        """As it stands, with the one bool output as numbers, because the common test subtracts what it compares."""
        self.all_model_classes = (PiscesModelWithNumberMask, PiscesForConditionalGeneration)
        super().test_model_outputs_equivalence()

    @unittest.skipUnless(HAS_GENERATION_TESTS, NO_GENERATION_TESTS)
    def test_generation_tester_mixin_inheritance(self):
        super().test_generation_tester_mixin_inheritance()

    @unittest.skip(reason="is for models of one part; test_sdpa_can_dispatch_composite_models is the one for Pisces")
    def test_sdpa_can_dispatch_non_composite_models(self):
        pass

    @unittest.skipUnless(HAS_GENERATION_TESTS, NO_GENERATION_TESTS)
    def test_generate_from_random_inputs_embeds(self):
        """As it stands, on rows without pictures: embeddings of placeholders whose pictures are missing are refused."""
        self.model_tester.has_images = False
        super().test_generate_from_random_inputs_embeds()

    @unittest.skipUnless(HAS_GENERATION_TESTS, NO_GENERATION_TESTS)
    def test_generate_continue_from_inputs_embeds(self):
        """As it stands, without pictures; it looks for `use_cache` on the whole config, and ours is in `text_config`."""
        self.model_tester.has_images = False
        self.model_tester.use_cache = True
        super().test_generate_continue_from_inputs_embeds()

    @unittest.skip(reason=UNPADDED_ROWS)
    def test_sdpa_padding_matches_padding_free_with_position_ids(self):
        pass

    @unittest.skip(reason=UNPADDED_ROWS)
    def test_eager_padding_matches_padding_free_with_position_ids(self):
        pass


class PiscesGenVisionModelTester:
    batch_size = 3
    seq_length = 17  # 16 patches and a class token
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 20

    def __init__(self, parent):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self):
        config = make_config().gen_vision_config
        return config, {"pixel_values": floats_tensor([self.batch_size, 3, 16, 16])}


class PiscesGenVisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (PiscesGenVisionModel,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = PiscesGenVisionModelTester(self)
        self.config_tester = ConfigTester(self, config_class=PiscesGenVisionConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="a vision tower has no input ids")
    def test_inputs_embeds(self):
        pass

    @unittest.skip(reason="is for models of several parts; test_sdpa_can_dispatch_non_composite_models is the tower's")
    def test_sdpa_can_dispatch_composite_models(self):
        pass

    @unittest.skip(reason="the tower has no plan of tensor parallelism: it is frozen, and every rank keeps all of it")
    def test_tp_plan_matches_params(self):
        pass

    @unittest.skip(reason="a vision tower reads its images in one step and keeps no cache")
    def test_bc_cache_name_forward(self):
        pass

    @unittest.skip(reason="expects nn.Embedding; a vision tower embeds with a convolution, as CLIP's and SigLIP's do")
    def test_model_get_set_embeddings(self):
        pass
