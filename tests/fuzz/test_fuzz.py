"""A short run of the random cases, and proof that the loop finds what it is there for."""

import subprocess

import pytest

from tests.fuzz import images, outcomes, processor
from tests.fuzz.outcomes import Refusable, Wrong


@pytest.mark.parametrize(("surface", "number"), [(images, 500), (processor, 300)], ids=["images", "processor"])
def test_random_cases_are_right_or_refused_in_one_line(surface, number):
    counts, failures = outcomes.run(surface.make_case, range(number))
    assert not failures, failures[:5]
    totals = [sum(n for (_, found), n in counts.items() if found == name) for name in ("right", "refused")]
    assert sum(totals) == number and min(totals) > number / 8


def failing(problem):
    def call():
        if problem == "exception":
            raise KeyError("x")
        if problem == "two lines":
            raise ValueError("one\ntwo")
        if problem == "wrong":
            raise Wrong("other pixels")
        if problem == "refused":
            raise ValueError("no")
        if problem == "program":
            subprocess.Popen(["true"])

    return lambda random: Refusable("case", call, {"refused": False, "accepted": True}.get(problem))


@pytest.mark.parametrize("problem", ["exception", "two lines", "wrong", "refused", "accepted", "program"])
def test_the_loop_reports_every_kind_of_failure_with_its_seed(problem):
    counts, failures = outcomes.run(failing(problem), range(3, 5))
    assert [failure.seed for failure in failures] == [3, 4] and counts["case", "failure"] == 2
    assert outcomes.run(failing("none"), range(1))[1] == []
    assert subprocess.Popen.__module__ == "subprocess"
