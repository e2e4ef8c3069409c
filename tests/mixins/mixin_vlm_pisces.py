"""Our model in transformers' tests of vision-language models. Copied and run by `run_mixins.py`, which needs a checkout.

`VLMModelTest` is the common tests, which stand in `mixin_modeling_pisces.py`, and one of its own, which is run here.
"""

import unittest

from modeling_pisces import PiscesForConditionalGeneration, PiscesModel

from ...vlm_tester import VLMModelTest
from .test_modeling_pisces import PiscesModelTester


class ShownImagesTester(PiscesModelTester):
    """Rows that show an image and draw none: the test takes images away by the name of `pixel_values` only."""

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        del inputs["gen_pixel_values"]
        inputs["input_ids"][:, 13:17] = 5
        return config, inputs


class PiscesVLMTest(unittest.TestCase):
    all_model_classes = (PiscesModel, PiscesForConditionalGeneration)

    def setUp(self):
        self.model_tester = ShownImagesTester(self)

    test_mismatching_num_image_tokens = VLMModelTest.test_mismatching_num_image_tokens
