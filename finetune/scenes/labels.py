"""What a scene's truth says about each patch and about the whole picture: labels for a tower to be warmed up with.

`finetune.parts.vision --labels scenes` trains with them; only pictures of `finetune.scenes` have such a truth.
"""

# I pictures, P patches
import numpy as np
import torch

from finetune.scenes.layout import BACKGROUNDS, COLORS, SHAPES, SIZES


MAX_OBJECTS = 4
# classes per patch; index 0 is background
PATCH_CLASSES = {"shape": 1 + len(SHAPES), "color": 1 + len(COLORS), "size": 1 + len(SIZES), "place": 10}
PICTURE_CLASSES = {"background": len(BACKGROUNDS), "count": 1 + MAX_OBJECTS}


def picture_labels(truths: list[dict]) -> dict[str, torch.Tensor]:
    """One int64 label per picture for each of `PICTURE_CLASSES`."""
    names = tuple(BACKGROUNDS)
    return {
        "background": torch.tensor([names.index(truth["background"]) for truth in truths]),
        "count": torch.tensor([len(truth["objects"]) for truth in truths]),
    }


def patch_labels(truths: list[dict], grid_side: int) -> dict[str, torch.Tensor]:
    """What each patch shows: for "shape", "color", "size" and "place" an index with 0 for background.

    A patch belongs to an object when some point of the patch lies within 0.8 radii of the object's centre; the nearest
    centre wins. Lengths in the truth are 64ths of the side.

    Returns:
        a dict of (I, grid_side ** 2) int64 tensors, row-major.
    """
    words = {"shape": tuple(SHAPES), "color": tuple(COLORS), "size": tuple(SIZES)}
    patch = 64 / grid_side
    low = np.arange(grid_side) * patch
    labels = {name: np.zeros((len(truths), grid_side, grid_side), dtype=np.int64) for name in (*words, "place")}
    for index, truth in enumerate(truths):
        nearest = np.full((grid_side, grid_side), np.inf)
        for item in truth["objects"]:
            dx = item["x"] - np.clip(item["x"], low, low + patch)
            dy = item["y"] - np.clip(item["y"], low, low + patch)
            distance = np.hypot(dy[:, None], dx[None, :]) / item["radius"]
            mine = (distance < 0.8) & (distance < nearest)
            nearest = np.where(mine, distance, nearest)
            for name, known in words.items():
                labels[name][index][mine] = 1 + known.index(item[name])
            labels["place"][index][mine] = 1 + 3 * item["row"] + item["col"]
    return {name: torch.from_numpy(grid).flatten(1) for name, grid in labels.items()}
