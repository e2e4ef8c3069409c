"""Vectors of all pictures of an index by a model, for copies and clusters."""

import numpy as np
from numpy.typing import NDArray

from curation.models.dual import kind_of, load_dual
from curation.models.pisces import load_judge
from curation.models.scoring import blocks, identity
from curation.shards.index import Index


def vectors_of(index: Index, model: str) -> NDArray[np.float32]:
    """(rows of the index, D); zeros for rows that earlier stages dropped or that have no picture."""
    encoder = load_judge(model) if kind_of(model) == "pisces" else load_dual(model)
    parts = []
    width = 1
    for number in range(index.num_shards):
        rows = index.read(number, "dedup", ("picture",))
        wanted = [row["rule"] is None and row["picture"] >= 0 for row in rows]
        found: dict[int, np.ndarray] = {}
        for places, images in blocks(index, number, wanted):
            values = encoder.vectors(images).numpy().astype(np.float32)
            width = values.shape[1]
            found.update(zip(places, values, strict=True))
        parts.append((len(rows), found))
    vectors = np.zeros((sum(count for count, _ in parts), width), dtype=np.float32)
    first = 0
    for count, found in parts:
        for place, value in found.items():
            vectors[first + place] = value
        first += count
    return vectors


__all__ = ["identity", "vectors_of"]
