"""docs/memory.md says what results/roofline.json says."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "results/roofline.json").read_text(encoding="utf-8"))


def table_rows(first):
    """Cells of the rows of the table whose head begins with a word."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    rows = []
    while lines[start].startswith("|"):
        rows.append([cell.strip(" *") for cell in lines[start].strip("|").split("|")])
        start += 1
    return rows


def test_computed_memory_is_that_of_the_results_file():
    rows = [[line["weights_in"], f"{line['tokens']:,}", f"{line['gib']:.1f}"] for line in RESULTS["memory"]]
    assert [[cells[0], cells[2], cells[-1]] for cells in table_rows("weights")] == rows


def test_measured_memory_and_time_are_those_of_the_results_file():
    found = [[float(cell) for cell in cells[1:]] for cells in table_rows("work")]
    names = ("mib_measured", "mib_computed", "seconds_measured", "seconds_computed")
    wanted = [[line[name] for name in names] for line in RESULTS["check"]["lines"]]
    for row, values in zip(found, wanted, strict=True):
        assert all(
            abs(cell - value) <= (0.5 if value > 20 else 0.005) for cell, value in zip(row, values, strict=True)
        )


def test_least_seconds_are_those_of_the_results_file():
    packed = [line for line in RESULTS["recipes"] if "packed" in line["task"]]
    for cells, line in zip(table_rows("recipe"), packed, strict=True):
        floors = [line["floor_s"][name] for name in ("H200 SXM", "A100 SXM 80GB", "RTX 4090")]
        assert cells[0] in line["task"] and cells[2:] == [f"{value:.2f}" for value in floors]
