"""Runs one function over many shards: in this process, in several, or as Ray core tasks.

A shard is a pure function of its input and is written whole under a name that says so; a run that was stopped, killed
or repeated makes what is missing. Engines' own checkpoints are not used: Ray Data 2.60's wrote 301 rows for 201
inputs.
"""

import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from curation.shards.index import Index, digest
from curation.shards.tables import write_table
from pisces_commands.ending import CommandFailed


ENGINES = ("processes", "ray")
MakeShard = Callable[[Index, int], pa.Table]


@dataclass(frozen=True)
class Workers:
    """Who does the work: `processes` here, or Ray tasks, for all shards or for the share `part` of `num_parts`."""

    processes: int = 1
    part: int = 0
    num_parts: int = 1
    engine: str = "processes"
    address: str | None = None

    def share(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number % self.num_parts == self.part]


def parse_part(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16); counted from 0, as the numbers of a job array are.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    part, num_parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not part < num_parts:
        raise ValueError(f"--shard {text!r}: expected part/parts counted from 0, as 0/16 to 15/16.")
    return part, num_parts


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


def run_tasks(function: Callable[..., Any], tasks: list[tuple], workers: Workers, label: str) -> None:
    """Call `function(*task)` for every task, in any order; errors of a task end the run."""
    if not tasks:
        return
    engine = _in_ray if workers.engine == "ray" else _in_processes
    done = engine(function, tasks, workers)
    for _ in tqdm(done, total=len(tasks), desc=label, unit=" shards", delay=2, leave=False, disable=None):
        pass


def _in_processes(function: Callable[..., Any], tasks: list[tuple], workers: Workers) -> Iterator[None]:
    if workers.processes == 1 or len(tasks) == 1:
        for task in tasks:
            function(*task)
            yield
        return
    # spawned, on every system: a fork would copy torch's threads and locks in whatever state they are
    context = multiprocessing.get_context("spawn")
    count = min(workers.processes, len(tasks))
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
    try:
        yield from _bounded(lambda task: pool.submit(function, *task), tasks, 2 * count)
    except BrokenProcessPool as error:
        raise CommandFailed(
            "a worker process was killed, most often for want of memory. Run the same command again: finished shards "
            "are kept; --processes 1 needs least."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _bounded(submit: Callable[[tuple], Future], tasks: list[tuple], at_once: int) -> Iterator[None]:
    """Keep few tasks waiting, so that an error or Ctrl-C does not have to wait for a long queue."""
    left = iter(tasks)
    waiting = {submit(task) for task in islice(left, at_once)}
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            waiting |= {submit(task) for task in islice(left, 1)}
            yield


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever: it holds both ends of its own pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_leave, args=(parent.sentinel,), daemon=True).start()


def _wait_and_leave(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _in_ray(function: Callable[..., Any], tasks: list[tuple], workers: Workers) -> Iterator[None]:
    """Ray core tasks: one that dies with its worker or its machine is started again by Ray.

    The folders of data and index must be the same on every machine.
    """
    ray = _start_ray(workers)
    remote = ray.remote(max_retries=3)(function)
    at_once = max(2 * int(ray.cluster_resources().get("CPU", 1)), 2)
    left = iter(tasks)
    waiting = [remote.remote(*task) for task in islice(left, at_once)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                ray.get(reference)
                waiting += [remote.remote(*task) for task in islice(left, 1)]
                yield
    except ray.exceptions.WorkerCrashedError as error:
        raise CommandFailed(
            "a Ray worker was killed four times at the same shard, most often for want of memory. Run the same"
            " command again: finished shards are kept."
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, (ValueError, OSError)) else error) from error
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _start_ray(workers: Workers) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError('--engine ray: Ray is not installed. Install it: pip install "ray>=2.40".') from error
    if not ray.is_initialized():
        local: dict[str, Any] = (
            {}
            if workers.address
            else {
                "num_cpus": workers.processes,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        )
        ray.init(address=workers.address or "local", logging_level="ERROR", log_to_driver=False, **local)
    return ray
