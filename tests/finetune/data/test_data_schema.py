"""Claims about `finetune.data.schema`, `data_records` and `data_spec`: what a row is, and what errors say."""

import pytest
from PIL import Image

from finetune.data.pictures import PictureFolder
from finetune.data.records import RowMaker
from finetune.data.schema import DataError, allowed_bad_records, check_row, count_pictures, side_of
from finetune.data.spec import DataSpec, parse_specs
from modeling_pisces.conversations_pisces import collect_images, normalize_conversations
from tests.finetune.data.data_files import prompt, write_pictures


SAY = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
PICTURE = Image.new("RGB", (4, 4))


def part(image=PICTURE):
    return {"type": "image", "image": image}


def rows_of(record, folder=".", **keys):
    return RowMaker(DataSpec("x", **keys), PictureFolder(folder))(record, "row-1")


# ---- rows


def test_a_checked_row_is_what_the_processor_takes():
    row = check_row({"id": 7, "messages": [{"role": "user", "content": [part(), "what?", "now?"]}, SAY]})
    assert row["id"] == "7"
    (conversation,), _ = normalize_conversations(row["messages"])
    assert conversation == row["messages"]
    assert collect_images([conversation])["images"] == [[PICTURE]]


def test_missing_values_of_tables_are_left_out_and_other_fields_kept():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "image", "image": PICTURE, "text": None}]
    row = check_row({"messages": [{"role": "user", "content": parts}, SAY], "answer": "b", "reward": None})
    assert row["messages"][0]["content"] == [{"type": "text", "text": "a"}, part()]
    assert row["answer"] == "b" and "reward" not in row


def test_sides_follow_from_where_pictures_stand():
    user = {"role": "user", "content": [part()]}
    draw = {"role": "assistant", "content": [part(), part()]}
    text = {"role": "user", "content": "hello"}
    sides = [
        side_of(check_row({"messages": turns})) for turns in ([user, SAY], [text, draw], [user, draw], [text, SAY])
    ]
    assert sides == ["understanding", "generation", "both", "text"]
    assert count_pictures(check_row({"messages": [user, draw]})) == (1, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r'found list \[\], expected an object with "messages"'),
        ({}, r"messages: found nothing, expected a list of at least one message"),
        ({"messages": "hello"}, r"messages: found str 'hello', expected a list"),
        ({"messages": []}, r"messages: found list \[\], expected a list of at least one"),
        ({"messages": ["hello"]}, r'messages\[0\]: found str \'hello\', expected an object with "role"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn, so there is nothing to learn"),
        ({"messages": [SAY, {"role": "gpt", "content": "a"}]}, r"messages\[1\].role: .* one of system, user, assistant \(write assistant\)"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\].role: found list"),
        ({"messages": [{"role": "user", "content": 3}, SAY]}, r"messages\[0\].content: found int 3, expected a text or a list"),
        ({"messages": [{"role": "user", "content": []}, SAY]}, r"messages\[0\].content: found list \[\]"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant says and draws nothing"),
        ({"messages": [SAY, {"role": "user", "content": [{"type": "video"}]}]}, r"messages\[1\].content\[0\]: found dict"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, SAY]}, r"content\[0\].text: found nothing, expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAY]}, r"content\[0\]: found 0 pictures in one image part"),
        ({"messages": [{"role": "user", "content": "see <|image|>"}, SAY]}, r"found the special token <\|image\|>"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}, SAY]}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_errors_name_field_found_and_expected(row, message):
    with pytest.raises(DataError, match=message):
        check_row(row)


def test_bad_records_are_counted_or_a_share_rounded_up():
    assert allowed_bad_records(3, 10) == 3
    assert allowed_bad_records(0.02, 50) == 1  # one of fifty pictures
    assert allowed_bad_records(0.0, 50) == 0 and allowed_bad_records(1.0, 50) == 50


# ---- records of other shapes


