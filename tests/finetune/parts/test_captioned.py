"""Data of any format as captioned pictures of one size: what the parts of a model are trained from."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.parts.assemble import make_processor, train_tokenizer
from finetune.parts.captioned import choose_heldout, load_pictures, prepare, prepared_folder
from finetune.parts.stages import SHORT_REQUESTS, StageConversations, description
from finetune.scenes.render import write_scenes
from modeling_pisces import PiscesConfig
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import UsageError


def draw(size=(24, 24), color=(200, 30, 30), mode="RGB") -> Image.Image:
    picture = Image.new("RGB", size, "white")
    picture.paste(color, (4, 4, size[0] // 2, size[1] // 2))
    return picture.convert(mode)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_folder(folder, texts=("a red square", "a blue square", "a green square")):
    """Pictures with captions beside them, and a file of rows that says more about them."""
    folder.mkdir(parents=True)
    colors = [(200, 30, 30), (30, 30, 200), (30, 200, 30)]
    for number, text in enumerate(texts):
        draw(color=colors[number]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_folder_of_captioned_pictures_becomes_pixels_and_texts(tmp_path):
    data = load_pictures(write_folder(tmp_path / "data"), folder=tmp_path / "ready")
    assert data.pictures.shape == (3, 3, 24, 24) and data.pictures.dtype == torch.uint8
    assert data.captions == [["a red square"], ["a blue square"], ["a green square"]]
    assert data.pictures[1, :, 6, 6].tolist() == [30, 30, 200] and data.pictures[1, :, 0, 0].tolist() == [255] * 3


def test_rows_about_one_picture_become_one_record(tmp_path):
    folder = write_folder(tmp_path / "data")
    picture = {"type": "image", "image": "0.png"}
    say = lambda role, *parts: {"role": role, "content": list(parts)}  # noqa: E731
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    rows = [
        {"id": "r1", "messages": [say("user", text("a big red square at the top left")), say("assistant", picture)]},
        {"id": "r2", "messages": [say("user", text("red")), say("assistant", text("here it is:"), picture)]},
        {
            "id": "r3",
            "messages": [say("user", picture, text("Describe the picture.")), say("assistant", text("red box"))],
        },
        {
            "id": "r4",
            "messages": [
                *(say("system", text("Be brief.")), say("user", picture, text("which colour?"))),
                *(
                    say("assistant", text("red")),
                    say("user", text("and its shape?")),
                    say("assistant", text("square")),
                ),
            ],
        },
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,) = load_pictures(folder / "rows.jsonl", folder=tmp_path / "ready").records
    assert record["captions"] == ["red", "red box", "a big red square at the top left"]
    assert record["conversations"] == [
        [{"question": "Be brief. which colour?", "answer": "red"}, {"question": "and its shape?", "answer": "square"}]
    ]
    assert description(record, detailed=False) == "red"
    assert description(record, detailed=True) == "a big red square at the top left"


@pytest.mark.parametrize("kind", ["csv", "parquet", "webdataset", "llava", "metadata"])
def test_every_documented_format_is_read(tmp_path, kind):
    folder = write_folder(tmp_path / "data")
    texts = [(folder / f"{n}.txt").read_text() for n in range(3)]
    spec = folder
    if kind == "csv":
        spec = folder / "rows.csv"
        spec.write_text("image,caption\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(texts)))
    if kind == "metadata":
        rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(texts)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "llava":
        turns = [
            [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": text}] for text in texts
        ]
        spec = folder / "llava.json"
        spec.write_text(json.dumps([{"image": f"{n}.png", "conversations": turn} for n, turn in enumerate(turns)]))
    if kind == "parquet":
        images = [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in range(3)]
        spec = tmp_path / "rows.parquet"
        datasets.Dataset.from_dict({"image": images, "caption": texts}).to_parquet(spec)
    if kind == "webdataset":
        import tarfile

        spec = tmp_path / "rows.tar"
        with tarfile.open(spec, "w") as tar:
            for n in range(3):
                tar.add(folder / f"{n}.png", f"{n}.png")
                tar.add(folder / f"{n}.txt", f"{n}.txt")
    data = load_pictures(str(spec), folder=tmp_path / "ready")
    assert data.captions == [[text] for text in texts]
    assert data.pictures[2, :, 6, 6].tolist() == [30, 200, 30]


def test_scenes_keep_the_types_and_wordings_of_their_questions(tmp_path):
    data = load_pictures(write_scenes(tmp_path / "scenes", num_scenes=2, seed=1), folder=tmp_path / "ready")
    first = json.loads((tmp_path / "scenes" / "scenes.jsonl").read_text().splitlines()[0])
    assert [turns[0] for turns in data.records[0]["conversations"]] == first["questions"]
    assert data.records[0]["captions"] == first["captions"] and data.records[0]["truth"] == first["truth"]


def test_a_scenes_file_of_ones_own_needs_no_truth_and_no_questions(tmp_path):
    draw().save(tmp_path / "0.png")
    (tmp_path / "scenes.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["a square"]}) + "\n")
    (record,) = load_pictures(tmp_path, folder=tmp_path / "ready").records
    assert record == {"id": "scenes-1", "captions": ["a square"], "conversations": []}


def test_pixels_are_those_that_the_finished_model_sees(tmp_path):
    """Transparent, palette, 16-bit, turned and oblong pictures: what stage 0 trains on is what `describe` reads."""
    folder = tmp_path / "data"
    folder.mkdir()
    hidden = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # black under no opacity: white is what one sees
    hidden.paste((10, 200, 10, 255), (10, 10, 30, 30))
    turned = draw((60, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    hidden.save(folder / "alpha.png")
    hidden.quantize(8).save(folder / "palette.png")
    Image.fromarray((np.arange(900).reshape(30, 30) * 70).astype(np.uint16)).save(folder / "deep.png")
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    data = load_pictures(folder, 32, folder=tmp_path / "ready")
    tokenizer = train_tokenizer(["a"], 300)
    sizes = {"hidden_size": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = PiscesConfig(
        vision_config={"model_type": "siglip_vision_model", **sizes}, gen_vision_config={**sizes, "output_size": 8}
    )
    processor = make_processor(tokenizer, config)
    for record, picture in zip(data.records, data.pictures, strict=True):
        (path,) = folder.glob(f"{record['captions'][0]}.[pj]*")
        for images in (processor.image_processor, processor.gen_image_processor):
            seen = images(load_image(path), return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(picture.float() / 127.5 - 1, seen, atol=1e-6, rtol=0)
    alpha = next(n for n, record in enumerate(data.records) if record["captions"] == ["alpha"])
    assert data.pictures[alpha, :, 0, 0].tolist() == [255, 255, 255]


def test_pictures_of_two_sizes_ask_for_one(tmp_path):
    folder = write_folder(tmp_path / "data")
    draw((30, 20)).save(folder / "1.png")
    with pytest.raises(
        UsageError, match=r"1.png: pictures of several sizes .*\[\(24, 24\), \(30, 20\)\]. Say --image_size"
    ):
        load_pictures(folder, folder=tmp_path / "ready")
    assert load_pictures(folder, 16, folder=tmp_path / "ready").pictures.shape == (3, 3, 16, 16)


def test_what_trains_no_part_is_counted_and_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    two = [{"type": "image", "image": f"{n}.png"} for n in (0, 1)]
    rows = [
        {"messages": [{"role": "user", "content": [*two, "same?"]}, {"role": "assistant", "content": "no"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
        {"image": "0.png", "caption": "a square"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_pictures(folder / "rows.jsonl", folder=tmp_path / "ready").records) == 1
    assert "1 rows show or draw several pictures, 1 rows have no picture" in capsys.readouterr().out
    (folder / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="found no picture with a text"):
        load_pictures(folder / "rows.jsonl", folder=tmp_path / "other")


def write_edits_beside(folder):
    """Rows of edits of the pictures of `write_folder`: one alone, two turns, and one that is no edit."""
    shown, said = {"type": "image", "image": "0.png"}, {"type": "text", "text": "make it blue"}
    drawn = [{"role": "assistant", "content": [{"type": "image", "image": f"{name}.png"}]} for name in (1, 2)]
    draw(color=(9, 9, 9)).save(folder / "3.png")
    black = {"role": "assistant", "content": [{"type": "image", "image": "3.png"}]}
    rows = [
        [{"role": "user", "content": [shown, said]}, drawn[0]],
        [{"role": "user", "content": [said, shown]}, drawn[1], {"role": "user", "content": "now black"}, black],
        [{"role": "user", "content": [shown, said]}, {"role": "assistant", "content": "no"}],
        [{"role": "user", "content": [shown, {"type": "image", "image": "1.png"}, said]}, drawn[1]],
    ]
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows)
    (folder / "edits.jsonl").write_text(text)
    return folder / "edits.jsonl"


def test_edits_are_kept_with_the_places_of_their_pictures(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    edits = write_edits_beside(folder)
    (folder / "one.json").write_text(json.dumps([{"image": "1.png", "caption": "a blue square"}]))
    data = load_pictures([str(edits), str(folder / "one.json")], folder=tmp_path / "ready")
    first = data.records[0]
    one, two = first["edits"]
    assert [turn["instruction"] for turn in (*one, *two)] == ["make it blue", "make it blue", "now black"]
    colors = [data.pictures[turn["picture"], :, 6, 6].tolist() for turn in (*one, *two)]
    assert colors == [[30, 30, 200], [30, 200, 30], [9, 9, 9]]
    assert data.num_with_texts == 2  # the source was asked about, and the caption; results that nobody described last
    assert data.captions[:2] == [["no"], ["a blue square"]] and data.with_texts.pictures.shape[0] == 2
    assert "1 rows show or draw several pictures" in capsys.readouterr().out  # two shown at once


def test_results_of_edits_stay_with_their_source(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "all.json").write_text(json.dumps([{"image": f"{n}.png", "caption": f"square {n}"} for n in range(3)]))
    specs = [str(folder / "all.json"), str(write_edits_beside(folder))]
    ready = prepare(specs, None, tmp_path / "train", 0.4, tmp_path / "held")
    parts = [load_pictures(ready), load_pictures(tmp_path / "held")]
    edits = [turn for data in parts for record in data.records for turns in record.get("edits", ()) for turn in turns]
    assert len(edits) == 3
    for data in parts:
        wanted = {turn["picture"] for record in data.records for turns in record.get("edits", ()) for turn in turns}
        assert wanted <= set(range(len(data.pictures))) and len(data.pictures) == len(data.records)


def test_data_of_edits_alone_trains_no_tower(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "edits.jsonl").write_text(write_edits_beside(folder).read_text().splitlines()[0] + "\n")
    data = load_pictures(folder / "edits.jsonl", folder=tmp_path / "ready")
    assert len(data.records) == 2 and data.num_with_texts == 0
    with pytest.raises(ValueError, match="edits only, but this part learns from captions or questions"):
        data.with_texts  # noqa: B018


def test_prepared_pictures_are_kept_until_the_data_changes(tmp_path):
    folder, ready = write_folder(tmp_path / "data"), tmp_path / "ready"
    prepare(folder, None, ready)
    first = (ready / "pictures.bin").stat().st_ino
    assert prepare(folder, None, ready) == ready == prepared_folder([str(ready)])
    assert (ready / "pictures.bin").stat().st_ino == first
    (folder / "0.txt").write_text("a crimson square")
    prepare(folder, None, ready)
    assert load_pictures(ready).captions[0] == ["a crimson square"]
    with pytest.raises(ValueError, match="pictures of 24 pixels, asked for were 64"):
        load_pictures(ready, 64)


def test_held_out_pictures_are_not_trained_on_and_stay_the_same(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(20):
        draw(color=(10 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"shade {number}")
    prepare(folder, 16, tmp_path / "train", 0.2, tmp_path / "heldout")
    train, heldout = load_pictures(tmp_path / "train"), load_pictures(tmp_path / "heldout")
    assert len(train.records) == 16 and len(heldout.records) == 4
    for data in (train, heldout):
        for record, picture in zip(data.records, data.pictures, strict=True):
            assert picture[0, 5, 5] == 10 * int(record["captions"][0].split()[1])
    ids = [record["id"] for record in train.records + heldout.records]
    more = choose_heldout([*ids, *(f"new-{n}" for n in range(20))], 0.2)
    assert len(choose_heldout(["a", "b"], 0.05)) == 1 and len(more) == 8


def test_one_picture_cannot_be_shared_between_training_and_measuring(tmp_path):
    folder = write_folder(tmp_path / "data", texts=("a red square",))
    with pytest.raises(ValueError, match="found 1 picture with a text; expected two or more, one to measure on"):
        prepare(folder, None, tmp_path / "train", 0.5, tmp_path / "heldout")
    assert not (tmp_path / "train").exists() and not (tmp_path / "heldout").exists()


def test_a_damaged_file_of_pictures_is_refused(tmp_path):
    ready = prepare(write_folder(tmp_path / "data"), None, tmp_path / "ready")
    (ready / "pictures.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"pictures.bin: not whole. Delete"):
        load_pictures(ready)


def test_pictures_without_questions_are_described_and_those_without_captions_asked_about(tmp_path):
    folder = write_folder(tmp_path / "data")
    ask = [{"image": "1.png", "question": "which colour?", "answer": "blue"}]
    (folder / "ask.json").write_text(json.dumps(ask))
    (folder / "draw.json").write_text(json.dumps([{"image": "0.png", "caption": "a red square"}]))
    data = load_pictures([str(folder / "ask.json"), str(folder / "draw.json")], folder=tmp_path / "ready")
    for stage in ("pretrain", "instruct"):
        rows = StageConversations(data, stage, num_rows=64, batch_size=1, pattern="ug", empty_caption_rate=0)
        seen = {row["messages"][0]["content"][-1]["text"]: row["messages"][1]["content"][-1] for row in rows_of(rows)}
        assert seen["which colour?"] == {"type": "text", "text": "blue"}
        assert {seen[request]["text"] for request in SHORT_REQUESTS if request in seen} == {"a red square"}
        assert seen["a red square"]["type"] == "image"
        assert {answer.get("text") for answer in seen.values()} == {"blue", "a red square", None}


def rows_of(rows):
    return [rows[index] for index in range(len(rows))]
