"""The samples of an input shard of an index. A scan and an export both read them here."""

from collections.abc import Iterator

from curation.shards.index import Index
from modeling_pisces.records.reading import read_input
from modeling_pisces.records.shapes import Sample


def read_shard(index: Index, number: int) -> Iterator[Sample]:
    """The samples of an input shard, their pictures as bytes or as the error that says why not."""
    yield from read_input(index.head["sources"], index.input_file(number))
