"""Claims about records as public data sets have them: read as their owners mean them, or refused by name."""

import itertools
import json

import datasets
import pytest
import torch
from PIL import Image

from finetune.check_data import main
from finetune.data.collator import PiscesDataCollator
from finetune.data.load import load_data
from finetune.data.pictures import PictureFolder
from finetune.data.records import RowMaker
from finetune.data.schema import DataError, count_pictures
from finetune.data.spec import DataSpec
from tests.finetune.data.data_files import picture, write_jsonl, write_pictures
from tests.fixtures import make_processor


RED, GREEN = (Image.new("RGB", (4, 4), color) for color in ("red", "green"))
NAMES = {id(RED): "RED", id(GREEN): "GREEN"}


def human(text, **keys):
    return {"from": "human", "value": text, **keys}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def says(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def text(words):
    return {"type": "text", "text": words}


def read(record, **keys):
    """The rows of a record as short texts: "u:RED|What? a:Red", with - before a turn that is not learned."""
    rows = RowMaker(DataSpec("x", **keys), PictureFolder("."))(record, "row-1")
    return [" ".join(map(_short, row["messages"])) for row in rows]


def _short(message):
    parts = [part["text"] if part["type"] == "text" else NAMES[id(part["image"])] for part in message["content"]]
    return ("" if message.get("train", True) else "-") + message["role"][0] + ":" + "|".join(parts)


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        # TRL
        ({"prompt": "What?", "completion": "Red"}, ["u:What? a:Red"]),
        ({"prompt": "What?", "completion": "Red", "image": RED}, ["u:RED|What? a:Red"]),
        ({"prompt": [user("What?")], "completion": [says("Red")], "images": [RED]}, ["u:RED|What? a:Red"]),
        (
            {"prompt": [user("Hi"), says("Hello"), user("Sure?")], "completion": [says("Yes")]},
            ["u:Hi -a:Hello u:Sure? a:Yes"],
        ),
        # who speaks
        ({"system": "Be brief.", "conversations": [human("Hi"), gpt("Hello")]}, ["s:Be brief. u:Hi a:Hello"]),
        ({"system_prompt": "Be brief.", "question": "Hi", "response": "x", "answer": "Hello"}, ["s:Be brief. u:Hi a:Hello"]),
        ({"system": "Be brief.", "messages": [user("Hi"), says("Hello")]}, ["s:Be brief. u:Hi a:Hello"]),
        ({"conversations": [human("Hi"), {"from": "chatgpt", "value": "Hello"}]}, ["u:Hi a:Hello"]),
        ({"conversations": [human("Hi"), {"from": "bing", "value": "Hello"}]}, ["u:Hi a:Hello"]),
        ({"conversations": [gpt("I can help."), human("Hi"), gpt("Hello")]}, ["u:Hi a:Hello"]),
        # what is learned
        ({"messages": [user("Hi"), says("bad", weight=0), user("And?"), says("good", weight=1)]}, ["u:Hi -a:bad u:And? a:good"]),
        ({"messages": [user("Hi"), says("bad", train=False), user("And?"), says("good")]}, ["u:Hi -a:bad u:And? a:good"]),
        ({"conversations": [human("Hi", weight=0), gpt("bad", weight=0), human("And?"), gpt("good")]}, ["u:Hi -a:bad u:And? a:good"]),
        # where pictures stand
        (
            {"messages": [user([text("first"), {"type": "image", "index": 1}, text("second"), {"type": "image", "index": 0}]), says("ok")], "images": [RED, GREEN]},
            ["u:first|GREEN|second|RED a:ok"],
        ),
        ({"conversations": [human("What is the <image> tag in RSS?"), gpt("A logo.")]}, ["u:What is the <image> tag in RSS? a:A logo."]),
        ({"image": RED, "conversations": [human("<image>\nWhich tag?"), gpt("The <image> tag.")]}, ["u:RED|Which tag? a:The <image> tag."]),
        ({"image": RED, "question": "<image>\nWhat?", "answer": "Red"}, ["u:RED|What? a:Red"]),
        ({"image": RED, "caption": "<image> a red square"}, ["u:a red square a:RED"]),
        ({"image": RED, "caption": "how the <image> tag looks"}, ["u:how the <image> tag looks a:RED"]),
        ({"messages": [user([text("<image>What?")]), says([text("Red")])], "images": [RED]}, ["u:RED|What? a:Red"]),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": RED}}, text("What?")]), says("Red")]}, ["u:RED|What? a:Red"]),
        ({"image": [RED, GREEN], "conversations": [human("<image_2> or <image_1>?"), gpt("ok")]}, ["u:GREEN|or|RED|? a:ok"]),
        ({"question": "See <image 1>", "answer": "B", "image_1": RED, "image_2": None}, ["u:See|RED a:B"]),
        ({"id": "1", "image": "", "conversations": [human("Hi"), gpt("Hello")]}, ["u:Hi a:Hello"]),
        ({"image": None, "question": "Hi", "answer": "Hello"}, ["u:Hi a:Hello"]),
        # several answers and captions
        ({"images": [RED], "texts": [{"user": "What?", "assistant": "Red"}, {"user": "Sure?", "assistant": "Yes"}]}, ["u:RED|What? a:Red u:Sure? a:Yes"]),
        ({"image": RED, "caption": ["a square", "red"]}, ["u:a square a:RED", "u:red a:RED"]),
        ({"image": RED, "question": "What?", "answers": ["dark red", "red", "red"]}, ["u:RED|What? a:red"]),
        ({"image": RED, "question": "What?", "answers": [{"answer": "red", "answer_id": 1}]}, ["u:RED|What? a:red"]),
        # edits and instructions
        ({"input_image": RED, "edit_prompt": "make it green", "edited_image": GREEN}, ["u:RED|make it green a:GREEN"]),
        ({"source_img": RED, "instruction": "make it green", "target_img": GREEN}, ["u:RED|make it green a:GREEN"]),
        ({"source_image": RED, "edit_prompt": "green", "edited_image": GREEN, "source_caption": "x"}, ["u:RED|green a:GREEN"]),
        ({"src_img": RED, "edited_prompt_list": ["green"], "edited_img": GREEN, "o_score": 9.0}, ["u:RED|green a:GREEN"]),
        ({"input_images": [RED], "prompt": "green", "output_images": [GREEN]}, ["u:RED|green a:GREEN"]),
        ({"input_images": [RED, GREEN], "prompt": "join", "output_images": [GREEN]}, ["u:RED|GREEN|join a:GREEN"]),
        ({"data": [{"input_images": [RED], "prompt": "green", "output_images": [GREEN]}, {"input_images": [GREEN], "prompt": "back", "output_images": [RED]}]}, ["u:RED|green a:GREEN u:GREEN|back a:RED"]),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, ["u:Add.\n1 and 2 a:3"]),
        ({"instruction": "What colour?", "input": "", "output": "Red", "images": [RED]}, ["u:RED|What colour? a:Red"]),
    ],
)  # fmt: skip
def test_records_are_read_as_their_owners_mean_them(record, rows):
    assert read(record) == rows


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": RED, "caption": "  "}, "prompt: found a blank text, expected words"),
        ({"image": RED, "caption": "<image>"}, "prompt: found a blank text, expected words"),
        ({"input_images": [], "prompt": "x", "output_images": [RED]}, "found 0 pictures to edit and 1 results, expected 1 or more and 1"),
        ({"input_images": [RED], "prompt": "x", "output_images": [RED, GREEN]}, "found 1 pictures to edit and 2 results"),
        ({"src_img": RED, "edited_prompt_list": [], "edited_img": GREEN}, r"edit_prompt: found list \[\], expected a text"),
        ({"data": "x"}, "data: found str 'x', expected a list of edits"),
        ({"data": [{"input_images": [RED], "prompt": "x"}]}, r"data\[0\]: found dict .*, expected input_images, prompt and output_images"),
        ({"image": RED, "caption": ["red", " "]}, "prompt: found a blank text"),
        ({"image": RED, "question": " ", "answer": "Red"}, "question: found a blank text"),
        ({"image": RED, "question": "What?", "answers": [" "]}, "answers: found a blank text"),
        ({"image": [], "caption": "red"}, "image: found nothing, expected a picture for the caption"),
        ({"messages": [user("  "), says([{"type": "image", "image": RED}])]}, r"messages\[0\].content: found only blanks, expected words"),
        ({"messages": [user("Hi"), says(" ")]}, "the assistant says and draws nothing"),
        ({"messages": [user("Hi"), says(None, tool_calls=[{"a": 1}]), says("x")]}, r"messages\[1\].tool_calls: found list .* not read and changes what the turn means"),
        ({"messages": [user("Hi"), says("42", reasoning_content="think")]}, r"messages\[1\].reasoning_content: found str 'think'"),
        ({"messages": [user("Hi"), says("a", weight=0.5)]}, r"messages\[1\].weight: found float 0.5, expected 0 or 1"),
        ({"messages": [user("Hi"), says("a", train="no")]}, r"messages\[1\].train: found str 'no', expected true or false"),
        ({"messages": [user("Hi", train=True), says("a")]}, r"messages\[0\].train: found bool True in a turn of the user, expected the assistant's"),
        ({"messages": [user("Hi"), says("a", weight=0)]}, "all assistant turns are marked as not trained; expected one that is"),
        ({"messages": [user([{"type": "image", "index": 2}]), says("a")], "images": [RED]}, r"content\[0\].index: found 2, expected the place of one of 1 pictures, from 0"),
        ({"messages": [user([{"type": "image", "index": 1}]), says("a")], "images": [RED, GREEN]}, "picture 0 of 2 has no place: no image part has its index"),
        ({"image": RED, "conversations": [human("<image_2>?"), gpt("ok")]}, "found <image 2>, but the pictures have the numbers 1"),
        ({"image": [RED, GREEN], "conversations": [human("<image_1>?"), gpt("ok")]}, "picture 2 has no place: the text has no <image 2>"),
        ({"image": RED, "conversations": [human("<image>\nA?"), gpt("x"), human("<image>\nB?"), gpt("y")]}, "found 2 <image> places but 1 pictures"),
        ({"conversations": [human("<image>\nWhat?"), gpt("Red")]}, "found 1 <image> places but 0 pictures"),
        ({"image": RED, "caption": "<image>\n<image>\nred"}, "found 2 <image> places but 1 pictures"),
        ({"image": RED, "image_1": GREEN, "question": "a", "answer": "b"}, "found pictures under image and image_1, expected one of both"),
        ({"image": RED, "question": "Which?", "answer": "B", "options": ["a", "b"]}, "options: found list .* changes what the row means. Write the choices into the question"),
        ({"question": "Which?", "answer": "B", "context": "Once."}, "context: found str 'Once.'.*Write it into the question"),
        ({"messages": [user("Hi"), says("a")], "tools": [{"name": "f"}]}, "tools: found list .* Tools cannot be learned"),
        ({"messages": [user("Hi"), says("a")], "videos": ["a.mp4"]}, "videos: found list .*Pictures only"),
        ({"prompt": "a", "completion": "b", "label": False}, "label: found False, which says whether the completion is wanted"),
        ({"prompt": ["a"], "completion": "b"}, "prompt: found list .*, expected a text or a list of messages"),
        ({"prompt": "a", "completion": " "}, "completion: found str ' ', expected a text or a list"),
        ({"texts": "a"}, "texts: found str 'a', expected a list of exchanges"),
        ({"texts": [{"user": "a"}]}, r'texts\[0\]: found dict .*, expected {"user"'),
        ({"system": ["a"], "conversations": [human("Hi"), gpt("a")]}, "system: found list .*, expected a text"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, user("Hi"), says("a")]}, "system: found beside a system turn with other words"),
        ({"url": "https://example.invalid/a.png", "caption": "a"}, "is a URL, expected a file"),
        ({"image": RED, "prompt": "What?", "answer": "Red"}, r"answer: found str 'Red' beside a picture and prompt, .*columns: {question: prompt, answer: answer}"),
        ({"image": RED, "text": "What?", "response": "Red"}, r"response: found .*columns: {question: text, answer: response}"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(record, message):
    with pytest.raises(DataError, match=message):
        read(record)


def test_an_empty_prompt_may_be_meant():
    assert read({"messages": [user(""), says([{"type": "image", "image": RED}])]}) == ["u: a:RED"]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"id": 1, "Bild": "a.png", "Titel": "a cat"}, "columns: {image: Bild, prompt: Titel}"),
        ({"id": 1, "ask": "what?", "reply": "a cat"}, "columns: {prompt: ask, completion: reply}"),
        ({"shot": {"bytes": b"x"}, "words": "a cat"}, "columns: {image: shot, prompt: words}"),
    ],
)
def test_the_example_of_columns_is_made_of_the_names_found(record, columns):
    with pytest.raises(DataError) as error:
        read(record)
    assert str(error.value).endswith(columns)