def test_a_caption_draws_describes_or_both():
    record = {"image": PICTURE, "caption": "a cat"}
    (drawn,) = rows_of(record)
    assert side_of(drawn) == "generation" and prompt(drawn) == "a cat"
    (seen,) = rows_of(record, side="understanding", request="Say it.")
    assert prompt(seen) == "Say it." and seen["messages"][1]["content"] == [{"type": "text", "text": "a cat"}]
    both = rows_of(record, side="both")
    assert [row["id"] for row in both] == ["row-1-understanding", "row-1-generation"]
    assert [side_of(row) for row in both] == ["understanding", "generation"]


def test_columns_rename_fields_and_missing_ones_are_named():
    (row,) = rows_of(
        {"bild": PICTURE, "frage": "what?", "reply": "a cat"},
        columns={"image": "bild", "question": "frage", "answer": "reply"},
    )
    assert prompt(row) == "what?" and side_of(row) == "understanding"
    with pytest.raises(DataError, match="columns: no field 'bild'; found fields image, caption"):
        rows_of({"image": PICTURE, "caption": "a"}, columns={"image": "bild"})


def test_wrong_columns_list_what_is_known():
    with pytest.raises(
        DataError, match=r"found fields picture, words, expected one of these sets: messages;.*columns: {"
    ):
        rows_of({"picture": PICTURE, "words": "a"})


def test_side_is_refused_where_records_say_it_themselves():
    with pytest.raises(DataError, match="side: both is for pictures with captions"):
        rows_of({"messages": [SAY]}, side="both")


def test_llava_tags_become_pictures_in_order():
    turns = [{"from": "human", "value": "<image>\nA or\n<image>?"}, {"from": "gpt", "value": "B, like this: <image>"}]
    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    (row,) = rows_of({"id": "x", "image": pictures, "conversations": turns})
    ask, answer = (message["content"] for message in row["messages"])
    assert ask == [
        part(pictures[0]),
        {"type": "text", "text": "A or"},
        part(pictures[1]),
        {"type": "text", "text": "?"},
    ]
    assert answer == [{"type": "text", "text": "B, like this:"}, part(pictures[2])]
    assert row["id"] == "x" and side_of(row) == "both"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "text"}, "conversations: found str 'text', expected a list of turns"),
        ({"conversations": ["a"]}, r"conversations\[0\]: found str 'a', expected {\"from\""),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"conversations\[0\].from: found str 'robot', expected system, human or gpt"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, r"conversations\[0\].from: found list"),
        ({"conversations": [{"from": "gpt", "value": ["a"]}]}, r"conversations\[0\].value: found list"),
        ({"conversations": [{"from": "gpt", "value": "<image>"}]}, "found 1 <image> places but 0 pictures"),
        ({"image": PICTURE, "conversations": [{"from": "gpt", "value": "a"}]}, "found 0 <image> places but 1 pictures"),
        ({"image": PICTURE, "caption": [3]}, r"prompt: found int 3, expected a text"),
        ("a text", "found str 'a text', expected an object with fields"),
    ],
)  # fmt: skip
def test_errors_of_other_shapes_name_the_field(record, message):
    with pytest.raises(DataError, match=message):
        rows_of(record)


def test_pictures_beside_messages_fill_places_and_tags():
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    (row,) = rows_of({"messages": [asked, SAY], "images": [PICTURE]})
    (tagged,) = rows_of({"messages": [{"role": "user", "content": "<image>what?"}, SAY], "images": [PICTURE]})
    assert row["messages"] == tagged["messages"] and count_pictures(row) == (1, 0)


# ---- where pictures may be


