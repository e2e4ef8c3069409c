"""A short run of the crash trials, and proof that they find what they are there for; the whole run is `make crash`."""

import os
import random
import shutil

import pytest

from tests.crash import trials
from tests.crash.jobs import JOBS, Job, left_behind, open_texts
from tests.crash.running import Run, warm_up
from tests.crash.trials import TRIALS, Bench


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SMALL = {job.name: job for job in JOBS if job.name in ("scenes", "edits")}  # they need no model


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    warm_up(tuple(SMALL.values()))
    return Bench(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("crash"), random.Random(5))


@pytest.mark.slow  # forks: in a worker that holds threads of other tests a child may wait for ever; `make crash` is alone
@pytest.mark.parametrize(
    "trial", ["kill", "three kills", "two writers", "interrupt", "stdout closed", "stdout full", "stdout absent"]
)
@pytest.mark.parametrize("name", SMALL)
def test_a_job_survives(bench, name, trial):
    assert TRIALS[trial](bench, SMALL[name]) == ""


def test_a_full_disk_is_told_and_the_same_command_goes_on(bench):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    assert TRIALS["full disk"](bench, SMALL["scenes"]) == ""


CARELESS = """
import sys, time
from pathlib import Path

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "x.tmp").write_text("x")
with open(out / "done.json", "w") as file:
    for number in range(20):
        file.write("[" if number == 0 else f"{number}{']' if number == 19 else ','}")
        file.flush()
        time.sleep(0.02)
print("written")
"""


@pytest.fixture
def careless(tmp_path, monkeypatch):
    """A command that writes under the final name, bit by bit, and leaves a temporary file."""
    (tmp_path / "careless_command.py").write_text(CARELESS)
    monkeypatch.syspath_prepend(tmp_path)
    return Job("careless", "careless_command", "{w}/out", "out/done.json", open_texts)


def test_a_half_output_under_the_final_name_is_found(careless, bench, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    run = Run(careless, tmp_path, work)
    run.signal_after(0.25, 9)
    assert run.wait().code == -9
    assert "looks finished, but the output does not open" in trials.after_a_stop(careless, work)


def test_temporary_files_and_other_bytes_are_found(careless, bench, tmp_path):
    whole = bench.whole(careless)
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    for name, text in (("done.json", "[1]"), ("x.tmp", "x")):
        (work / "out" / name).write_text(text)
    assert "differs from an undisturbed run: out/done.json" in trials.compare(careless, whole, work)
    assert left_behind(work) == ["out/x.tmp"]
