"""Claims of `tests.fuzz.data` on a sample; the whole run is `python -m tests.fuzz.data`."""

import os

import pytest

from tests.crash.running import warm_up_modules
from tests.fuzz.data import COMMANDS, FORMATS, LARGE, check, check_command


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_planted_faults_cost_their_records_and_nothing_else(make):
    found = {seed: problem for seed in range(25) if (problem := check(make, f"sample-{seed}"))}
    assert found == {}


@pytest.mark.parametrize("make", LARGE, ids=lambda make: make.__name__)
def test_what_unfolds_to_hundreds_of_megabytes_costs_its_record(make):
    assert check(make, "large-0") == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_commands_end_in_a_line_whatever_the_source_holds():
    warm_up_modules(list(COMMANDS))
    cases = [(module, make, f"command-{seed}") for seed, make in enumerate(FORMATS) for module in COMMANDS]
    assert {case: problem for case in cases if (problem := check_command(*case))} == {}
