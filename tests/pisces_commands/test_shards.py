"""Who runs the shards: flags, and one Ray actor per GPU, by a stand-in with the few calls of Ray that are used.

Tasks of Ray and worker processes are tried in tests/curation/test_engines.py, the real Ray by `benchmarks.many`.
"""

import argparse
import sys
import types

import pytest

from pisces_commands.arguments import LineParser
from pisces_commands.ending import CommandFailed
from pisces_commands.shards import Workers, add_workers, run_tasks, workers_of


class ActorDied(Exception):
    pass


class Other(Exception):
    pass


class FakeRay(types.ModuleType):
    """A cluster with GPUs, whose actors die as often as `deaths` says, beyond what Ray repeats."""

    def __init__(self, gpus):
        super().__init__("ray")
        self.gpus, self.deaths, self.held, self.killed, self.options = gpus, 0, [], [], {}
        self.exceptions = types.SimpleNamespace(WorkerCrashedError=Other, RayTaskError=Other, RayActorError=ActorDied)
        self.util = types.SimpleNamespace(ActorPool=self.pool)

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, **options):
        self.options = options
        return lambda what: types.SimpleNamespace(remote=lambda *task: self.make(what, task))

    def make(self, what, task):
        if not isinstance(what, type):
            return lambda: what(*task)
        actor = what()
        actor.call = types.SimpleNamespace(remote=lambda function, given: function(*given))
        self.held.append(actor)
        return actor

    def pool(self, actors):
        def map_unordered(start, tasks):
            for number, task in enumerate(tasks):
                if self.deaths:
                    raise ActorDied
                yield start(actors[number % len(actors)], task)

        return types.SimpleNamespace(map_unordered=map_unordered)

    def wait(self, references):
        return references[:1], references[1:]

    def get(self, reference):
        return reference()

    def kill(self, actor):
        self.killed.append(actor)

    def cancel(self, reference):
        pass


@pytest.fixture
def cluster(monkeypatch):
    def build(gpus):
        fake = FakeRay(gpus)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return build


def test_ray_holds_one_actor_on_each_gpu_and_gives_them_back(cluster):
    ray, done = cluster(2), []
    run_tasks(done.append, [(n,) for n in range(5)], Workers(engine="ray", uses_gpus=True), "test")
    assert sorted(done) == list(range(5))
    assert ray.options == {"num_gpus": 1, "max_restarts": 3, "max_task_retries": 3}
    assert len(ray.held) == 2 and ray.killed == ray.held


def test_no_more_gpus_are_held_than_there_are_shards(cluster):
    ray = cluster(8)
    run_tasks(print, [("a",), ("b",)], Workers(engine="ray", uses_gpus=True), "test")
    assert len(ray.held) == 2


@pytest.mark.parametrize(("gpus", "uses_gpus"), [(0, True), (2, False)])
def test_without_gpus_or_use_of_them_shards_are_tasks(cluster, gpus, uses_gpus):
    ray, done = cluster(gpus), []
    run_tasks(done.append, [(n,) for n in range(9)], Workers(engine="ray", uses_gpus=uses_gpus), "test")
    assert sorted(done) == list(range(9)) and not ray.held and ray.options == {"max_retries": 3}


def test_an_actor_that_dies_again_and_again_ends_with_a_sentence(cluster):
    ray = cluster(1)
    ray.deaths = 1
    with pytest.raises(CommandFailed, match="a Ray worker was killed four times at the same shard"):
        run_tasks(print, [(1,)], Workers(engine="ray", uses_gpus=True), "test")
    assert ray.killed == ray.held


def test_a_model_per_process_is_one_process_unless_more_are_wanted():
    parser = LineParser(prog="x")
    add_workers(parser, processes=1)
    assert workers_of(parser.parse_args([]), uses_gpus=True) == Workers(uses_gpus=True)
    assert workers_of(parser.parse_args(["--processes", "3", "--shard", "1/4"])) == Workers(3, 1, 4)
    with pytest.raises(ValueError, match="--address has no effect without --engine ray"):
        workers_of(argparse.Namespace(shard="0/1", address="auto", engine="processes", processes=1))
