"""Every form of data is read as the same records, and what must not be read is not."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.export import main as export
from curation.scan import main as scan
from curation.shards.index import Index
from finetune.check_data import main as check_data
from tests.curation.curation_fixtures import column_of, encode, photo, tree, write_collection


def rows_of(tmp_path, *paths, flags=()):
    data = [str(path) for path in paths]
    assert scan(["--data", *data, "--index", str(tmp_path / "index"), "--processes", "1", *flags]) == 0
    return list(Index(tmp_path / "index").iter_rows())


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


PICTURES = {f"{n}.png": encode(photo(n)) for n in range(3)}


def as_folder(tmp_path):
    return write_collection(tmp_path / "photos", PICTURES)


def as_sidecars(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"a picture called {name[0]}\n")
    return folder


def as_csv(tmp_path):
    as_folder(tmp_path)
    lines = [f"photos/{n}.png;a picture called {n}" for n in range(3)]
    (tmp_path / "table.csv").write_text("\n".join(["image;caption", *lines]) + "\n")
    return tmp_path / "table.csv"


def as_json(tmp_path):
    as_folder(tmp_path)
    records = [{"image": f"photos/{n}.png", "prompt": f"a picture called {n}"} for n in range(3)]
    (tmp_path / "table.json").write_text(json.dumps(records))
    return tmp_path / "table.json"


def as_tar(tmp_path):
    members = {}
    for n in range(3):
        members |= {f"{n}.png": PICTURES[f"{n}.png"], f"{n}.txt": f"a picture called {n}".encode()}
    return write_tar(tmp_path / "shard.tar", members)


def as_parquet(tmp_path):
    rows = [
        {"image": {"bytes": PICTURES[f"{n}.png"], "path": None}, "text": f"a picture called {n}"} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=2)
    return tmp_path / "table.parquet"


@pytest.mark.parametrize("write", [as_folder, as_sidecars, as_csv, as_json, as_tar, as_parquet])
def test_every_format_gives_the_same_pictures_and_captions(tmp_path, write):
    rows = rows_of(tmp_path, write(tmp_path))
    assert [row["text"] for row in rows] == [f"a picture called {n}" for n in range(3)]
    assert [row["problem"] for row in rows] == [None] * 3
    assert len({row["file_sha256"] for row in rows}) == 3
    assert all((row["width"], row["height"], row["format"]) == (96, 72, "PNG") for row in rows)


def test_pictures_without_captions_are_read_and_wait_for_one(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURES["0.png"])
    rows = rows_of(tmp_path, folder)
    assert rows[0]["captions"] == [] and rows[0]["problem"] is None
    assert export(["--index", str(tmp_path / "index"), "--output", str(tmp_path / "out"), "--processes", "1"]) == 1
    assert "nothing is left to train on (1 no_caption)" in capsys.readouterr().err


def test_an_export_can_be_curated_again(tmp_path):
    rows_of(tmp_path, as_folder(tmp_path))
    for format in ("parquet", "tar"):
        command = ["--index", str(tmp_path / "index"), "--output", str(tmp_path / format), "--format", format]
        assert export([*command, "--processes", "1"]) == 0
        (tmp_path / f"again-{format}").mkdir()
        again = rows_of(tmp_path / f"again-{format}", tmp_path / format)
        assert [row["text"] for row in again] == [f"a picture called {n}" for n in range(3)]


def test_conversations_questions_and_texts_are_exported_as_they_were(tmp_path, capsys):
    as_folder(tmp_path)
    (tmp_path / "b.png").write_bytes(PICTURES["1.png"])
    shown = {"type": "image", "image": "photos/0.png"}
    records = [
        {"image": "photos/0.png", "question": "Who is this?", "answer": "Miso."},
        {"image": ["photos/0.png", "b.png"], "conversations": [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Both."}]},
        {"messages": [{"role": "user", "content": [shown, {"type": "text", "text": "Again?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
        {"image": "photos/2.png", "caption": "a third"},
    ]  # fmt: skip
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = rows_of(tmp_path, path)
    assert [row["num_pictures"] for row in rows] == [1, 2, 2, 1, 0, 1]
    for format in ("parquet", "tar"):
        command = ["--index", str(tmp_path / "index"), "--output", str(tmp_path / format), "--format", format]
        assert export([*command, "--processes", "1"]) == 0
        capsys.readouterr()
        assert check_data(["--data", str(tmp_path / format), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["sources"][0]
        assert found["num_rows"] == 5 and not found["bad_records"]
        assert found["sides"] | {} == {
            **dict.fromkeys(found["sides"], 0),
            "understanding": 3,
            "text": 1,
            "generation": 1,
        }
    turns = column_of(tmp_path / "parquet", "messages")
    assert turns[1][0] == {"role": "user", "content": "<image> and <image>?"}
    assert [len(pictures) for pictures in column_of(tmp_path / "parquet", "images")] == [1, 2, 1, 0, 1]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("{not json", "not a JSON object in UTF-8"),
        ('["a list"]', "found list, expected an object with fields"),
        ('{"caption": "no picture"}', "found neither a picture nor a conversation"),
        ('{"image": "../secret.png", "caption": "x"}', "leads out of the data folder"),
        ('{"image": "/etc/hostname", "caption": "x"}', "leads out of the data folder"),
        ('{"image": "http://x.org/a.png", "caption": "x"}', "is a URL; download the pictures first"),
        ('{"image": "nowhere.png", "caption": "x"}', "no file 'nowhere.png' in the data folder"),
        ('{"image": "folder", "caption": "x"}', "is a folder, a pipe or a device"),
        ('{"image": "link.png", "caption": "x"}', "leads out of the data folder"),
        ('{"image": "good.png", "caption": 7}', "caption: found int, expected a text"),
        ('{"image": "good.png", "caption": "a <|image|> here"}', "a text contains <|image|>"),
        ('{"image": "good.png", "messages": [{"role": "user", "content": "x"}]}', "found 0 <image> places but 1 pictures"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"messages": [{"role": "cat", "content": "x"}]}', "role 'cat', expected one of"),
        ('{"image": "text.png", "caption": "x"}', "not a picture in a format PIL knows"),
        ('{"image": "good.png", "caption": "half \\ud800"}', "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_a_row_with_the_reason(tmp_path, record, problem):
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    (folder / "good.png").write_bytes(PICTURES["0.png"])
    (folder / "text.png").write_text("hello")
    (tmp_path / "secret.png").write_bytes(PICTURES["1.png"])
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    (folder / "rows.jsonl").write_text(record + '\n{"image": "good.png", "caption": "fine"}\n')
    rows = rows_of(tmp_path, folder / "rows.jsonl")
    assert problem in rows[0]["problem"] and rows[1]["problem"] is None
    assert rows[0]["place"] == "rows.jsonl, line 1"


def test_a_planted_name_in_a_tar_stays_in_the_tar(tmp_path):
    members = {"../../evil.png": PICTURES["0.png"], "good.png": PICTURES["1.png"], "good.txt": b"fine"}
    before = tree(tmp_path)
    rows = rows_of(tmp_path, write_tar(tmp_path / "a.tar", members))
    assert "leads out of the tar file" in rows[0]["problem"] and rows[1]["text"] == "fine"
    assert not set(tree(tmp_path)) - set(before) - {"a.tar"} - {n for n in tree(tmp_path) if n.startswith("index/")}


def test_a_tar_that_is_cut_gives_what_comes_before_the_cut(tmp_path):
    path = as_tar(tmp_path)
    path.write_bytes(path.read_bytes()[: -30 * 512])
    rows = rows_of(tmp_path, path)
    assert rows[0]["problem"] is None and "cannot be read further" in rows[-1]["problem"]


def test_a_file_that_changes_after_the_scan_is_not_exported(tmp_path, capsys):
    folder = as_folder(tmp_path)
    rows_of(tmp_path, folder)
    (folder / "1.png").write_bytes(encode(photo(99)))
    assert export(["--index", str(tmp_path / "index"), "--output", str(tmp_path / "out"), "--processes", "1"]) == 2
    assert "line 2: changed after it was scanned. Run python -m curation.scan again" in capsys.readouterr().err


def test_source_and_license_of_a_record_come_before_those_of_the_command(tmp_path):
    folder = as_folder(tmp_path)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"source": "a museum", "license": "CC0-1.0", "tags": ["old"]}
    (folder / "metadata.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    rows = rows_of(tmp_path, folder, flags=("--license", "CC-BY-4.0"))
    assert [row["license"] for row in rows] == ["CC0-1.0", "CC-BY-4.0", "CC-BY-4.0"]
    assert [row["source"] for row in rows] == ["a museum", "photos", "photos"]
    assert json.loads(rows[0]["others"]) == {"tags": ["old"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"x", "unknown kind of file, expected a folder or a file ending in .jsonl"),
        ("a.parquet", b"x", "cannot be read as Parquet"),
        ("a.json", b"{}", "found dict, expected a list of records"),
        ("a.json", b"[1,", "not JSON"),
        ("a.jsonl", b"", "no records found, expected pictures or rows"),
    ],
)
def test_a_file_that_is_no_data_is_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    command = ["--data", str(tmp_path / name), "--index", str(tmp_path / "index"), "--processes", "1"]
    assert scan(command) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_an_index_that_is_none_names_the_command_that_makes_one(tmp_path, capsys):
    assert export(["--index", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "Run python -m curation.scan first" in capsys.readouterr().err
