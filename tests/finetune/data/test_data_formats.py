"""Claims about `finetune.data.load` and its readers: every format, found by itself, and its broken files by line."""

import json

import datasets
import pytest

from finetune.data.load import load_data
from finetune.data.schema import DataError, iter_pictures, side_of
from finetune.scenes.render import write_scenes
from tests.finetune.data.data_files import picture, prompt, write_captions, write_jsonl, write_pictures, write_tar


def prompts(data, **keys):
    return [prompt(row) for row in load_data({"path": str(data), **keys} if keys else data)]


def first_picture(row):
    return next(iter_pictures(row))[1]["image"]


# ---- text files


def test_json_lines_are_found_and_their_pictures_opened(tmp_path):
    path = write_captions(tmp_path, 3)
    rows = load_data(path)
    assert len(rows) == 3 and rows.num_bad_records == 0
    assert prompts(path) == ["picture 0", "picture 1", "picture 2"]
    assert first_picture(rows[2]).getpixel((0, 0)) == (80, 90, 160)
    assert first_picture(rows.row(2)) == str(tmp_path / "2.png")
    assert rows.place(2) == f"{path}, line 3" and rows[2]["id"] == "captions-3"
    assert prompts(tmp_path) == prompts(path)  # the folder holds one data file


def test_a_broken_line_costs_one_record_and_is_named(tmp_path):
    write_pictures(tmp_path, "a.png")
    good = {"image": "a.png", "caption": "a"}
    lines = [good, '{"image": "a.png", "caption": }', good, "", {"image": "b.png", "caption": "b"}, '"text"']
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    rows = load_data({"path": path, "max_bad_records": 3})
    assert len(rows) == 2 and rows.num_bad_records == 3
    assert [str(record) for record in rows.left_out] == [
        f"{path}, line 2: not JSON (Expecting value, column 31); expected one JSON object per line",
        f"{path}, line 5: picture 0: no file 'b.png' in {tmp_path}, expected a picture (see image_folder)",
        f"{path}, line 6: found str 'text', expected an object with fields",
    ]
    with pytest.raises(
        DataError, match=r"3 of 5 records are bad, more than max_bad_records \(0.02\).*line 2: not JSON"
    ):
        load_data(path)


def test_lines_that_are_no_utf8_or_too_deep_are_named(tmp_path):
    path = write_captions(tmp_path, 1)
    path.write_bytes(path.read_bytes() + b'{"caption": "\xff"}\n' + b"[" * 100_000 + b"\n")
    reasons = [record.reason for record in load_data({"path": path, "max_bad_records": 2}).left_out]
    assert reasons[0].startswith("not UTF-8 (byte 14 of the line)") and "nested too deeply" in reasons[1]


def test_a_json_array_gives_the_line_of_each_record(tmp_path):
    write_pictures(tmp_path, "a.png")
    records = [
        {"image": "a.png", "caption": "one"},
        {"image": "x.png", "caption": "two"},
        {"image": "a.png", "caption": "drei ü"},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    rows = load_data({"path": path, "max_bad_records": 1})
    assert [prompt(row) for row in rows] == ["one", "drei ü"]
    assert rows.place(0) == f"{path}, line 2" and rows.place(1) == f"{path}, line 10"
    assert rows.left_out[0].place == f"{path}, line 6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"line 2: not JSON \(Expecting ':' delimiter\)"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2: not JSON \(expected ',' or '\]'\)"),
        ('[{"a": 1},\n', r"line 2: not JSON \(Expecting value\)"),
        ('[{"a": 1},]', r"line 1: not JSON \(Expecting value\)"),
        ('{"data": []}', r"line 1: found '{\"data\": \[\]}', expected an array of records"),
        ("[]", "found no records, expected at least one"),
        ("", "found '', expected an array"),
    ],
)
def test_json_that_cannot_be_read_further_ends_with_its_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "data.json")


def test_json_lines_in_a_json_file_are_read(tmp_path):
    assert len(load_data(write_captions(tmp_path, 2, "captions.json"))) == 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_read_with_its_delimiter_quotes_and_line_breaks(tmp_path, delimiter):
    write_pictures(tmp_path, "a.png")
    lines = ["\ufefffile_name|caption", 'a.png|"two\nlines"', "a.png|", "a.png|x|y", '"a.png"|"say ""hi"", now"']
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines).replace("|", delimiter) + "\n", encoding="utf-8")
    rows = load_data({"path": path, "max_bad_records": 2})
    assert [prompt(row) for row in rows] == ["two\nlines", 'say "hi", now']
    first, second = rows.left_out
    assert first.place == f"{path}, line 4" and first.reason.startswith("found fields file_name, expected")
    assert str(second) == f"{path}, line 5: found 3 cells, expected 2 (file_name, caption); quote commas in text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1: found \[\], expected the names of the columns"),
        (b"a,a\n1,2\n", r"line 1: found \['a', 'a'\], expected the names of the columns, each once"),
        (b"file_name,caption\na.png,\xff\n", "not UTF-8 .*CSV UTF-8"),
        (b'file_name,caption\na.png,"x"y\n', "line 2: not CSV"),
        (b"file_name,caption\n", "found no records"),
    ],
)
def test_csv_that_cannot_be_read_says_why(tmp_path, content, message):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "data.csv")


