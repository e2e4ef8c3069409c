"""Opens single pictures of an index, for a sheet that a person looks at."""

from PIL import Image

from curation.records.reading import read_shard
from curation.shards.index import Index
from modeling_pisces.image_loading_pisces import load_image


def load_examples(index: Index, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], Image.Image]:
    """Pictures by shard and row; one that cannot be opened is left out."""
    found = {}
    places = set(wanted)
    for shard in sorted({shard for shard, _ in places}):
        row = 0
        for sample in read_shard(index, shard):
            for content in sample.pictures if not sample.problem and sample.pictures else [None]:
                if (shard, row) in places and isinstance(content, bytes):
                    try:
                        found[shard, row] = load_image(content)
                    except ValueError:
                        pass
                row += 1
    return found
