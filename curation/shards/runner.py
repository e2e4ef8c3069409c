"""Runs a stage over the shards of an index. Who runs them is the business of `pisces_commands.shards`."""

from collections.abc import Callable
from functools import lru_cache

import pyarrow as pa

from curation.shards.index import Index, digest
from curation.shards.tables import write_table
from pisces_commands.shards import Workers, run_tasks


MakeShard = Callable[[Index, int], pa.Table]


def run_stage(index: Index, stage: str, make: MakeShard, workers: Workers) -> bool:
    """Make the missing shards of a stage, or those of our share.

    Args:
        make: a function of a module, called with the index and a shard's number; where it runs does not matter.

    Returns:
        whether all shards of the stage are there now.

    Raises:
        CommandFailed: a worker was killed.
    """
    todo = workers.share(index.missing(stage))
    tasks = [(make, str(index.folder), digest(index.stages), stage, number) for number in todo]
    run_tasks(_make_shard, tasks, workers, stage)
    is_whole = not index.missing(stage)
    if is_whole:
        index.clean(stage)
    return is_whole


def _make_shard(make: MakeShard, folder: str, settings: str, stage: str, number: int) -> None:
    index = _opened(folder, settings)
    write_table(index.path(stage, number), make(index, number))


@lru_cache(maxsize=1)
def _opened(folder: str, settings: str) -> Index:
    """The index, opened once per process and settings: the names of its shards depend on all input files."""
    index = Index(folder)
    assert digest(index.stages) == settings, f"{folder}: the settings of a stage were changed while it ran"
    return index