@pytest.fixture
def folders(tmp_path):
    write_pictures(tmp_path / "data" / "inner", "a.png")
    write_pictures(tmp_path, "secret.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "out").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    return tmp_path


def test_paths_inside_the_folder_are_found_however_they_are_written(folders):
    inside = str(folders / "data" / "inner" / "a.png")
    for reference in ("inner/a.png", "./inner/../inner/a.png", inside):
        assert PictureFolder(folders / "data").locate(reference) == inside
    assert PictureFolder(folders / "alias").locate("inner/a.png") == inside  # the folder itself may be a link


@pytest.mark.parametrize(
    "reference", ["../secret.png", "link.png", "out/secret.png", "ABSOLUTE", "inner/../../secret.png"]
)
def test_paths_that_lead_out_are_refused_unless_asked_for(folders, reference):
    reference = reference.replace("ABSOLUTE", str(folders / "secret.png"))
    with pytest.raises(DataError, match=r"leads out of the data folder .*allow_outside_paths: true"):
        PictureFolder(folders / "data").locate(reference)
    assert PictureFolder(folders / "data", allow_outside_paths=True).locate(reference) == str(folders / "secret.png")


def test_a_missing_file_outside_is_not_told_from_an_existing_one(folders):
    with pytest.raises(DataError, match="leads out"):
        PictureFolder(folders / "data").locate("../nothing.png")


def test_urls_are_refused_unless_asked_for():
    url = "https://example.com/a.png"
    with pytest.raises(DataError, match=r"is a URL, expected a file.*allow_urls: true"):
        PictureFolder(".").locate(url)
    assert PictureFolder(".", allow_urls=True).locate(url) == url
    for scheme in ("file:///etc/passwd", "s3://bucket/a.png"):
        with pytest.raises(DataError, match="expected the path of a file"):
            PictureFolder(".", allow_urls=True).locate(scheme)
    assert PictureFolder(".").locate("data:image/png;base64,AAAA").startswith("data:")  # it holds the picture itself


def test_missing_files_and_other_values_are_named(tmp_path):
    with pytest.raises(DataError, match=r"picture 0: no file 'a.png' in .*image_folder"):
        rows_of({"image": "a.png", "caption": "a"}, tmp_path)
    for value in (3, b"", "", {"bytes": None, "path": None}):
        with pytest.raises(DataError, match="expected a path, file bytes or a PIL image"):
            PictureFolder(tmp_path).locate(value)
    assert PictureFolder(tmp_path).locate({"bytes": b"abc", "path": "../x.png"}) == b"abc"


# ---- specs


def test_specs_are_read_in_every_way_to_write_them(tmp_path):
    (tmp_path / "mix.yaml").write_text("data:\n- photos\n- {path: b.jsonl, weight: 2}\n", encoding="utf-8")
    specs = parse_specs(
        [str(tmp_path / "mix.yaml"), {"path": "c", "side": "both"}, "{path: d, max_rows: 3}", DataSpec("e")]
    )
    assert [spec.path for spec in specs] == ["photos", "b.jsonl", "c", "d", "e"]
    assert specs[1].weight == 2 and specs[2].side == "both" and specs[3].max_rows == 3
    (hub,) = parse_specs("hf:owner/name")
    assert (hub.path, hub.format) == ("owner/name", "hf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"data: found list \[\], expected a path, a mapping"),
        (None, "data: found nothing"),
        ({"weight": 1}, "path is missing"),
        ({"path": "a", "colums": {}}, "unknown key 'colums'; did you mean columns?"),
        ({"path": "a", "zzz": 1}, "unknown key 'zzz'; known are path, format"),
        ({"path": ""}, "path: found str '', expected a path"),
        ({"path": "a", "format": "xml"}, "format: found str 'xml', expected one of auto, jsonl"),
        ({"path": "a", "side": "left"}, "side: found str 'left'"),
        ({"path": "a", "weight": 0}, "weight: found int 0, expected a number above 0"),
        ({"path": "a", "columns": ["image"]}, "columns: found list .*expected a mapping"),
        ({"path": "a", "max_rows": 0}, "max_rows: found int 0"),
        ({"path": "a", "shuffle_buffer": 1.5}, "shuffle_buffer: found float 1.5"),
        ({"path": "a", "max_bad_records": 1.5}, r"max_bad_records: found float 1.5, expected a whole number of records, or a share"),
        ({"path": "a", "allow_urls": "yes please"}, "allow_urls: found str"),
        ("missing.yaml", "missing.yaml: no such file"),
        ("{path: a", "data: not YAML"),
    ],
)  # fmt: skip
def test_wrong_specs_are_refused_by_key(data, message):
    with pytest.raises(DataError, match=message):
        parse_specs(data)
