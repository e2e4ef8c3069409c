"""Claims about data folders of people one does not know: nothing outside is read, and one bad record costs one record."""

import io
import json
import os
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.check_data import main
from finetune.data.load import load_data
from finetune.data.readers import paths as data_paths
from finetune.data.readers import shards as data_tar
from finetune.data.schema import DataError
from finetune.parts.captioned import load_pictures
from finetune.scenes.render import write_scenes
from tests.finetune.data.data_files import picture, prompt, write_captions, write_jsonl, write_pictures, write_tar


GOOD = {"image": "a.png", "caption": "good"}


def read(data, **keys):
    """The prompts of all good rows, and the places and reasons of all bad records."""
    source = load_data({"path": str(data), "max_bad_records": 1.0, **keys})
    records = list(source.iter_checked())
    bad = [f"{place}: {row}" for place, row in records if isinstance(row, DataError)]
    return [prompt(row) for _, row in records if not isinstance(row, DataError)], bad


@pytest.fixture
def secret(tmp_path):
    """A file beside the data folder, and a folder with pictures a and b, of which a has a caption."""
    (tmp_path / "secret.txt").write_text("SECRET")
    write_jsonl(tmp_path / "secret.jsonl", [{"file_name": "a.png", "text": "SECRET"}])
    write_pictures(tmp_path / "data", "a.png", "b.png")
    (tmp_path / "data" / "a.txt").write_text("good")
    return tmp_path / "data"


# ---- links and what is no file


def plant_link(path):
    path.symlink_to("../secret.txt")


def plant_link_over_links(path):
    (path.parent / "up").symlink_to("..", target_is_directory=True)
    path.symlink_to("up/secret.txt")


def plant_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (plant_link, "leads out of the data folder"),
        (plant_link_over_links, "leads out of the data folder"),
        (plant_loop, "no file"),
        (lambda path: path.mkdir(), "is a folder, expected an ordinary file"),
        (os.mkfifo, "is a pipe, socket or device, expected an ordinary file"),
        (lambda path: path.write_bytes(b"\xff\xfeb\x00"), "b.txt is not UTF-8"),
    ],
)
def test_a_caption_that_is_no_file_of_the_folder_is_one_bad_record(secret, plant, reason):
    plant(secret / "b.txt")
    good, bad = read(secret)
    assert good == ["good"]
    assert len(bad) == 1 and bad[0].startswith(f"{secret / 'b.png'}: ") and reason in bad[0]


def test_a_folder_that_is_a_link_and_links_inside_it_are_fine(secret):
    (secret / "more").mkdir()
    (secret / "more" / "b.txt").write_text("other")
    (secret / "b.txt").symlink_to("more/b.txt")
    (secret.parent / "link").symlink_to(secret)
    assert read(secret.parent / "link") == (["good", "other"], [])


def test_links_out_are_read_when_asked_for(secret):
    plant_link(secret / "b.txt")
    assert read(secret, allow_outside_paths=True) == (["good", "SECRET"], [])


def test_a_metadata_file_that_leads_out_is_one_bad_record(secret):
    (secret / "metadata.jsonl").symlink_to("../secret.jsonl")
    write_pictures(secret / "below", "a.png")
    write_jsonl(secret / "below" / "metadata.jsonl", [{"file_name": "a.png", "text": "kept"}])
    good, bad = read(secret)
    assert good == ["kept"] and len(bad) == 1
    assert bad[0].startswith(f"{secret / 'metadata.jsonl'}: ") and "leads out of the data folder" in bad[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "scenes.jsonl", "data.tar", "data.parquet"])
