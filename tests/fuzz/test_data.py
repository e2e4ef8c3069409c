"""Claims of `tests.fuzz.data` on a sample; the whole run is `python -m tests.fuzz.data`."""

import pytest

from tests.fuzz.data import FORMATS, check


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_planted_faults_cost_their_records_and_nothing_else(make):
    found = {seed: problem for seed in range(25) if (problem := check(make, f"sample-{seed}"))}
    assert found == {}
