"""Object detectors and a colour classifier of transformers, behind the two calls that GenEval's rules need.

`evaluation.geneval` loads them by Hub id or folder. Three families: detectors with fixed classes (DETR, RT-DETR,
YOLOS ...), segmenters (Mask2Former, MaskFormer), and detectors that are told the classes (OWL-ViT, OWLv2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import is_scipy_available

from evaluation.drawing.geneval_rules import Detect, Found
from modeling_pisces.checkpoint.loading import load_image_processor


# COCO's classes by the names that some checkpoints have for them, as GenEval calls them (its object_names.txt)
ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The three wordings, the grey and the ten colours: github.com/djghosh13/geneval, evaluation/evaluate_images.py
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = "#999"
OPEN_MODELS = ("owlvit", "owlv2")
SEGMENTERS = ("mask2former", "maskformer")
NEED_SCIPY = (*SEGMENTERS, "owlv2")  # segmenters build their training loss on loading; OWLv2 resizes pictures with it


def choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_detector(
    source: str, revision: str | None, classes: Sequence[str], least_score: float
) -> tuple[Detect, str | None]:
    """A detector of `classes`, and the Hub's commit of it (None for a folder).

    Args:
        source: Hub id or folder of a transformers detector.
        classes: GenEval's words for everything that the prompts name.
        least_score: objects below it are not returned.

    Raises:
        ValueError: another kind of model, one that does not know some of the classes, or scipy is missing for it.
    """
    config = AutoConfig.from_pretrained(source, revision=revision)
    commit = getattr(config, "_commit_hash", None)
    if config.model_type in NEED_SCIPY and not is_scipy_available():
        raise ValueError(f"--detector {source}: a {config.model_type} needs scipy. pip install scipy")
    if config.model_type in OPEN_MODELS:
        return _load_open_detector(source, revision, classes, least_score), commit
    if config.model_type not in (*SEGMENTERS, *MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES):
        raise ValueError(
            f"--detector {source}: a {config.model_type} finds no objects. Give a detector with classes (DETR, "
            "RT-DETR, YOLOS), Mask2Former or MaskFormer for instances, OWL-ViT or OWLv2."
        )
    names = {index: ALIASES.get(name.lower(), name.lower()) for index, name in config.id2label.items()}
    if unknown := sorted(set(classes) - set(names.values())):
        raise ValueError(
            f"--detector {source} does not know {len(unknown)} of the {len(classes)} classes that the prompts ask "
            f"for: {', '.join(unknown[:5])}. Give one of COCO's 80 classes, or one that is told the classes (OWLv2)."
        )
    processor = load_image_processor(source, revision)
    if config.model_type in SEGMENTERS:
        return _load_segmenter(source, revision, processor, names, least_score), commit
    return _load_box_detector(source, revision, processor, names, least_score), commit


def _load_box_detector(
    source: str, revision: str | None, processor: Any, names: dict[int, str], least_score: float
) -> Detect:
    model = AutoModelForObjectDetection.from_pretrained(source, revision=revision).to(choose_device()).eval()

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        (result,) = processor.post_process_object_detection(
            model(**inputs), threshold=least_score, target_sizes=[image.size[::-1]]
        )
        return _read_boxes(result, names)

    return detect


def _load_open_detector(source: str, revision: str | None, classes: Sequence[str], least_score: float) -> Detect:
    model = AutoModelForZeroShotObjectDetection.from_pretrained(source, revision=revision).to(choose_device()).eval()
    processor = AutoProcessor.from_pretrained(source, revision=revision)
    # "a photo of a ...": the wording of OWL-ViT's own zero-shot evaluation on COCO, arXiv 2205.06230
    texts, names = [[f"a photo of a {name}" for name in classes]], dict(enumerate(classes))

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        inputs = processor(text=texts, images=image, return_tensors="pt").to(model.device)
        (result,) = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=least_score, target_sizes=[image.size[::-1]]
        )
        return _read_boxes(result, names)

    return detect


def _read_boxes(result: dict[str, torch.Tensor], names: dict[int, str]) -> list[Found]:
    columns = (result[name].tolist() for name in ("labels", "scores", "boxes"))
    return [Found(names[label], score, tuple(box)) for label, score, box in zip(*columns, strict=True)]


def _load_segmenter(
    source: str, revision: str | None, processor: Any, names: dict[int, str], least_score: float
) -> Detect:
    model = AutoModelForUniversalSegmentation.from_pretrained(source, revision=revision).to(choose_device()).eval()

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        (result,) = processor.post_process_instance_segmentation(
            model(**inputs), threshold=least_score, target_sizes=[image.size[::-1]], return_binary_maps=True
        )
        if not result["segments_info"]:
            return []
        masks = result["segmentation"].cpu().numpy().astype(bool)  # (objects, H, W); they may overlap
        return [
            Found(names[segment["label_id"]], segment["score"], box_of(mask), mask)
            for segment, mask in zip(result["segments_info"], masks, strict=True)
        ]

    return detect


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask that is not empty, its right and lower side exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def cut_out(image: Image.Image, found: Found) -> Image.Image:
    """The object's box, with grey around the object where its mask is known."""
    if found.mask is not None:
        mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
        image = Image.composite(image, Image.new("RGB", image.size, GREY), mask)
    left, top, right, bottom = found.box
    left, top = round(left), round(top)
    return image.crop((left, top, max(round(right), left + 1), max(round(bottom), top + 1)))  # at least one pixel


def load_clip(source: str, revision: str | None, flag: str) -> tuple[Any, Any, str | None]:
    """A CLIP model, its processor, and the Hub's commit of it (None for a folder).

    Raises:
        ValueError: another kind of model; `flag` is what the user named it with.
    """
    config = AutoConfig.from_pretrained(source, revision=revision)
    if config.model_type != "clip":
        raise ValueError(f"{flag} {source}: a {config.model_type}, expected a CLIP with both towers.")
    model = AutoModel.from_pretrained(source, revision=revision).to(choose_device()).eval()
    return model, AutoProcessor.from_pretrained(source, revision=revision), getattr(model.config, "_commit_hash", None)


class ColorClassifier:
    """Names the colour of objects with a CLIP model: of ten texts, the one nearest to the cut-out object.

    Args:
        source: Hub id or folder of a CLIP model. The official scorer has OpenAI's ViT-L/14.
        revision: of a Hub id.

    Raises:
        ValueError: another kind of model.
    """

    def __init__(self, source: str, revision: str | None = None):
        self.model, self.processor, self.commit = load_clip(source, revision, "--color_model")
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: list[Found]) -> list[str]:
        """One of `COLORS` for each object."""
        crops = [cut_out(image.convert("RGB"), item) for item in found]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        pictures = to_unit(self.model.get_image_features(**inputs).pooler_output)
        texts = torch.stack([self._embed_colors(item.name) for item in found])  # (objects, colours, width)
        return [COLORS[index] for index in (texts @ pictures.unsqueeze(-1)).squeeze(-1).argmax(dim=1)]

    def _embed_colors(self, name: str) -> torch.Tensor:
        """(colours, width): for each colour the mean direction of its wordings."""
        if name not in self._texts:
            texts = [prompt.format(color=color, name=name) for color in COLORS for prompt in COLOR_PROMPTS]
            inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
            vectors = to_unit(self.model.get_text_features(**inputs).pooler_output)
            self._texts[name] = to_unit(vectors.unflatten(0, (len(COLORS), len(COLOR_PROMPTS))).mean(dim=1))
        return self._texts[name]


def to_unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1 in the same directions, along the last axis."""
    return vectors / vectors.norm(dim=-1, keepdim=True)
