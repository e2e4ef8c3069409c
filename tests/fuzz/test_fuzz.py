"""A short run of the random cases, and proof that the loop finds what it is there for."""

import importlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz.limits import run_in_children
from tests.fuzz.outcomes import FINE, Case, Wrong, run


NUM_SEEDS = {"images": 500, "processor": 200, "forward": 120, "generate": 60, "pipeline": 40}


@pytest.mark.parametrize("surface", NUM_SEEDS)
def test_random_cases_are_right_or_refused_in_one_clear_line(surface):
    if surface == "pipeline":
        pytest.importorskip("diffusers")
    module = importlib.import_module(command.SURFACES[surface])
    assert module.SURFACE == surface
    outcomes = list(run(module.cases, range(NUM_SEEDS[surface])))
    assert not (bad := [outcome for outcome in outcomes if outcome.result not in FINE]), bad[:5]
    totals = Counter(outcome.result for outcome in outcomes)
    assert totals.total() >= NUM_SEEDS[surface] and min(totals["right"], totals["refused"]) > totals.total() / 8


def end_in(what, folder=None):
    if what == "exception":
        raise KeyError("x")
    if what == "two lines":
        raise ValueError("expected one\ntwo")
    if what == "wrong":
        raise Wrong("other pixels")
    if what in ("refused", "clear"):
        raise ValueError("x is 3; expected 4. Pass 4.")
    if what == "unclear":
        raise ValueError("bad value")
    if what == "program":
        subprocess.Popen(["true"])
    if what == "connection":
        with socket.socket() as one:
            one.connect(("127.0.0.1", 1))
    if what == "file":
        (folder / "planted").write_text("x")
    if what == "swallowed":
        try:
            os.remove(folder / "nothing")
        except OSError:
            pass


EXPECTED = {
    "exception": "traceback", "two lines": "traceback", "wrong": "wrong", "refused": "wrong", "accepted": "wrong",
    "clear": "refused", "unclear": "unclear", "program": "process", "connection": "socket", "file": "write",
    "swallowed": "write", "nothing": "right",
}  # fmt: skip


@pytest.mark.parametrize("what", EXPECTED)
def test_the_loop_reports_every_kind_of_failure_with_its_seed(what, tmp_path):
    must = {"refused": False, "accepted": True}.get(what)
    outcomes = list(run(lambda seed: [Case("case", lambda: end_in(what, tmp_path), must)], range(3, 5)))
    assert [(one.seed, one.name, one.result) for one in outcomes] == [
        (3, "case", EXPECTED[what]),
        (4, "case", EXPECTED[what]),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_case_may_write_into_its_own_folder(tmp_path):
    (outcome,) = run(lambda seed: [Case("case", lambda: end_in("file", tmp_path), None, (tmp_path,))], [0])
    assert outcome.result == "right" and (tmp_path / "planted").exists()


CHILD = """
import os, sys, time
from tests.fuzz import __main__ as command
from tests.fuzz.outcomes import Case

class Module:
    SURFACE = "odd"
    @staticmethod
    def cases(seed):
        yield Case("case", {0: lambda: print("noise"), 1: lambda: os._exit(9), 2: lambda: time.sleep(60), 4: lambda: bytearray(2**45)}.get(seed, lambda: None))

sys.modules["odd"] = Module
command.SURFACES["odd"] = "odd"
raise SystemExit(command.main())
"""


def test_a_seed_that_hangs_or_ends_its_child_is_reported_and_the_next_ones_still_run(monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **options: start([sys.executable, "-c", CHILD, *words[3:]], **options)
    )
    outcomes = [tuple(fields[:3]) for fields in run_in_children("odd", range(6), silence_s=5)]
    assert [(seed, result) for seed, _, result in outcomes] == [
        (0, "right"), (1, "died"), (2, "hang"), (3, "right"), (4, "traceback"), (5, "right")
    ]  # fmt: skip


def test_the_results_keep_one_entry_per_surface(tmp_path, monkeypatch, capsys):
    file = tmp_path / "robustness.json"
    file.write_text(json.dumps({"crash": {"kills": 3}, "surfaces": []}))
    words = ["fuzz", "--surface", "images", "--here", "--output", str(file)]
    for seeds in ("0:5", "5:8"):
        monkeypatch.setattr(sys, "argv", [*words, "--seeds", seeds])
        assert command.main() == 0
    found = json.loads(file.read_text())
    assert found["crash"] == {"kills": 3} and found["fuzz"]["cases"] == 3
    assert [(one["surface"], one["seeds"], one["cases"]) for one in found["surfaces"]] == [("images", "5:8", 3)]
    assert "images: 5 cases" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--seeds", "3"], ["--seeds", "5:5"], ["--surface", "images,nothing"]])
def test_wrong_arguments_of_the_command_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and "expected" in capsys.readouterr().err
