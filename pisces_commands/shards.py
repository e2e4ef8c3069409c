"""Runs one function over many shards: in this process, in several, or as Ray core tasks; and the flags that say which.

A shard is a pure function of its input and is written whole under a name that says so; a run that was stopped, killed
or repeated makes what is missing. Engines' own checkpoints are not used: Ray Data 2.60's wrote 301 rows for 201
inputs.
"""

import argparse
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from tqdm import tqdm

from pisces_commands.arguments import COUNT
from pisces_commands.ending import CommandFailed


ENGINES = ("processes", "ray")
TRIES = 3  # more, of a Ray task whose worker died


@dataclass(frozen=True)
class Workers:
    """Who does the work: `processes` here, or Ray tasks, for all shards or for the share `part` of `num_parts`.

    With `uses_gpus`, Ray runs one actor on each GPU of the cluster, which keeps what it has loaded; where it has none,
    tasks as without.
    """

    processes: int = 1
    part: int = 0
    num_parts: int = 1
    engine: str = "processes"
    address: str | None = None
    uses_gpus: bool = False

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


def add_workers(parser: Any, processes: int | None = None) -> None:
    """Flags of the runner; without `processes`, as many as there are processors."""
    default = processes or os.cpu_count() or 1
    told = processes or "all"
    parser.add_argument("--processes", type=COUNT, default=default, help=f"worker processes (default: {told})")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only this share of the shards: 0/16 to 15/16")
    parser.add_argument("--engine", choices=ENGINES, default="processes", help="who runs the shards")
    parser.add_argument("--address", help="with --engine ray: a cluster's address (default: start Ray here)")


def workers_of(options: argparse.Namespace, uses_gpus: bool = False) -> Workers:
    """The runner that the flags ask for.

    Raises:
        ValueError: a share that is none, or an address that nobody uses.
    """
    part, num_parts = parse_part(options.shard)
    if options.address and options.engine != "ray":
        raise ValueError("--address has no effect without --engine ray. Leave it out.")
    return Workers(options.processes, part, num_parts, options.engine, options.address, uses_gpus)


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


class _Caller:
    """What a Ray actor is: a process that stays, with its GPU and whatever the function keeps loaded."""

    def call(self, function: Callable[..., Any], task: tuple) -> None:
        function(*task)


def _in_ray(function: Callable[..., Any], tasks: list[tuple], workers: Workers) -> Iterator[None]:
    """Ray core tasks, or actors: what dies with its worker or its machine is started again by Ray.

    The folders of data and results must be the same on every machine.
    """
    ray = _start_ray(workers)
    found = ray.cluster_resources()
    num_gpus = int(found.get("GPU", 0)) if workers.uses_gpus else 0
    try:
        if num_gpus:
            yield from _in_actors(ray, function, tasks, num_gpus)
        else:
            yield from _in_tasks(ray, function, tasks, max(2 * int(found.get("CPU", 1)), 2))
    except ray.exceptions.WorkerCrashedError as error:
        raise _killed() from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, (ValueError, OSError)) else error) from error
    except ray.exceptions.RayActorError as error:
        raise _killed() from error


def _in_tasks(ray: Any, function: Callable[..., Any], tasks: list[tuple], at_once: int) -> Iterator[None]:
    remote = ray.remote(max_retries=TRIES)(function)
    left = iter(tasks)
    waiting = [remote.remote(*task) for task in islice(left, at_once)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                ray.get(reference)
                waiting += [remote.remote(*task) for task in islice(left, 1)]
                yield
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _in_actors(ray: Any, function: Callable[..., Any], tasks: list[tuple], num_gpus: int) -> Iterator[None]:
    hold = ray.remote(num_gpus=1, max_restarts=TRIES, max_task_retries=TRIES)(_Caller)
    actors = [hold.remote() for _ in range(min(num_gpus, len(tasks)))]
    try:
        yield from ray.util.ActorPool(actors).map_unordered(
            lambda actor, task: actor.call.remote(function, task), tasks
        )
    finally:
        for actor in actors:
            ray.kill(actor)


def _killed() -> CommandFailed:
    return CommandFailed(
        "a Ray worker was killed four times at the same shard, most often for want of memory. Run the same command "
        "again: finished shards are kept."
    )


def _start_ray(workers: Workers) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not workers.address:
        # read when Ray is imported; without it Ray 2.60 takes the machine's address where 127.0.0.1 is asked for
        # (services.resolve_ip_for_localhost), and its ports can be reached from outside
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
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
