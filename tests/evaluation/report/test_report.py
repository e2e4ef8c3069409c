"""Claims about `evaluation.report card`: what a page says comes from a results file, and nothing else does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import card
from evaluation.report import pages as report


ROOT = Path(__file__).parents[3]
HELDOUT, SHOWN = ROOT / "results/pisces-tiny.json", ROOT / "results/pisces-tiny-shown.json"
EDITS = ROOT / "results/pisces-tiny-edits.json"
PAGES = ("model_card.md", "README.md")
GROUPS = ("single", "two", "chained", "no_change")
SCORE = re.compile(r"(?<![\w.])[01]\.\d{2,}(?![\w.]*\d)|\d+ ?%")  # 0.91, 1.000, 40 %; no version, no part of a name


def write_results(folder: Path, value: float = 0.5, name: str = "toy.json") -> Path:
    """A results file of `evaluation.scenes`, and what lies beside it."""
    share = {"value": value, "n": 8, "low": value - 0.1, "high": value + 0.1}
    drawing = {"overall": value, "categories": {"two_object": share}, "attributes": {"shape": share}}
    questions = {"overall": share, "types": {"color": share, "where": share | {"value": value / 2}}}
    parts: dict[str, Any] = dict.fromkeys(("understanding_question", "understanding_paraphrase"), questions)
    parts |= dict.fromkeys(("drawing_prompt", "drawing_paraphrase", "interleaved"), drawing)
    run = {
        "command": "python -m toy",
        "commit": "abc",
        "hardware": "a box",
        "protocol": "Toy.",
        "versions": {"torch": "9"},
    }
    results = {"benchmark": "scenes", "model": "toy", **parts, "reconstruction": {"strict": share}, "run": run}
    path = folder / name
    path.write_text(json.dumps(results), encoding="utf-8")
    answers = [{"question": "how many?", "answer": "two", "expected": "three", "correct": False}]
    path.with_name(path.stem + "_answers.json").write_text(json.dumps(answers), encoding="utf-8")
    return path


def write_page(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = ["\n".join(card.markers(name)) for name in names]
    path.write_text("\n\n".join(["# before", *sections, "after"]) + "\n", encoding="utf-8")
    return path


def run_card(results: Path, *pages: Path, more: tuple[str, ...] = ()) -> None:
    report.main(["card", "--results", str(results), "--card", *map(str, pages), *more])


def every_number(part: Any) -> list[float]:
    """All numbers of a JSON file but bookkeeping."""
    if isinstance(part, dict):
        return [number for value in part.values() for number in every_number(value)]
    return [float(part)] if isinstance(part, (int, float)) else []


def sections_of(text: str) -> dict[str, str]:
    return {
        name: text.split(begin)[1].split(end)[0]
        for name in card.SECTIONS
        for begin, end in [card.markers(name)]
        if begin in text
    }


# ---- this repository


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    if not HELDOUT.is_file():
        pytest.skip("results/pisces-tiny.json is not here")


def test_the_pages_and_the_plot_of_this_repository_say_what_the_results_files_say(here):
    report.main(["card", "--check"])


def test_every_score_in_the_pages_is_a_number_of_a_results_file(here):
    """Read without the code that writes them: a number that no results file has is found in any cell."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (HELDOUT, SHOWN, EDITS) if path.is_file()]
    known = {f"{number:.{digits}f}" for part in files for number in every_number(part) for digits in (2, 3)}
    protocols = [str(value) for part in files for value in part["run"].values()]
    for page in PAGES:
        for name, section in sections_of((ROOT / page).read_text(encoding="utf-8")).items():
            for protocol in protocols:
                section = section.replace(protocol, "")
            found = SCORE.findall(section.replace("95 % intervals", ""))
            assert len(found) >= 4, f"{page}: {name} has no numbers"
            assert not (unknown := sorted(set(found) - known)), f"{page}, {name}: {unknown} are in no results file"


def test_no_score_stands_in_the_pages_outside_of_the_generated_parts(here):
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        sections = sections_of(text)
        assert sections, f"{page} has no generated part"
        for section in sections.values():
            text = text.replace(section, "")
        assert not (found := SCORE.findall(text)), (
            f"{page}: {found} stand there by hand. Let evaluation.report write them."
        )


# ---- any checkpoint