def test_wrong_column_names_stop_at_once_with_the_names(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"picture": "a.png", "words": "a"}] * 5000)
    with pytest.raises(
        DataError, match=r"none of 100 records can be used; .*line 1: found fields picture, words, expected"
    ):
        load_data(path)


def test_image_folder_and_max_rows_are_used(tmp_path):
    write_pictures(tmp_path / "pictures", "a.png", "b.png")
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": f"{name}.png", "caption": name} for name in "abc"])
    assert prompts(path, image_folder=str(tmp_path / "pictures"), max_rows=2) == ["a", "b"]
    with pytest.raises(DataError, match="image_folder: no folder"):
        load_data({"path": path, "image_folder": "nowhere"})


# ---- folders


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_imagefolder_reads_metadata_of_every_folder_below(tmp_path, name):
    for below in ("", "more"):
        write_pictures(tmp_path / below, "a.png")
        record = {"file_name": "a.png", "text": f"caption {below}"}
        lines = [",".join(record), ",".join(record.values())] if name.endswith("csv") else [json.dumps(record)]
        (tmp_path / below / name).write_text("\n".join(lines), encoding="utf-8")
    assert prompts(tmp_path) == ["caption ", "caption more"]


def test_imagefolder_agrees_with_datasets(tmp_path):
    write_captions(tmp_path, 3, "metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text(
        (tmp_path / "metadata.jsonl").read_text().replace('"image"', '"file_name"')
    )
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    ours = load_data(tmp_path)
    assert [prompt(row) for row in ours] == theirs["caption"]
    assert [first_picture(row).tobytes() for row in ours] == [image.tobytes() for image in theirs["image"]]


