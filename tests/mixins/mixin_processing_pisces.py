"""`PiscesProcessor` in transformers' common processor tests. Copied and run by `run_mixins.py`, not by `make test`."""

import unittest

from fixtures import make_processor, make_tokenizer

from modeling_pisces import PiscesProcessor

from ...test_processing_common import ProcessorTesterMixin


class PiscesProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PiscesProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return make_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return make_processor().image_processor

    @classmethod
    def _setup_gen_image_processor(cls):
        return make_processor().gen_image_processor

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": 9, "num_gen_image_tokens": 4}

    def get_component(self, attribute, **kwargs):
        if attribute == "gen_image_processor":
            return make_processor().gen_image_processor
        return super().get_component(attribute, **kwargs)

    @unittest.skip(reason="adds up the inputs of one image processor; ours has a second one, for gen_pixel_values")
    def test_model_input_names(self):
        pass

    @unittest.skip(reason="knows one image processor by name; that ours keeps both is in test_processor.py")
    def test_processor_from_and_save_pretrained_as_nested_dict(self):
        pass
