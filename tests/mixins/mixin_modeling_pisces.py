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
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


torch.set_num_threads(2)
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

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> PiscesConfig:
        return make_config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = torch.randint(0, 250, (self.batch_size, self.seq_length))
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


class PiscesModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (PiscesModel, PiscesForConditionalGeneration)
    test_all_params_have_gradient = False  # the generation tower is frozen by construction
    additional_model_inputs = ("pixel_values", "gen_pixel_values")
    _is_composite = True

    def setUp(self):
        self.model_tester = PiscesModelTester(self)
        self.config_tester = ConfigTester(self, config_class=PiscesConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="GenerationTesterMixin is not in the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip(reason="compares outputs by subtraction, which the bool tensor gen_image_mask does not have")
    def test_model_outputs_equivalence(self):
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

    @unittest.skip(reason="expects nn.Embedding; a vision tower embeds with a convolution, as CLIP's and SigLIP's do")
    def test_model_get_set_embeddings(self):
        pass
