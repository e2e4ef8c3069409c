"""The emoji example writes data that every recipe reads, says only what names say, and keeps what it holds out apart."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.emoji import contact_sheet, make_data
from examples.emoji.compositions import compose, relatives
from examples.emoji.source import plain_name, read_emoji
from examples.emoji.texts import captions, with_article
from finetune import check_data
from finetune.data.load import load_data
from pisces_commands.ending import CommandEnd
from tests.examples.emoji_packages import write_packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder, "twitter", without=("anchor",))
    return write_packages(folder)


@pytest.fixture(scope="module")
def data(packages, tmp_path_factory):
    return write(packages, tmp_path_factory.mktemp("data") / "emoji")


def write(packages, output, *flags):
    arguments = ["--source", str(packages), "--output", str(output), "--unseen_concepts", "5", *flags]
    make_data.main(arguments)
    return output


def truth(data):
    return [json.loads(line) for line in (data / "truth" / "pictures.jsonl").read_text().splitlines()]


def texts_of(data, split="train"):
    rows = load_data({"path": str(data), "split": split})
    return [
        part["text"] for row in rows.iter_rows() for m in row["messages"] for part in m["content"] if "text" in part
    ]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the folder


def test_check_data_finds_nothing_wrong_without_a_flag(data, capsys):
    code = check_data.main(["--data", str(data), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    assert not any(source["bad_records"] for source in report["sources"])


def test_each_split_is_read_by_its_name_and_holds_its_own_pictures(data):
    counts = Counter(row["split"] for row in truth(data))
    for split in ("train", "heldout", "concepts"):
        rows = load_data({"path": str(data), "split": split})
        shown = {
            part["image"]
            for row in rows.iter_rows()
            for m in row["messages"]
            for part in m["content"]
            if "image" in part
        }
        assert len(shown) == counts[split] > 0
        assert all(f"/{split}/images/" in Path(path).as_posix() for path in shown)


def test_the_same_command_writes_the_same_bytes_and_another_seed_other_ones(packages, data, tmp_path):
    assert files_of(write(packages, tmp_path / "again")) == files_of(data)
    assert files_of(write(packages, tmp_path / "other", "--seed", "1")) != files_of(data)


def test_pictures_are_on_white_whatever_colour_is_hidden_under_nothing(packages, data, tmp_path):
    for folder in (data, write(packages, tmp_path / "twitter", "--vendor", "twitter")):
        for row in truth(folder):
            image = Image.open(folder / row["image"])
            assert image.mode == "RGB" and image.size == (64, 64)
            assert image.getpixel((63, 0)) == (255, 255, 255)


def test_size_scales_pictures_after_they_are_on_white(packages, tmp_path):
    folder = write(packages, tmp_path / "large", "--size", "96")
    for row in truth(folder)[:20]:
        pixels = np.asarray(Image.open(folder / row["image"]))
        assert pixels.shape == (96, 96, 3)
        assert (pixels[:2] == 255).all()  # no green fringe, even where the kernel rings


def test_a_license_names_the_artist_and_the_packages(packages, data, tmp_path):
    assert "Noto Emoji" in (data / "LICENSE").read_text() and "Apache License 2.0" in (data / "LICENSE").read_text()
    other = write(packages, tmp_path / "twitter", "--vendor", "twitter")
    assert "CC-BY 4.0" in (other / "LICENSE").read_text() and "emojilib" in (other / "LICENSE").read_text()


# ---- what is held out


def test_no_held_out_composition_is_named_or_shown_in_training(data):
    rows = truth(data)
    trained = {(row["concept"], row["attribute"]) for row in rows if row["split"] == "train"}
    titles = {row["title"] for row in rows if row["split"] == "heldout"}
    assert {row["attribute_kind"] for row in rows if row["split"] == "heldout"} == {"tone", "color", "time"}
    assert not trained & {(row["concept"], row["attribute"]) for row in rows if row["split"] == "heldout"}
    words = texts_of(data)
    assert not [text for text in words for held in titles if text == held or text.startswith(f"{held},")]
    pictures = {
        split: {(data / row["image"]).read_bytes() for row in rows if row["split"] == split}
        for split in ("train", "heldout", "concepts")
    }
    assert not pictures["train"] & pictures["heldout"] and not pictures["train"] & pictures["concepts"]


def test_both_parts_of_a_held_out_composition_are_trained_in_other_pairs(data):
    rows = truth(data)
    trained = [row for row in rows if row["split"] == "train"]
    for row in (row for row in rows if row["split"] == "heldout" and row["attribute_kind"] != "time"):
        assert any(other["concept"] == row["concept"] and other["attribute"] for other in trained)
        assert any(other["attribute"] == row["attribute"] and other["concept"] != row["concept"] for other in trained)
    times = [row["attribute"] for row in rows if row["split"] == "heldout" and row["attribute_kind"] == "time"]
    assert len({time.split()[0] for time in times}) == len(times) == 4  # of each hour one half is trained


def test_a_tone_is_held_out_for_man_woman_person_and_mirror_image_alike(data):
    rows = truth(data)
    held = {(relatives(row["name"]), row["attribute"]) for row in rows if row["split"] == "heldout"}
    trained = {(relatives(row["name"]), row["attribute"]) for row in rows if row["split"] == "train"}
    assert not held & trained
    names = {row["name"] for row in rows if row["split"] == "heldout" and row["attribute_kind"] == "tone"}
    assert len({relatives(name) for name in names}) < len(names) and "kiss" not in names


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("woman pilot", "pilot"),
        ("pilot", "pilot"),
        ("bald man", "bald"),
        ("man", "man"),
        ("thumbs up", "thumbs up"),
        ("person running facing right", "running"),
        ("woman with red hair", "with red hair"),
    ],
)
def test_relatives_share_what_is_left_without_man_or_woman(name, shared):
    assert relatives(name) == shared


def test_unseen_concepts_have_no_relative_in_training(data):
    rows = [row for row in truth(data) if row["split"] == "concepts"]
    assert len(rows) == 5
    assert all(row["attribute_kind"] is None and row["kind"] in ("object", "face") for row in rows)
    words = " ".join(texts_of(data)).split()
    assert not any(row["name"] in words for row in rows)


def test_two_vendors_share_names_words_and_split(packages, data, tmp_path):
    other = write(packages, tmp_path / "twitter", "--vendor", "twitter")
    google, twitter = ({row["code"]: row for row in truth(folder)} for folder in (data, other))
    both = google.keys() & twitter.keys()
    assert len(both) > 90
    for code in both:
        assert {**google[code], "vendor": ""} == {**twitter[code], "vendor": ""}
    assert "anchor" in {row["name"] for row in google.values()} - {row["name"] for row in twitter.values()}


def test_two_names_of_one_drawing_are_one_picture(data):
    names = {row["name"] for row in truth(data)}
    assert "flag of norway" in names and "flag of bouvet island" not in names


def test_max_pictures_takes_some_of_the_training_pictures_and_all_others(packages, data, tmp_path):
    few = write(packages, tmp_path / "few", "--max_pictures", "10")
    counts, of_all = (Counter(row["split"] for row in truth(folder)) for folder in (few, data))
    assert counts == {**of_all, "train": 10}


# ---- what is said


def test_a_caption_says_the_tone_and_no_two_pictures_share_a_title(data):
    rows = truth(data)
    assert len({row["title"] for row in rows}) == len(rows)
    titles = {row["title"] for row in rows}
    assert {"pilot", "pilot with medium-dark skin", "kiss with light and dark skin", "three o'clock"} <= titles


def test_answers_are_the_parts_of_the_name(data):
    asked = {(row["title"], q["type"]): q["answer"] for row in truth(data) for q in row["questions"]}
    assert asked["woman pilot with dark skin", "tone"] == "dark"
    assert asked["woman pilot", "tone"] == "yellow"
    assert asked["red heart", "color"] == "red"
    assert asked["three thirty", "time"] == "three thirty"
    assert asked["woman pilot", "job"] == "pilot" and asked["woman pilot", "gender"] == "woman"
    assert asked["flag of chad", "country"] == "chad"
    assert asked["anchor", "name"] == "anchor" and asked["anchor", "kind"] == "object"


def test_yes_and_no_are_true(data):
    for row in truth(data):
        for asked in row["questions"]:
            if asked["type"] == "yes or no":
                named = asked["question"].removeprefix("is it ").rstrip("?").split(" ")[-1]
                assert asked["answer"] == ("yes" if named == row["kind"] else "no"), (row["title"], asked)


def test_the_rows_ask_what_the_truth_says(data):
    row = next(row for row in truth(data) if row["split"] == "train" and row["attribute_kind"] == "tone")
    rows = load_data(str(data))
    turns = next(r["messages"] for r in rows.iter_rows() if r["id"] == f"{row['code']}-ask")
    said = [part["text"] for message in turns for part in message["content"] if "text" in part]
    assert said == [text for asked in row["questions"] for text in (asked["question"], asked["answer"])]


def test_captions_name_keywords_and_parts(packages):
    import random

    emoji = {e.name: e for e in read_emoji(packages, "google") if e.tones in ((), ("dark",))}
    words = captions(emoji["woman pilot"], random.Random(0))
    assert words[0] == "woman pilot with dark skin" and words[2] == "woman pilot with dark skin, job"
    assert words[-1] == "a woman who works as a pilot, the skin is dark, drawn as an emoji on a white background"
    assert captions(emoji["red circle"], random.Random(0))[2] == "a circle in red"
    assert "half past two" in captions(emoji["two thirty"], random.Random(0))[-1]
    assert "of anchor" not in captions(emoji["anchor"], random.Random(0))[2]  # says nothing new


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("one_o_clock", "one o'clock"),
        ("flag_egypt", "flag of egypt"),
        ("flag_in_hole", "flag in hole"),
        ("man_red_hair", "man with red hair"),
        ("woman_bald", "bald woman"),
        ("kiss_woman_man", "kiss, woman and man"),
        ("family_man_boy", "family of man and boy"),
        ("family_man_girl_boy", "family of man, girl and boy"),
        ("family_man_woman_girl_boy", "family of man, woman, girl and boy"),
        ("family adult, adult, child", "family of adult, adult and child"),
        ("black_large_square", "black square"),
    ],
)
def test_names_are_words_as_people_say_them(given, expected):
    assert plain_name(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("anchor", "an anchor"),
        ("bus", "a bus"),
        ("glass", "a glass"),
        ("lungs", "lungs"),
        ("busts in silhouette", "busts in silhouette"),
        ("flag of chad", "flag of chad"),
        ("flag", "a flag"),
        ("food", "food"),
        ("men holding hands", "men holding hands"),
    ],
)
def test_articles_stand_where_english_has_them(given, expected):
    assert with_article(given) == expected


def test_two_people_of_different_tones_have_no_single_tone(packages):
    pairs = [emoji for emoji in read_emoji(packages, "google") if len(emoji.tones) == 2]
    assert pairs and all(compose(emoji).attribute is None for emoji in pairs)


# ---- the sheet


def test_the_sheet_shows_each_split_and_another_vendor_beside_it(packages, data, tmp_path):
    other = write(packages, tmp_path / "twitter", "--vendor", "twitter")
    contact_sheet.main(["--data", str(data), "--number", "3", "--output", str(tmp_path / "sheet.png")])
    flags = ["--data", str(data), "--other", str(other), "--number", "3"]
    contact_sheet.main([*flags, "--output", str(tmp_path / "both.png")])
    contact_sheet.main([*flags, "--output", str(tmp_path / "again.png")])
    assert Image.open(tmp_path / "sheet.png").height > 3 * 96
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "again.png").read_bytes()


# ---- mistakes


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "emojilib" / "package.json").unlink(), "no package emojilib in it. Get it with `npm install"),
        (
            lambda p: (p / "emoji-datasource-google" / "emoji.json").unlink(),
            "no such file, expected it in this package",
        ),
        (lambda p: (p / "emoji-datasource-google" / "emoji.json").write_text("["), "not JSON"),
        (lambda p: (p / "emoji-datasource-google" / "emoji.json").write_text("{}"), "found a dict, expected a list"),
        (
            lambda p: (p / "emoji-datasource-google" / "emoji.json").write_text('[{"a": 1}]'),
            "entry without 'category'",
        ),
        (lambda p: (p / "emoji-datasource-google" / "emoji.json").write_text("[]"), "only 0 of 0 pictures"),
    ],
)
def test_packages_that_are_not_whole_are_named(tmp_path, break_it, words):
    folder = write_packages(tmp_path / "packages")
    break_it(folder)
    with pytest.raises(CommandEnd) as end:
        write(folder, tmp_path / "data")
    assert words in str(end.value) and end.value.code == 2
    assert not (tmp_path / "data").exists()


def test_a_picture_that_is_missing_is_named_and_nothing_is_left(tmp_path):
    folder = write_packages(tmp_path / "packages")
    lost = next((folder / "emoji-datasource-google" / "img" / "google" / "64").glob("*.png"))
    lost.unlink()
    with pytest.raises(CommandEnd, match=lost.name):
        write(folder, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]


def test_more_unseen_concepts_than_there_are_names_are_refused(packages, tmp_path):
    with pytest.raises(CommandEnd, match=r"--unseen_concepts 50: only .* Give at most"):
        write(packages, tmp_path / "data", "--unseen_concepts", "50")


def test_an_output_that_is_there_is_left_alone(packages, data):
    before = files_of(data)
    with pytest.raises(CommandEnd, match=r"already there\. Choose another --output"):
        write(packages, data)
    assert files_of(data) == before


def test_a_sheet_of_another_folder_is_refused(tmp_path):
    with pytest.raises(CommandEnd, match=r"no truth/pictures\.jsonl in it"):
        contact_sheet.main(["--data", str(tmp_path), "--output", str(tmp_path / "sheet.png")])
