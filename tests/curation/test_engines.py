"""Who runs the shards: worker processes that die, and Ray, by a stand-in with Ray's few calls that we use.

The real Ray is tried by `python -m benchmarks.curation --part engines` where it is installed.
"""

import os
import signal
import sys
import types

import pytest

from curation.run import main as run
from curation.shards.index import Index
from pisces_commands.ending import CommandFailed
from pisces_commands.shards import Workers, parse_part, run_tasks
from tests.curation.curation_fixtures import encode, photo, tree, write_collection, write_config


class WorkerCrashedError(Exception):
    pass


class RayTaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class FakeRay(types.ModuleType):
    """Runs a task when its result is asked for; `deaths` workers die first, as often as `max_retries` lets them."""

    def __init__(self):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(WorkerCrashedError=WorkerCrashedError, RayTaskError=RayTaskError)
        self.deaths, self.options, self.cancelled = 0, {}, []

    def is_initialized(self):
        return bool(self.options)

    def init(self, **options):
        self.options = options

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, max_retries):
        def wrap(function):
            return types.SimpleNamespace(remote=lambda *task: (function, task, max_retries))

        return wrap

    def wait(self, references):
        return references[-1:], references[:-1]  # any order

    def get(self, reference):
        function, task, retries = reference
        while self.deaths:
            self.deaths, retries = self.deaths - 1, retries - 1
            if retries < 0:
                raise WorkerCrashedError
        try:
            function(*task)
        except Exception as error:
            raise RayTaskError(error) from error

    def cancel(self, reference):
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def command(tmp_path, name, *flags):
    raw = tmp_path / "raw"
    if not raw.exists():  # written once: a file with another time is another file
        write_collection(raw, {f"{n}.png": encode(photo(n)) for n in range(9)})
    config = write_config(tmp_path / "config.yaml")
    paths = ["--config", str(config), "--data", str(raw), "--output", str(tmp_path / name)]
    return [*paths, "--rows_per_shard", "2", *flags]


def test_ray_gives_the_bytes_of_one_process_also_when_a_worker_dies(tmp_path, ray):
    assert run(command(tmp_path, "one", "--processes", "1")) == 0
    ray.deaths = 2
    assert run(command(tmp_path, "ray", "--engine", "ray", "--processes", "2")) == 0
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    assert tree(tmp_path / "ray.index") == tree(tmp_path / "one.index")
    assert ray.options["address"] == "local" and ray.options["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"  # or Ray listens on the machine's address


def test_ray_connects_to_the_cluster_that_is_named_and_sets_nothing_there(tmp_path, ray, monkeypatch):
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    assert run(command(tmp_path, "ray", "--engine", "ray", "--address", "auto")) == 0
    assert ray.options["address"] == "auto" and "num_cpus" not in ray.options
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_a_ray_task_that_dies_again_and_again_ends_with_a_sentence(tmp_path, ray, capsys):
    ray.deaths = 4
    assert run(command(tmp_path, "ray", "--engine", "ray")) == 1
    error = capsys.readouterr().err
    assert "a Ray worker was killed four times at the same shard" in error and error.count("\n") == 1
    assert ray.cancelled


def test_an_error_of_a_ray_task_is_the_error_of_a_process(tmp_path, ray, capsys):
    flags = command(tmp_path, "ray", "--engine", "ray")
    assert run(flags) == 0
    path = Index(tmp_path / "ray.index").path("scan", 1)
    path.write_bytes(b"")
    write_config(tmp_path / "config.yaml", size={"short_side": 16})
    assert run(flags) == 2
    assert "this shard cannot be read" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_without_ray_the_flag_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(command(tmp_path, "ray", "--engine", "ray")) == 2
    assert 'Install it: pip install "ray>=2.40"' in capsys.readouterr().err


def end_at_once(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_process_that_is_killed_ends_the_run_with_a_sentence():
    with pytest.raises(CommandFailed, match=r"a worker process was killed, .* finished shards are kept"):
        run_tasks(end_at_once, [(n,) for n in range(6)], Workers(processes=2), "test")


def test_parts_share_all_shards_and_none_twice():
    numbers = range(17)
    shares = [Workers(part=part, num_parts=5).share(numbers) for part in range(5)]
    assert sorted(number for share in shares for number in share) == list(numbers)
    assert parse_part("3/16") == (3, 16)
