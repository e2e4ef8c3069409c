"""Claims about `evaluation.drawing.detectors`: tiny random models of each family, whose answers are bent to be known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from transformers import (
    CLIPConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from evaluation.drawing.detectors import COLORS, ColorClassifier, box_of, cut_out, load_detector
from evaluation.drawing.geneval_rules import Found
from tests.evaluation.drawing.tiny_clip import TEXT, VISION, write_clip, write_tokenizer
from tests.fixtures import make_model


PICTURE = Image.new("RGB", (48, 32), "white")
LABELS = {0: "person", 1: "mouse", 2: "diningtable"}


@pytest.fixture(scope="module")
def boxes_only(tmp_path_factory) -> str:
    """YOLOS with four queries that all see a mouse, surely, in one and the same box."""
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    config = YolosConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=[32, 48],
        num_detection_tokens=4,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        for head, bias in ((model.class_labels_classifier, [0, 50, 0, 0]), (model.bbox_predictor, [0, 0, 0, 0])):
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.copy_(torch.tensor(bias))
    folder = tmp_path_factory.mktemp("yolos")
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(folder)
    return str(folder)


def test_boxes_come_in_pixels_under_genevals_names(boxes_only):
    detect, commit = load_detector(boxes_only, None, ["computer mouse"], 0.3)
    objects = detect(PICTURE)
    assert [(item.name, round(item.score, 3), item.mask) for item in objects] == [("computer mouse", 1.0, None)] * 4
    # sigmoid(0) = 0.5 of the picture as centre and size: from a quarter to three quarters
    assert objects[0].box == pytest.approx((12, 8, 36, 24), abs=1e-4)
    assert commit is None


def test_a_class_that_the_detector_does_not_know_is_no_score_of_zero(boxes_only):
    classes = ["person", "computer mouse", "dining table", "bench", "zebra"]
    with pytest.raises(ValueError, match=r"does not know 2 of the 5 classes that the prompts ask for: bench, zebra"):
        load_detector(boxes_only, None, classes, 0.3)


def test_a_model_that_finds_no_objects_is_refused(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a clip finds no objects. Give a detector with classes"):
        load_detector(str(tmp_path), None, ["person"], 0.3)
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a pisces, expected a CLIP"):
        ColorClassifier(str(tmp_path))


def test_a_detector_that_needs_scipy_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.drawing.detectors.is_scipy_available", lambda: False)
    Mask2FormerConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a mask2former needs scipy. pip install scipy"):
        load_detector(str(tmp_path), None, ["person"], 0.3)


def test_masks_of_a_segmenter_fit_their_boxes(tmp_path):
    pytest.importorskip("scipy", reason="Mask2Former of transformers is not built without scipy")
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))  # dining tables only
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    detect, _ = load_detector(str(tmp_path), None, ["dining table"], 0.01)
    objects = detect(Image.effect_noise((40, 40), 90).convert("RGB"))
    assert objects and {item.name for item in objects} == {"dining table"}
    for item in objects:
        assert item.mask.shape == (40, 40) and item.mask.any() and box_of(item.mask) == item.box
        assert 0.01 <= item.score <= 1


def test_an_open_detector_is_told_the_classes(tmp_path):
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

    torch.manual_seed(0)
    config = OwlViTConfig(
        text_config=TEXT | {"max_position_embeddings": 64},
        vision_config=VISION | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = OwlViTForObjectDetection(config)
    with torch.no_grad():
        model.box_head.dense2.weight.zero_()
        model.box_head.dense2.bias.zero_()
    model.save_pretrained(tmp_path)
    processor = OwlViTImageProcessorPil(size={"height": 32, "width": 32})
    OwlViTProcessor(processor, write_tokenizer(tmp_path)).save_pretrained(tmp_path)
    detect, _ = load_detector(str(tmp_path), None, ["bench", "wine glass"], 0.0)
    objects = detect(PICTURE)
    assert len(objects) == 4 and {item.name for item in objects} <= {"bench", "wine glass"}
    for item in objects:  # without a head, a box is as large as a patch: half of each side
        left, top, right, bottom = item.box
        assert (right - left, bottom - top) == pytest.approx((24, 16), abs=0.1)


def test_a_clip_folder_names_the_colour_that_its_vectors_say(tmp_path):
    model, processor = write_clip(tmp_path)
    picture, thing = Image.effect_noise((40, 40), 90).convert("RGB"), Found("cup", 1.0, (4, 4, 30, 30))
    (named,) = ColorClassifier(str(tmp_path))(picture, [thing])

    scores = {}
    with torch.no_grad():
        pixels = processor(images=picture.crop((4, 4, 30, 30)), return_tensors="pt")
        seen = model.get_image_features(**pixels).pooler_output[0]
        for color in COLORS:
            total = torch.zeros(8)
            for words in (
                f"a photo of a {color} cup",
                f"a photo of a {color}-colored cup",
                f"a photo of a {color} object",
            ):
                vector = model.get_text_features(**processor(text=[words], return_tensors="pt")).pooler_output[0]
                total += vector / vector.norm()
            scores[color] = float(torch.cosine_similarity(total, seen, dim=0))
    assert named == max(scores, key=scores.get)


def test_colours_are_read_off_each_object_alone():
    """With a stand-in for CLIP whose picture vector is the mean colour, and whose text vector is the named one."""

    def processor(images=None, text=None, **kwargs):
        rows = [np.array(image).reshape(-1, 3).mean(axis=0) for image in images] if images else None
        rows = rows or [ImageColor.getrgb(next(color for color in COLORS if color in line)) for line in text]
        batch = {"vectors": torch.tensor(np.array(rows), dtype=torch.float32) - 100}
        return type("Batch", (dict,), {"to": lambda self, device: self})(batch)

    classifier = ColorClassifier.__new__(ColorClassifier)
    features = lambda vectors: SimpleNamespace(pooler_output=vectors)  # noqa: E731
    classifier.model = SimpleNamespace(device="cpu", get_image_features=features, get_text_features=features)
    classifier.processor, classifier._texts = processor, {}
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("yellow", (20, 0, 40, 20))
    both = [Found("cup", 1.0, (22.2, 1, 39.6, 19)), Found("bowl", 1.0, (0, 0, 20, 20))]
    assert classifier(picture, both) == ["yellow", "blue"]


def test_what_is_outside_a_mask_is_grey():
    mask = np.zeros((20, 40), dtype=bool)
    mask[5:10, 8:16] = True
    assert box_of(mask) == (8, 5, 16, 10)
    mask[5, 8] = False
    crop = cut_out(Image.new("RGB", (40, 20), "red"), Found("cup", 1.0, box_of(mask), mask))
    assert crop.size == (8, 5)
    assert crop.getpixel((0, 0)) == (0x99,) * 3 and crop.getpixel((1, 0)) == (255, 0, 0)


def test_a_box_thinner_than_a_pixel_is_still_a_picture():
    assert cut_out(PICTURE, Found("cup", 1.0, (5.1, 3.0, 5.3, 9.0))).size == (1, 6)
