"""Claims about `evaluation.drawing.prompt_sets`; the files are made here, in the formats of the sets' authors."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from evaluation.drawing.prompt_sets import GENEVAL_TASKS, load_prompts, load_rewritten
from tests.evaluation.drawing.drawing_stand_ins import geneval_entries, write_lines, write_wise


def test_all_553_prompts_of_every_geneval_template_are_read_in_order(tmp_path):
    entries = geneval_entries()
    prompts = load_prompts(f"geneval:{write_lines(tmp_path / 'metadata.jsonl', entries)}")
    assert [prompt.metadata for prompt in prompts] == entries
    assert [prompt.index for prompt in prompts] == list(range(553))
    assert Counter(prompt.metadata["tag"] for prompt in prompts) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert prompts[80].text == "a photo of a thing0 and a thing1"


def test_the_published_geneval_file_is_read_whole():
    path = os.environ.get("GENEVAL_METADATA")
    if not path:
        pytest.skip("set GENEVAL_METADATA to prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval")
    prompts = load_prompts(f"geneval:{path}")
    assert Counter(prompt.metadata["tag"] for prompt in prompts) == GENEVAL_TASKS
    assert prompts[0].text == "a photo of a bench"


def broken(change) -> list[dict]:
    entries = geneval_entries()
    change(entries)
    return entries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), r"552 prompts \(.*color_attr 99\), expected 553"),
        (lambda rows: rows.__delitem__(slice(276, None)), r"276 prompts .*position 0.*say own:"),
        (lambda rows: rows[3].update(tag="texture"), "line 4: the tag is 'texture', not one of single_object"),
        (lambda rows: rows[3].update(include=[]), 'line 4: "include" names no objects'),
        (lambda rows: rows[3]["include"][0].pop("class"), "line 4: object 0 has no class"),
        (lambda rows: rows[3]["include"][0].update(count=0), "line 4: object 0 has the count 0, not a number from 1"),
        (lambda rows: rows[3].update(exclude=[{"class": "cow"}]), "line 4: object 1 has the count None"),
        (
            lambda rows: rows[400]["include"][1].update(position=["left of", 1]),
            r"line 401: object 1 has the position \['left of', 1\], not a relation to an earlier object",
        ),
        (lambda rows: rows[400]["include"][1].update(position=["near", 0]), "not a relation to an earlier object"),
        (lambda rows: rows[7].pop("prompt"), "line 8: no object with a text under prompt"),
    ],
)
def test_a_geneval_file_that_is_not_whole_is_refused(tmp_path, change, message):
    path = write_lines(tmp_path / "metadata.jsonl", broken(change))
    with pytest.raises(ValueError, match=message):
        load_prompts(f"geneval:{path}")


def test_a_geneval_file_that_was_cut_off_is_refused(tmp_path):
    path = write_lines(tmp_path / "metadata.jsonl", geneval_entries())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"line 553: not JSON .*cut off"):
        load_prompts(f"geneval:{path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parti:prompts.tsv", r"expected one of geneval:PATH, dpg:PATH, wise:PATH, own:PATH"),
        ("geneval", "expected one of geneval:PATH"),
        ("geneval:nowhere.jsonl", r"nothing at nowhere.jsonl. Take prompts/evaluation_metadata.jsonl of"),
        ("wise:nowhere", r"nothing at nowhere. Take the three JSON files"),
    ],
)
def test_a_missing_set_says_where_it_comes_from(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_prompts(spec)


def dpg_folder(folder: Path, number: int) -> Path:
    folder.mkdir()
    for index in range(number):
        (folder / f"item{index}.txt").write_text(f"a long prompt {index}.\n")
    return folder


def test_dpg_bench_is_a_folder_of_texts_or_its_csv(tmp_path):
    from_folder = load_prompts(f"dpg:{dpg_folder(tmp_path / 'prompts', 1065)}")
    with (tmp_path / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "text", "proposition_id"])
        writer.writerows([f"item{i}", f"a long prompt {i}.", question] for i in range(1065) for question in (1, 2))
    from_csv = load_prompts(f"dpg:{tmp_path / 'dpg_bench.csv'}")
    assert from_folder == from_csv
    assert (from_csv[1].id, from_csv[1].text) == ("item1", "a long prompt 1.")


def test_half_of_dpg_bench_is_refused(tmp_path):
    folder = dpg_folder(tmp_path / "prompts", 500)
    with pytest.raises(ValueError, match=r"500 prompts, expected 1065. Take the folder dpg_bench/prompts"):
        load_prompts(f"dpg:{folder}")
    (tmp_path / "x.csv").write_text("id,prompt\n1,a\n")
    with pytest.raises(ValueError, match="no columns item_id and text"):
        load_prompts(f"dpg:{tmp_path / 'x.csv'}")


def test_an_empty_dpg_prompt_is_refused(tmp_path):
    folder = dpg_folder(tmp_path / "prompts", 1065)
    (folder / "item7.txt").write_text("\n")
    with pytest.raises(ValueError, match="the prompt item7 is empty"):
        load_prompts(f"dpg:{folder}")


def test_wise_is_three_files_of_one_release(tmp_path):
    folder = write_wise(tmp_path / "data", {"science": 300, "culture": 400, "time": 300})
    prompts = load_prompts(f"wise:{folder}")
    assert [prompt.id for prompt in prompts] == [str(number) for number in range(1, 1001)]
    assert prompts[999].text == prompts[999].metadata["prompt"] == "riddle 1000"
    (folder / "culture_rewrite.json").write_text((folder / "culture.json").read_text())
    with pytest.raises(ValueError, match=r"1400 prompts, expected 1000. Take the three JSON files of one release"):
        load_prompts(f"wise:{folder}")


def test_wise_ids_that_come_twice_are_refused(tmp_path):
    folder = write_wise(tmp_path / "data", {"a": 500, "b": 500})
    (folder / "b.json").write_text((folder / "a.json").read_text())
    with pytest.raises(ValueError, match="the id '1' is given to more than one prompt"):
        load_prompts(f"wise:{folder}")


def test_a_wise_file_of_another_form_is_named(tmp_path):
    folder = write_wise(tmp_path / "data", {"a": 500})
    (folder / "b.json").write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(ValueError, match=r"b.json: no list of objects with prompt_id and Prompt"):
        load_prompts(f"wise:{folder}")


def test_own_prompts_may_be_any_number_but_not_none(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [{"prompt": "a cat"}, {"prompt": "a dog", "mood": "glad"}])
    assert [(prompt.id, prompt.text, prompt.metadata) for prompt in load_prompts(f"own:{path}")] == [
        ("00000", "a cat", {"prompt": "a cat"}),
        ("00001", "a dog", {"prompt": "a dog", "mood": "glad"}),
    ]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts in it"):
        load_prompts(f"own:{path}")


def test_rewritten_prompts_are_matched_by_the_published_words(tmp_path):
    prompts = load_prompts(f"own:{write_lines(tmp_path / 'own.jsonl', [{'prompt': 'a cat'}, {'prompt': 'a dog'}])}")
    rows = [{"prompt": "a dog", "rewritten": "a happy dog"}, {"prompt": "a cat", "rewritten": "a cat in the sun"}]
    assert load_rewritten(write_lines(tmp_path / "new.jsonl", rows), prompts) == ["a cat in the sun", "a happy dog"]
    with pytest.raises(ValueError, match="1 of 2 prompts are not rewritten, the first is 'a cat'"):
        load_rewritten(write_lines(tmp_path / "new.jsonl", rows[:1]), prompts)
    with pytest.raises(ValueError, match=r"gone.jsonl: no such file. Expected JSONL with prompt and rewritten"):
        load_rewritten(tmp_path / "gone.jsonl", prompts)