def test_fields_that_no_row_holds_are_counted_by_name():
    make_rows = RowMaker(DataSpec("x"), PictureFolder("."))
    make_rows({"id": "1", "model": "", "image": RED, "caption": "red", "license": "CC0"}, "a")
    make_rows({"image": RED, "caption": "red", "license": "CC0", "score": 0.5, "empty": None}, "b")
    make_rows({"texts": [{"user": "a", "assistant": "b", "source": "x"}] * 2}, "c")
    make_rows({"conversations": [gpt("I can help."), human("Hi"), gpt("Hello", markdown="x")]}, "d")
    assert make_rows.unused == {
        "license": 2,
        "score": 1,
        "texts[].source": 1,
        "conversations[].markdown": 1,
        "what the assistant says before anybody asks": 1,
    }


# ---- what the trainer and check_data make of it


def test_turns_that_are_not_trained_have_no_labels():
    processor = make_processor()
    turns = [user("a"), says("b"), user("c"), says("d")]
    collate = PiscesDataCollator(processor)
    whole = collate([{"id": "1", "messages": turns}])
    part = collate([{"id": "1", "messages": [turns[0], {**turns[1], "train": False}, *turns[2:]]}])
    assert torch.equal(whole["input_ids"], part["input_ids"])
    runs = [
        processor.decode(whole["labels"][0][keep]) for keep in (whole["labels"][0] != -100, part["labels"][0] != -100)
    ]
    assert runs == ["b<|eot_id|>d<|eot_id|>", "d<|eot_id|>"]