def test_edits_beside_the_results_get_a_table_with_their_baselines_and_the_sheet(tmp_path):
    pytest.importorskip("matplotlib")
    results, page = write_results(tmp_path), write_page(tmp_path / "pages/card.md", "results")
    run_card(results, page)
    assert "edits" not in page.read_text()
    groups = {group: {"both": {"value": 0.25, "n": 8, "low": 0.1, "high": 0.5}} for group in GROUPS}
    run = json.loads(results.read_text())["run"] | {"protocol": "Toys are changed."}
    found = {"benchmark": "edits", "model": "toy", "edit": {"groups": groups}, "copy": {"groups": groups}, "run": run}
    (tmp_path / "toy-edits.json").write_text(json.dumps(found))
    run_card(results, page)
    text = page.read_text()
    assert "| **the model** |" + " 0.250 (0.10-0.50) |" * 4 in text and "| the source as it is | 0.250" in text
    assert "Edits: Toys are changed. Measured with" in text and "(../toy-edits_edits.png)" in text
    assert "drawn again" not in text  # a way that was not measured


def test_a_number_changed_by_hand_is_found(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, page = write_results(tmp_path), write_page(tmp_path / "card.md", "results", "claims")
    run_card(results, page)
    run_card(results, page, more=("--check",))
    page.write_text(page.read_text().replace("0.500", "0.900", 1))
    with pytest.raises(SystemExit, match=r"card\.md: not what .*toy\.json says. Run python -m evaluation.report card"):
        run_card(results, page, more=("--check",))
    assert "0.900" in page.read_text()  # a check writes nothing


def test_a_plot_of_older_numbers_is_found(tmp_path):
    pytest.importorskip("matplotlib")
    page = write_page(tmp_path / "card.md", "claims")
    run_card(write_results(tmp_path), page)
    new = write_results(tmp_path, value=0.75)
    page.write_text(card.fill(page, card.Sources(new)))  # the text is up to date, the plot is not
    with pytest.raises(SystemExit, match=r"^error: \S*toy_scores\.png: not what"):
        run_card(new, page, more=("--check",))


def test_the_tables_hold_value_and_interval_and_the_weakest_are_named(tmp_path):
    pytest.importorskip("matplotlib")
    page = write_page(tmp_path / "pages/card.md", "results", "claims")
    run_card(write_results(tmp_path), page)
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith("\nafter\n")
    assert "| color | 0.500 (0.40-0.60) | 0.500 (0.40-0.60) |\n| where | 0.250 (0.40-0.60) |" in text
    assert "| two object | 0.500 (0.40-0.60) | 0.500 (0.40-0.60) |\n| **overall** (mean) | 0.500 | 0.500 |" in text
    assert "Measured with `python -m toy` at commit abc, on a box, torch 9." in text
    assert "| how many? | two | wrong: three |" in text
    assert "answers 0.50 of the questions exactly (weakest: where 0.25, color 0.50)," in text
    assert "![drawings](../toy_drawings.png)" in text  # as seen from the page
    assert "shown combinations" not in text


def test_shown_combinations_stand_beside_held_out_ones(tmp_path):
    pytest.importorskip("matplotlib")
    page, results = write_page(tmp_path / "card.md", "results"), write_results(tmp_path)
    write_results(tmp_path, value=0.75, name="toy-shown.json")
    run_card(results, page)
    text = page.read_text()
    assert "| color | 0.500 (0.40-0.60) | 0.500 (0.40-0.60) | 0.750 (0.65-0.85) |" in text
    assert "| strict | 0.500 (0.40-0.60) | 0.750 (0.65-0.85) |" in text
    write_results(tmp_path, value=0.8, name="toy-shown.json")
    with pytest.raises(SystemExit, match=r"card\.md, \S*toy_scores\.png: not what"):
        run_card(results, page, more=("--check",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"toy\.json: no results file .* Write one: python -m evaluation.scenes"),
        ("{", r"toy\.json: no results file"),
        (
            '{"benchmark": "geneval-variant"}',
            "of the benchmark 'geneval-variant', expected one of evaluation.scenes. Write one: python -m evaluation.scenes",
        ),
        ("[]", "a list or a single value"),
        ("{}", "of the benchmark None"),
    ],
)
def test_a_file_that_is_no_result_of_the_scenes_ends_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "toy.json").write_text(content)
    page = write_page(tmp_path / "card.md", "results")
    before = page.read_text()
    with pytest.raises(SystemExit, match=message) as stop:
        run_card(tmp_path / "toy.json", page)
    assert "\n" not in str(stop.value) and page.read_text() == before


def test_a_page_without_markers_or_without_a_file_is_refused_before_any_is_written(tmp_path):
    results, good = write_results(tmp_path), write_page(tmp_path / "good.md", "claims")
    before, bare = good.read_text(), write_page(tmp_path / "bare.md")
    with pytest.raises(SystemExit, match=r"bare\.md lacks its markers. Put these .*results: begin"):
        run_card(results, good, bare)
    with pytest.raises(SystemExit, match=r"none\.md: no such page"):
        run_card(results, good, tmp_path / "none.md")
    assert good.read_text() == before