def test_imagefolder_takes_the_split_that_is_asked_for(tmp_path):
    for split in ("train", "test"):
        write_pictures(tmp_path / split, "a.png")
        write_jsonl(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    assert prompts(tmp_path) == ["train"] and prompts(tmp_path, split="test") == ["test"]
    assert prompts(tmp_path, format="imagefolder", split="test") == ["test"]
    with pytest.raises(DataError, match="split: no folder 'dev' in it"):
        load_data({"path": tmp_path, "split": "dev"})


def test_text_files_beside_pictures_are_captions(tmp_path):
    write_pictures(tmp_path, "a.png", "b.jpg", "c.png")
    (tmp_path / "a.txt").write_text("caption a\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("caption b", encoding="utf-8")
    rows = load_data({"path": tmp_path, "max_bad_records": 1})
    assert [prompt(row) for row in rows] == ["caption a", "caption b"]
    assert str(rows.left_out[0]) == f"{tmp_path}/c.png: no caption; expected a text file c.txt beside it"


def test_scenes_give_drawings_and_questions(tmp_path):
    rows = load_data(write_scenes(tmp_path / "scenes", num_scenes=2, seed=1))
    sides = [side_of(row) for row in rows]
    assert sides.count("understanding") == 2 and sides.count("generation") > 4
    asked = next(row for row in rows if side_of(row) == "understanding")
    assert asked["id"].endswith("-ask") and len(asked["messages"]) == 12


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found no data, expected pictures with captions, one data file, or shards"),
        (["a.png"], r"1 pictures but no captions; expected metadata.jsonl or metadata.csv"),
        (["a.csv", "b.jsonl"], r"found 2 data files \(a.csv, b.jsonl\), expected one. Name the file"),
    ],
)
def test_a_folder_that_does_not_show_what_it_is_says_what_is_missing(tmp_path, files, message):
    write_pictures(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


def test_missing_and_unknown_files_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder.*write hf:owner/name"):
        load_data("owner/name")
    with pytest.raises(DataError, match=r"data.jsonl: no such file or folder"):
        load_data(tmp_path / "data.jsonl")
    (tmp_path / "data.xml").touch()
    with pytest.raises(DataError, match=r"unknown kind of file; expected a folder or a file ending in .jsonl"):
        load_data(tmp_path / "data.xml")


@pytest.mark.parametrize("key", [{"split": "test"}, {"revision": "main"}, {"subset": "x"}, {"streaming": True}])
def test_keys_without_effect_are_refused(tmp_path, key):
    with pytest.raises(DataError, match=rf"{next(iter(key))} has no effect on format jsonl, expected one of"):
        load_data({"path": write_captions(tmp_path, 1), **key})


def test_a_given_format_counts_more_than_the_suffix(tmp_path):
    path = write_captions(tmp_path, 2)
    path.rename(tmp_path / "captions.txt")
    assert prompts(tmp_path / "captions.txt", format="jsonl") == ["picture 0", "picture 1"]
    with pytest.raises(DataError, match="found a folder, which format jsonl is not"):
        load_data({"path": tmp_path, "format": "jsonl"})
    with pytest.raises(DataError, match="found a file, which format scenes is not"):
        load_data({"path": tmp_path / "captions.txt", "format": "scenes"})


def test_a_broken_scene_is_named(tmp_path):
    path = write_scenes(tmp_path / "scenes", num_scenes=1, seed=1) / "scenes.jsonl"
    path.write_text(path.read_text() + '{"id": "x"}\n[broken\n')
    reasons = [str(record) for record in load_data({"path": tmp_path / "scenes", "max_bad_records": 2}).left_out]
    assert reasons[0].startswith(f"{path}, line 2: found dict {{'id': 'x'}} (KeyError('image')), expected a scene")
    assert reasons[1].startswith(f"{path}, line 3: not JSON")


# ---- tables


@pytest.fixture(scope="module")
def table():
    rows = {"image": [{"bytes": picture(color), "path": f"{color}.png"} for color in ("red", "green", "blue")]}
    rows["caption"] = ["red", "green", "blue"]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def test_parquet_keeps_pictures_encoded_until_a_row_is_asked_for(tmp_path, table):
    table.to_parquet(tmp_path / "data.parquet")
    rows = load_data(tmp_path / "data.parquet")
    assert [prompt(row) for row in rows] == ["red", "green", "blue"]
    assert first_picture(rows.row(0)) == picture("red")
    assert first_picture(rows[2]).getpixel((0, 0)) == (0, 0, 255)
    assert rows.place(1).endswith("data.parquet, row 1")
    assert prompts(tmp_path) == ["red", "green", "blue"] and prompts(tmp_path, max_rows=1) == ["red"]


def test_parquet_trains_both_sides_when_asked(tmp_path, table):
    table.to_parquet(tmp_path / "data.parquet")
    rows = load_data({"path": tmp_path / "data.parquet", "side": "both"})
    assert [side_of(row) for row in rows] == ["understanding", "generation"] * 3
    assert rows.place(3).endswith("row 1")


def test_parquet_with_lists_of_pictures_and_messages_is_read(tmp_path):
    """As TRL writes it: places in the messages, pictures in a column."""
    asked = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [{"role": datasets.Value("string"), "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}]}],
        }
    )  # fmt: skip
    rows = {"images": [[{"bytes": picture(), "path": None}]], "messages": [[asked, said]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    (row,) = load_data(tmp_path / "data.parquet")
    assert side_of(row) == "understanding" and prompt(row) == "what?" and first_picture(row).size == (8, 6)


def test_wrong_columns_of_a_table_are_refused_before_it_is_read(tmp_path, table):
    table.rename_column("caption", "words").to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data.parquet: found fields image, words, expected one of these sets"):
        load_data(tmp_path / "data.parquet")
    assert prompts(tmp_path / "data.parquet", columns={"prompt": "words"}) == ["red", "green", "blue"]


def test_a_table_of_paths_may_not_lead_out(tmp_path, table):
    write_pictures(tmp_path, "secret.png")
    inside = tmp_path / "data"
    inside.mkdir()
    features = datasets.Features({"image": datasets.Value("string"), "caption": datasets.Value("string")})
    rows = {"image": ["../secret.png"], "caption": ["x"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(inside / "data.parquet")
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_data(inside / "data.parquet")[0]


def test_saved_datasets_are_recognised_with_their_splits(tmp_path, table):
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "two")
    assert prompts(tmp_path / "one") == ["red", "green", "blue"]
    assert prompts(tmp_path / "two", split="test") == ["blue"]
    with pytest.raises(DataError, match="found splits train, test, expected one"):
        load_data({"path": tmp_path / "two", "split": "dev"})


def test_a_hub_id_offline_says_what_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"nobody/nothing: cannot be read \(.*Offline, only what was downloaded before"
    ):
        load_data("hf:nobody/nothing")


def test_parquet_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nope.parquet: cannot be read \(no file"):
        load_data(tmp_path / "nope.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read"):
        load_data(tmp_path / "bad.parquet")


# ---- tar


def test_tar_samples_become_rows(tmp_path):
    ask = {"question": "what?", "answer": "red"}
    conversation = {
        "image": "ignored.png",
        "conversations": [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "two"}],
    }
    files = {
        "a/0001.png": picture(),
        "a/0001.txt": "a caption\n",
        "a/0001.cls": b"3",
        "a/0002.jpg": picture(format="JPEG"),
        "a/0002.json": ask,
        "._0002.jpg": b"what a Mac adds",
        "0003.0.png": picture("green"),
        "0003.1.png": picture("blue"),
        "0003.json": conversation,
    }
    write_tar(tmp_path / "data.tar", files)
    stream = load_data({"path": tmp_path / "data.tar", "shuffle_buffer": 1})
    places, rows = zip(*stream.iter_checked(), strict=True)
    assert places == tuple(f"{tmp_path}/data.tar, {key}" for key in ("a/0001", "a/0002", "0003"))
    assert [prompt(row) for row in rows] == ["a caption", "what?", ""]
    assert [side_of(row) for row in rows] == ["generation", "understanding", "understanding"]
    colors = [part["image"].getpixel((0, 0)) for _, part in iter_pictures(rows[2])]
    assert colors == [(0, 128, 0), (0, 0, 255)]


def test_damage_in_a_tar_costs_what_it_damages(tmp_path):
    files = {
        "0.png": b"no picture",
        "0.txt": "x",
        "1.png": picture(),
        "1.json": "{",
        "2.png": picture(),
        "2.txt": "good",
    }
    path = write_tar(tmp_path / "data.tar", files)
    path.write_bytes(path.read_bytes()[:-2000])  # cuts the padding at the end, and nothing else
    found = {place.split(", ")[-1]: row for place, row in load_data({"path": path}).iter_checked()}
    assert "not a picture in a format PIL knows" in str(found["0"])
    assert "1.json: Expecting property name" in str(found["1"])
    assert prompt(found["2"]) == "good"
    path.write_bytes(path.read_bytes()[:3000])
    *_, (place, error) = load_data({"path": path}).iter_checked()
    assert place == str(path) and "the tar file cannot be read further" in str(error)


def test_shards_are_found_by_folder_pattern_and_braces(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"data-{number:03d}.tar", {"0.png": picture(), "0.txt": str(number)})
    assert len(load_data(tmp_path).shards) == 12
    assert len(load_data(str(tmp_path / "data-00*.tar")).shards) == 10
    braces = load_data(str(tmp_path / "data-{009..011}.tar"))
    assert [shard.path[-7:] for shard in braces.shards] == ["009.tar", "010.tar", "011.tar"]
    with pytest.raises(DataError, match="found no tar files"):
        load_data(str(tmp_path / "other-*.tar"))
    with pytest.raises(DataError, match="max_rows has no effect on a stream"):
        load_data({"path": tmp_path, "max_rows": 3})


# ---- the table of formats


def test_a_format_is_one_row_of_one_table():
    from finetune.data import formats, spec
    from finetune.data.readers import files

    fields = set(spec.DataSpec.__dataclass_fields__)
    for name, row in formats.FORMATS.items():
        assert set(row.keys) <= fields and name in spec.CHOICES
        assert (row.reader is None) == (row.kind in ("table", "shards"))
        assert row.reader is None or files.reader_of(name).__name__ == row.reader
    every = [suffix for row in formats.FORMATS.values() for suffix in row.suffixes]
    assert len(every) == len(set(every)), "two formats with one suffix"


def test_a_row_is_all_that_a_new_format_of_text_needs(tmp_path, monkeypatch):
    from finetune.data import formats, load
    from finetune.data.readers import files

    def read_lines(path):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            prompt, _, answer = line.partition("?")
            value = {"messages": [{"role": "user", "content": prompt + "?"}, {"role": "assistant", "content": answer}]}
            yield files.Record(f"{path}, line {number}", f"line-{number}", value)

    (tmp_path / "rows.ask").write_text("One and one?two\n")
    monkeypatch.setattr(files, "read_lines", read_lines, raising=False)
    monkeypatch.setitem(formats.FORMATS, "ask", formats.Format("file", suffixes=(".ask",), reader="read_lines"))
    monkeypatch.setitem(formats.SUFFIX_FORMATS, ".ask", "ask")
    (row,) = load.load_data(str(tmp_path / "rows.ask"))
    assert row["messages"][1]["content"][0]["text"] == "two"
    with pytest.raises(DataError, match=r"split has no effect on format ask"):
        load.load_data({"path": str(tmp_path / "rows.ask"), "split": "train"})