def test_a_table_or_shard_found_in_a_folder_may_not_lead_out(tmp_path, name):
    write_captions(tmp_path / "real", 1, "rows.jsonl")
    write_scenes(tmp_path / "real" / "scenes", num_scenes=1, seed=1)
    (tmp_path / "real" / "scenes" / "scenes.jsonl").rename(tmp_path / "real" / "scenes.jsonl")
    write_tar(tmp_path / "real" / "data.tar", {"0.png": picture(), "0.txt": "SECRET"})
    table = {"image": [{"bytes": picture(), "path": None}], "caption": ["SECRET"]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "real" / "data.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(f"../real/{name}")
    try:
        good, bad = read(tmp_path / "data")
    except DataError as error:
        good, bad = [], [str(error)]
    assert good == [] and len(bad) == 1 and "leads out of the data folder" in bad[0]


def test_a_named_file_may_be_a_link_to_anywhere(tmp_path):
    write_captions(tmp_path / "real", 1, "rows.jsonl")
    write_pictures(tmp_path / "data", "0.png")
    (tmp_path / "data" / "rows.jsonl").symlink_to("../real/rows.jsonl")
    assert read(tmp_path / "data" / "rows.jsonl") == (["picture 0"], [])


def test_a_snapshot_of_the_hubs_cache_is_read_and_nothing_else_of_the_cache(tmp_path):
    snapshot = tmp_path / "datasets--me--cats" / "snapshots" / "0123abc"
    blobs = tmp_path / "datasets--me--cats" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in (("a.png", picture()), ("a.txt", b"good"), ("b.png", picture())):
        (blobs / f"digest-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/digest-{name}")
    (tmp_path / "secret.txt").write_text("SECRET")
    (snapshot / "b.txt").symlink_to("../../../secret.txt")
    good, bad = read(snapshot)
    assert good == ["good"] and len(bad) == 1 and "leads out of the data folder" in bad[0]
    write_jsonl(snapshot / "rows.jsonl", [GOOD, {"image": "../../blobs/digest-a.png", "caption": "by a path"}])
    good, bad = read(snapshot / "rows.jsonl")
    assert good == ["good"] and len(bad) == 1 and "leads out of the data folder" in bad[0]


def test_a_cache_whose_blobs_are_a_link_is_no_cache(tmp_path):
    snapshot = tmp_path / "datasets--me--cats" / "snapshots" / "0123abc"
    write_pictures(snapshot, "a.png", "b.png")
    (snapshot / "a.txt").write_text("good")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes").write_text("SECRET")
    (tmp_path / "datasets--me--cats" / "blobs").symlink_to("../private")
    (snapshot / "b.txt").symlink_to("../../blobs/notes")
    good, bad = read(snapshot)
    assert good == ["good"] and "leads out of the data folder" in bad[0]


@pytest.mark.parametrize(
    "reference",
    [
        "{outside}/secret.png",
        "../secret.png",
        "x/../../secret.png",
        "up/secret.png",
        "link.png",
        "..\\secret.png",
        "%2e%2e/secret.png",
        "a.png\0",
        "a" * 5000,
        "a/" * 3000,
        "FILE:///etc/passwd",
        "HTTP://127.0.0.1/a.png",
        "\ud800.png",
        "pipe.png",
        "folder.png",
        "/dev/zero",
        ".",
        "",
    ],
)
def test_a_picture_that_is_no_file_of_the_folder_is_one_bad_record(tmp_path, reference):
    data = write_pictures(tmp_path / "data", "a.png")
    write_pictures(tmp_path, "secret.png")
    (data / "up").symlink_to("..")
    (data / "link.png").symlink_to("../secret.png")
    (data / "folder.png").mkdir()
    os.mkfifo(data / "pipe.png")
    reference = reference.replace("{outside}", str(tmp_path))
    path = write_jsonl(data / "rows.jsonl", [GOOD, {"image": reference, "caption": "bad"}, GOOD])
    good, bad = read(path)
    assert good == ["good", "good"]
    assert len(bad) == 1 and "line 2" in bad[0] and len(bad[0]) < 600


def test_a_scene_may_not_name_a_picture_outside(tmp_path, capsys):
    folder = write_scenes(tmp_path / "scenes", num_scenes=2, seed=1)
    write_pictures(tmp_path, "secret.png")
    path = folder / "scenes.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps(json.loads(second) | {"image": "../secret.png"}) + "\n")
    # one bad record of two is as many as `max_bad_records` allows, as in the recipes
    assert len(load_pictures(folder, folder=tmp_path / "one").records) == 1
    assert "1 of 2 records are bad and left out; the first: " in (printed := capsys.readouterr().out)
    assert "leads out of the data folder" in printed
    path.write_text(first + "\n[1]\n")
    assert len(load_pictures(folder, folder=tmp_path / "two").records) == 1
    assert "line 2: found list [1], expected an object with image, captions and questions" in capsys.readouterr().out
    path.write_text("[1]\n[1]\n" + first + "\n")
    with pytest.raises(DataError, match="2 of 3 records are bad, more than max_bad_records"):
        load_pictures(folder, folder=tmp_path / "three")


def test_a_saved_dataset_may_not_name_files_outside(tmp_path):
    table = {"image": [{"bytes": picture(), "path": None}], "caption": ["SECRET"]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "real")
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "data")
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"][0]["filename"] = f"../real/{state['_data_files'][0]['filename']}"
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_data(tmp_path / "data")


