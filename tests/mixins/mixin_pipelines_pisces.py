"""Our model in transformers' tests of its pipelines. Copied and run by `run_mixins.py`, which needs a checkout for it.

`PipelineTesterMixin` takes its models from the Hub; these are the same tests on a tiny model made on the spot.
"""

import unittest
from unittest import mock

from fixtures import make_model, make_processor
from transformers.pipelines import any_to_any

# the modules, not the classes, which pytest would collect here once more, with their models from the Hub
from ...pipelines import test_pipelines_any_to_any, test_pipelines_image_text_to_text


class PiscesPipelineTest(unittest.TestCase):
    def setUp(self):
        self.processor = make_processor()
        self.processor.tokenizer.image_token = self.processor.image_token  # where the pipeline tests look for it

    def run_pipeline_tests(self, tests: unittest.TestCase):
        parts = {"tokenizer": self.processor.tokenizer, "image_processor": self.processor.image_processor}
        pipe, examples = tests.get_test_pipeline(make_model(), processor=self.processor, **parts)
        tests.run_pipeline_test(pipe, examples)

    def test_image_text_to_text(self):
        self.run_pipeline_tests(test_pipelines_image_text_to_text.ImageTextToTextPipelineTests())

    def test_any_to_any(self):
        # its chat writes parts of type "images", which the library's own templates pass over and ours refuses by name;
        # chats with pictures are in test_transformers_pipelines.py
        self.processor.chat_template = None
        with mock.patch.object(any_to_any, "requires_backends"):  # it asks for torchvision, which reads videos only
            self.run_pipeline_tests(test_pipelines_any_to_any.AnyToAnyPipelineTests())
