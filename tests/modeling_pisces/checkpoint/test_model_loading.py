"""Claims about `modeling_pisces.checkpoint.loading` that no command's tests make."""

import json

import pytest
from transformers import SiglipImageProcessorPil

from modeling_pisces.checkpoint import loading
from modeling_pisces.checkpoint.loading import load_image_processor


@pytest.fixture
def auto_class_wants_torchvision(monkeypatch):
    """As in transformers before 5.19 where torchvision is not installed."""

    class StandIn:
        @staticmethod
        def from_pretrained(*_, **__):
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(loading, "AutoImageProcessor", StandIn)


def test_an_image_processor_loads_where_the_auto_class_wants_torchvision(tmp_path, auto_class_wants_torchvision):
    saved = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    saved.save_pretrained(tmp_path)
    assert dict(load_image_processor(tmp_path).size) == {"height": 40, "width": 40}


def test_a_class_without_a_twin_still_says_what_it_needs(tmp_path, auto_class_wants_torchvision):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "UnknownImageProcessor"}))
    with pytest.raises(ImportError, match="requires the Torchvision library"):
        load_image_processor(tmp_path)