def test_a_folder_for_datasets_may_not_name_files_outside(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.csv").write_text("image,caption\na.png,SECRET\n")
    (tmp_path / "data" / "train.csv").symlink_to("../secret.csv")
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_data({"path": str(tmp_path / "data"), "format": "hf"})


def test_a_pipe_in_place_of_the_data_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="a pipe, socket or device, expected a folder or an ordinary file"):
        load_data(tmp_path / "rows.jsonl")


# ---- one record that would stop a source

BAD_LINES = {
    "an integer of 5,000 digits": (f'{{"n": {"9" * 5000}}}', "integer of 5000 digits, expected at most 1000"),
    "5,000 brackets": ('{"n": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    "150 brackets": ('{"n": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply"),
    "a key twice": ('{"image": "a.png", "caption": "x", "caption": "y"}', "found the key 'caption' twice"),
    "a key twice inside": ('{"image": "a.png", "caption": "x", "more": {"k": 1, "k": 1}}', "the key 'k' twice"),
    "a number as a caption": ('{"image": "a.png", "caption": 5}', "prompt: found int 5, expected a text"),
    "a truth as a caption": ('{"image": "a.png", "caption": true}', "expected a text"),
    "a NaN as a caption": ('{"image": "a.png", "caption": NaN}', "expected a text"),
    "nulls": ('{"messages": [null, {"role": "assistant", "content": [null]}]}', "messages[0]"),
    "half of a surrogate pair": ('{"image": "a.png", "caption": "\\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_bad_value_costs_one_record(tmp_path, kind, name):
    write_pictures(tmp_path, "a.png")
    line, reason = BAD_LINES[kind]
    lines = [json.dumps(GOOD), line, json.dumps(GOOD)]
    text = "[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    good, bad = read(tmp_path / name)
    assert good == ["good", "good"]
    assert len(bad) == 1 and "line 2" in bad[0] and reason in bad[0]


@pytest.mark.parametrize("kind", [kind for kind in BAD_LINES if kind not in ("nulls",)])
def test_a_bad_value_costs_one_sample_of_a_tar(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    files = {}
    for key, text in (("0", json.dumps(GOOD)), ("1", line), ("2", json.dumps(GOOD))):
        files |= {f"{key}.png": picture(), f"{key}.json": text}
    good, bad = read(write_tar(tmp_path / "data.tar", files))
    assert good == ["good", "good"]
    assert len(bad) == 1 and ".tar, 1: " in bad[0] and reason in bad[0]


@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\n"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.json"])
def test_lines_may_end_as_on_any_system(tmp_path, name, end):
    write_pictures(tmp_path, "a.png")
    lines = [b"image,caption", *[b"a.png,good"] * 3] if name.endswith("csv") else [json.dumps(GOOD).encode()] * 3
    (tmp_path / name).write_bytes(end.join(lines) + end)
    assert read(tmp_path / name) == (["good"] * 3, [])


def test_a_long_line_and_a_byte_order_mark_are_right(tmp_path):
    write_pictures(tmp_path, "a.png")
    long = "x" * 10_000_000
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps({**GOOD, "caption": long}) + "\n" + json.dumps(GOOD), encoding="utf-8")
    assert read(path) == ([long, "good"], [])


def test_a_line_that_is_too_long_to_hold_costs_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.readers.files.MAX_RECORD_BYTES", 100)
    write_pictures(tmp_path, "a.png")
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {**GOOD, "caption": "x" * 1000}, GOOD])
    good, bad = read(path)
    assert good == ["good", "good"] and "line 2: found a line of more than 100 bytes" in bad[0]