def test_a_drawing_that_is_not_trained_has_no_image_labels():
    row = {"messages": [user("a"), {**says([{"type": "image", "image": RED}]), "train": False}, user("b"), says("c")]}
    processor = make_processor()
    labels = PiscesDataCollator(processor)([row])["labels"]
    assert processor.decode(labels[0][labels[0] != -100]) == "c<|eot_id|>"


def test_one_of_several_wordings_is_taken_by_the_name_of_the_row():
    record = {"src_img": RED, "edited_prompt_list": ["green", "make it green"], "edited_img": GREEN}
    maker = RowMaker(DataSpec("x"), PictureFolder("."))
    said = [maker(record, f"row-{n}")[0]["messages"][0]["content"][1]["text"] for n in range(40)]
    assert said == [maker(record, f"row-{n}")[0]["messages"][0]["content"][1]["text"] for n in range(40)]
    assert 10 < said.count("green") < 30


OMNI_EDIT = {
    "src_img": datasets.Image(),
    "edited_img": datasets.Image(),
    "edited_prompt_list": datasets.List(datasets.Value("string")),
}


@pytest.mark.parametrize(
    ("features", "names", "columns"),
    [
        (OMNI_EDIT, ("src_img", "edited_prompt_list", "edited_img"), {}),
        (None, ("input_image", "edit_prompt", "edited_image"), {}),
        (
            None,
            ("before", "words", "after"),
            {"input_image": "before", "edit_prompt": "words", "edited_image": "after"},
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_edits_are_read_from_parquet_by_their_columns(features, names, columns, streaming, tmp_path):
    source, words, target = names
    values = {source: [RED] * 3, words: [["green"]] * 3 if features else ["green"] * 3, target: [GREEN] * 3}
    kinds = features or {source: datasets.Image(), words: datasets.Value("string"), target: datasets.Image()}
    datasets.Dataset.from_dict(values, features=datasets.Features(kinds)).to_parquet(tmp_path / "part-0.parquet")
    spec = {"path": str(tmp_path / "part-0.parquet"), "columns": columns, "streaming": streaming}
    rows = load_data({key: value for key, value in spec.items() if value})
    for row in itertools.islice(rows, 3):
        asked, answered = (message["content"] for message in row["messages"])
        assert [part["type"] for part in asked] == ["image", "text"] and asked[1]["text"] == "green"
        assert asked[0]["image"].getpixel((0, 0)) == (255, 0, 0)
        assert answered[0]["image"].getpixel((0, 0)) == GREEN.getpixel((0, 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_captions_in_a_table_make_a_row_each(tmp_path, streaming):
    cell = {"bytes": picture("red"), "path": None}
    captions = [["a", "b", "c"], ["d"], ["e", " "]]
    table = datasets.Dataset.from_dict({"image": [cell] * 3, "caption": captions, "extra": [1, 2, 3]})
    table.to_parquet(str(tmp_path / "table.parquet"))
    rows = load_data({"path": str(tmp_path / "table.parquet"), "max_bad_records": 1.0, "streaming": streaming})
    found = [
        row if isinstance(row, DataError) else row["messages"][0]["content"][0]["text"]
        for _, row in rows.iter_checked()
    ]
    assert found[:4] == ["a", "b", "c", "d"] and all("blank text" in str(error) for error in found[4:])
    assert rows.unused["extra"] == 2
    if not streaming:
        assert len(rows) == 6 and rows.place(3).endswith("row 1") and rows.place(4).endswith("row 2")
        assert [rows.row(index)["id"] for index in range(4)] == ["table-0-0", "table-0-1", "table-0-2", "table-1"]


def test_a_table_of_several_captions_trains_both_sides(tmp_path):
    cell = {"bytes": picture("red"), "path": None}
    datasets.Dataset.from_dict({"image": [cell] * 2, "caption": [["a", "b"], ["c"]]}).to_parquet(
        str(tmp_path / "t.parquet")
    )
    rows = load_data({"path": str(tmp_path / "t.parquet"), "side": "both"})
    assert len(rows) == 6
    assert [count_pictures(row) for row in rows.iter_rows()] == [(1, 0), (0, 1)] * 3


def test_check_data_prints_what_is_not_used_and_bad_records_by_kind(tmp_path, capsys):
    write_pictures(tmp_path, "a.png")
    good = {"image": "a.png", "caption": "a cat", "license": "CC0"}
    records = [
        good,
        good,
        *({"image": f"{index}.png", "caption": "a cat"} for index in range(9)),
        {**good, "caption": " "},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    code = main(["--data", str(path), "--sheet", str(tmp_path / "sheet.png")])
    output, errors = capsys.readouterr()
    assert code == 1 and errors == "check_data: 10 bad records\n" and (tmp_path / "sheet.png").is_file()
    assert "  not used  license (in 2 records)\n" in output
    lines = output.split("bad records:\n")[1].splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"    {path}, line 3: picture 0: no file '0.png'")
    assert lines[0].endswith(
        "(9 records like this: also line 4, line 5, line 6, line 7, line 8 and 3 more; --json lists all)"
    )
    assert lines[1] == f"    {path}, line 12: prompt: found a blank text, expected words"
    main(["--data", str(path), "--json"])
    source = json.loads(capsys.readouterr().out)["sources"][0]
    assert len(source["bad_records"]) == 10 and source["unused"] == {"license": 2}


def test_with_a_sheet_the_error_of_the_records_is_shown(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"Bild": "a.png", "Titel": "b"}] * 3)
    code = main(["--data", str(path), "--sheet", str(tmp_path / "sheet.png")])
    output, errors = capsys.readouterr()
    assert code == 1 and "columns: {image: Bild, prompt: Titel}" in output
    assert (
        errors
        == f"check_data: 3 bad records\ncheck_data: {tmp_path}/sheet.png was not written: no record can be shown\n"
    )
    assert not (tmp_path / "sheet.png").exists()