@pytest.mark.parametrize(
    ("line", "num_bad", "reason"),
    [
        ("a.png," + "x" * 140_000, 1, "field larger than field limit"),
        ('a.png,"never closed', 1, "not CSV (unexpected end of data); correct the quotes"),
        ('a.png,"closed "too early"', 1, "not CSV"),
        ('a.png,"of two lines\nb"x"', 2, "not CSV"),
        ("a.png,\udcff", 1, "not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_a_broken_line_of_csv_costs_one_record(tmp_path, line, num_bad, reason):
    write_pictures(tmp_path, "a.png")
    text = "\n".join(["image,caption", "a.png,good", line, "a.png,good", "a.png,good"])
    (tmp_path / "data.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    good, bad = read(tmp_path / "data.csv")
    assert good == ["good"] * 3
    assert len(bad) == num_bad and "line 3" in bad[0] and reason in bad[0]


def test_bad_bytes_in_an_array_cost_one_record(tmp_path):
    write_pictures(tmp_path, "a.png")
    good = json.dumps(GOOD).encode()
    (tmp_path / "data.json").write_bytes(b"[" + good + b",\n" + good.replace(b"good", b"\xff") + b",\n" + good + b"]")
    found, bad = read(tmp_path / "data.json")
    assert found == ["good", "good"] and len(bad) == 1 and "line 2: not UTF-8" in bad[0]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_utf16_is_named(tmp_path, name):
    text = "image,caption\na.png,good\n" if name.endswith("csv") else json.dumps([GOOD] * 2)
    (tmp_path / name).write_text(text, encoding="utf-16")
    with pytest.raises(DataError, match="not UTF-8"):
        load_data(tmp_path / name)


# ---- tar files


def tar_of(path, members):
    """Write members given as (name, content) or as a TarInfo."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FIRST = [("0.png", picture()), ("0.txt", b"good")]
LAST = [("2.png", picture()), ("2.txt", b"good")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.png", picture()), special("1.txt", tarfile.SYMTYPE, "/etc/hostname")], "1.txt: found a link"),
        ([("1.png", picture()), special("1.txt", tarfile.LNKTYPE, "0.txt")], "1.txt: found a link"),
        ([("1.png", picture()), special("1.txt", tarfile.FIFOTYPE)], "1.txt: found a link, a device"),
        ([("1.png", picture()), special("1.txt", tarfile.CHRTYPE)], "1.txt: found a link, a device"),
        ([("../1.png", picture()), ("../1.txt", b"x")], "found a name that leads out of the tar file"),
        ([("/1.png", picture()), ("/1.txt", b"x")], "found a name that leads out of the tar file"),
        ([("1.png", picture()), ("1.txt", b"x"), ("1.txt", b"y")], "1.txt: found twice in one sample"),
        ([("1.png", picture()), ("1.txt", b"\xff")], "1.txt: 'utf-8' codec can't decode"),
        ([("1.png", picture()), ("1.json", b"[1]")], "1.json: found list [1], expected a JSON object"),
    ],
)
def test_a_bad_member_costs_its_sample(tmp_path, members, reason):
    good, bad = read(tar_of(tmp_path / "data.tar", [*FIRST, *members, *LAST]))
    assert good == ["good", "good"] and len(bad) == 1 and reason in bad[0]


def test_the_limit_of_a_tar_is_for_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(data_tar, "MAX_RECORD_BYTES", 3000)
    pictures = [(f"1.{index}.png", b"x" * 800) for index in range(4)]
    good, bad = read(tar_of(tmp_path / "data.tar", [*FIRST, *pictures, ("1.txt", b"x"), *LAST]))
    assert good == ["good", "good"]
    assert len(bad) == 1 and "found 3200 bytes in one sample, expected at most 3000" in bad[0]


@pytest.mark.parametrize("where", ["header", "content", "between"])
def test_a_tar_that_ends_too_early_keeps_what_came_before(tmp_path, where):
    path = tar_of(tmp_path / "data.tar", [*FIRST, *LAST])
    with tarfile.open(path) as tar:
        member = tar.getmember("2.txt")
    end = {"header": member.offset + 100, "content": member.offset_data + 1, "between": member.offset}[where]
    path.write_bytes(path.read_bytes()[:end])
    good, bad = read(path)
    assert good == ["good"] and "the tar file cannot be read further" in bad[-1]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = tar_of(tmp_path / "data.tar", [*FIRST, *LAST])
    with tarfile.open(path) as tar:
        begin = tar.getmember("2.png").offset
    content = bytearray(path.read_bytes())
    content[begin + 148] ^= 1  # of the checksum
    path.write_bytes(content)
    good, bad = read(path)
    assert good == ["good"] and len(bad) == 1 and "the tar file cannot be read further" in bad[0]


def test_a_damaged_gzip_keeps_what_came_before(tmp_path):
    plain = tar_of(tmp_path / "plain", [*FIRST, ("1.png", os.urandom(100_000)), ("1.txt", b"x"), *LAST])
    with tarfile.open(tmp_path / "data.tar", "w:gz") as tar, tarfile.open(plain) as source:
        for member in source:
            tar.addfile(member, source.extractfile(member))
    content = (tmp_path / "data.tar").read_bytes()
    (tmp_path / "data.tar").write_bytes(content[: len(content) // 2])
    good, bad = read(tmp_path / "data.tar")
    assert good == ["good"] and "cannot be read further" in bad[-1]


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    info = tarfile.TarInfo("1.txt")
    info.size, info.type = 2**33, tarfile.GNUTYPE_LONGNAME
    path = tar_of(tmp_path / "data.tar", FIRST)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10_240)
    good, bad = read(path)
    assert good == ["good"] and "a header of 8589934592 bytes" in bad[-1]


# ---- tables


@pytest.fixture
def damaged_table(tmp_path):
    """Three row groups of two rows, the second of them damaged."""
    rows = {"image": [{"bytes": picture(), "path": None}] * 6, "caption": [f"row {number}" for number in range(6)]}
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=2, compression="gzip", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1)
    begin = group.column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_row_group_costs_its_rows(damaged_table, streaming):
    good, bad = read(damaged_table, streaming=streaming)
    assert good == ["row 0", "row 1", "row 4", "row 5"]
    assert len(bad) == 2 and "row 2: row group 1 cannot be read" in bad[0] and "row 3: " in bad[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_file_among_others_is_one_bad_record(damaged_table, streaming):
    rows = {"image": [{"bytes": picture(), "path": None}], "caption": ["whole"]}
    pq.write_table(pa.table(rows), damaged_table.parent / "whole.parquet")
    damaged_table.write_bytes(damaged_table.read_bytes()[:-20])
    good, bad = read(damaged_table.parent / "*.parquet", streaming=streaming)
    assert good == ["whole"] and len(bad) == 1 and "data.parquet" in bad[0]


# ---- the command


def test_names_that_no_terminal_should_obey_are_printed_as_escapes(tmp_path, capsys):
    write_pictures(tmp_path, "a.png")
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {"id": "\x1b[2J\ud800", **GOOD, "image": "\x1b[2J\ud800"}])
    assert main(["--data", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "line 2" in printed
    assert main(["--data", str(path), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["sources"][0]["bad_records"]) == 1


def test_a_caption_file_of_any_size_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data_paths, "MAX_RECORD_BYTES", 1000)
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("good")
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(10**12)
    good, bad = read(tmp_path)
    assert good == ["good"] and "found more than 1000 bytes, expected a caption" in bad[0]
