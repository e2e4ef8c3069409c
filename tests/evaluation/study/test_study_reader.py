"""Claims about `evaluation.study.reader` and `evaluation.study.score`: readings of known worth, on rendered scenes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evaluation.study import reader as readers
from evaluation.study import score
from evaluation.study.reader import VectorReader, caption_of, read_rows, read_words, scene_labels, score_readings
from finetune.scenes.render import write_scenes
from tests.fixtures import make_model, make_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", 24, seed=4, split="heldout", max_objects=2)


@pytest.fixture(scope="module")
def words(data) -> dict:
    return read_words(data)


def truths_of(data: Path) -> list[dict]:
    return [row["truth"] for row in read_rows(data)]


def as_vectors(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nine vectors that say what lies at each place, in so many numbers, and the background in each."""
    parts = [torch.nn.functional.one_hot(labels["shape"], 7), torch.nn.functional.one_hot(labels["color"], 9)]
    background = torch.nn.functional.one_hot(labels["background"], 2)[:, None].expand(-1, 9, -1)
    return 3 * torch.cat([*parts, background], dim=-1).float()


def test_labels_say_what_lies_where(words):
    thing = {"shape": "star", "color": "green", "row": 2, "col": 1}
    labels = scene_labels([{"background": "dark", "objects": [thing]}], words)
    assert labels["shape"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1 + words["shape"].index("star"), 0]]
    assert labels["color"][0, 7] == 1 + words["color"].index("green") and labels["color"].count_nonzero() == 1
    assert labels["background"].tolist() == [words["background"].index("dark")]


def test_readings_are_scored_object_by_object_and_picture_by_picture():
    truth = {
        "shape": torch.tensor([[1, 0, 2], [3, 0, 0]]),
        "color": torch.tensor([[1, 0, 2], [3, 0, 0]]),
        "background": torch.tensor([0, 1]),
    }
    assert all(all(values) for values in score_readings(truth, truth).values())
    read = {name: value.clone() for name, value in truth.items()}
    read["color"][0, 2] = 5  # the second object's colour
    read["shape"][1, 1] = 1  # one object too many
    scores = score_readings(read, truth)
    assert scores["strict"] == [False, False] and scores["objects"] == [True, False, True]
    assert scores["shapes"] == [True] * 3 and scores["colors"] == [True, False, True]
    read["shape"][1, 1], read["background"][1] = 0, 0
    assert score_readings(read, truth)["strict"] == [False, False]
    assert score_readings(read, truth)["background"] == [True, False]


def test_a_reader_learns_to_read_and_is_the_same_after_loading(tmp_path, data, words):
    """Three scenes by heart: colour, shape, place and background all come out of the vectors."""
    labels = {name: value[:3] for name, value in scene_labels(truths_of(data), words).items()}
    vectors = as_vectors(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = VectorReader(9, 18, words).eval()
    reader = readers.train_reader(vectors, labels, words, max_steps=80, batch_size=8)
    assert all(score_readings(reader.read(vectors), labels)["strict"])
    assert not any(score_readings(fresh.read(vectors), labels)["strict"])
    reader.save(tmp_path / "reader", {"ceiling": {"x": 1}})
    again, facts = VectorReader.load(tmp_path / "reader")
    assert facts == {"ceiling": {"x": 1}}
    noise = torch.randn(5, 9, 18)
    read, expected = again(noise), reader(noise)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_reader_is_made_for_a_checkpoint_with_its_ceiling(data, tmp_path):
    model, processor = make_model(), make_processor()
    readers.make_reader(model, processor, [data, data], data, tmp_path, max_steps=2)
    reader, facts = VectorReader.load(tmp_path)
    assert (reader.settings["num_vectors"], reader.settings["vector_size"]) == (4, 12)
    assert facts["num_pictures"] == 48 and facts["ceiling"]["strict"]["n"] == 24


def test_encoded_rows_are_the_models_own_vectors(data):
    model, processor = make_model(), make_processor()
    rows = read_rows(data, 3)
    pictures = [Image.open(data / row["image"]) for row in rows]
    pixels = processor(gen_images=pictures, return_tensors="pt")["gen_pixel_values"]
    torch.testing.assert_close(readers.encode_rows(model, processor, data, rows, 2), model.encode_gen_images(pixels))


def test_captions_pin_the_scene_down(data):
    row = read_rows(data, 1)[0]
    answers = {question["type"]: question["answer"] for question in row["questions"]}
    assert caption_of(row, "describe") == answers["describe"]
    assert all(item["color"] in caption_of(row, "describe") for item in row["truth"]["objects"])
    assert all(item["size"] in caption_of(row, "describe_detail") for item in row["truth"]["objects"])


def test_a_perfect_drawing_scores_one_and_the_mean_scores_nothing(data, words, monkeypatch):
    """Scripted drawings under a scripted reader: the score is known beforehand."""
    rows = read_rows(data)
    truth = scene_labels(truths_of(data), words)
    true_vectors = as_vectors(truth)
    exact = SimpleNamespace(
        words=words,
        read=lambda vectors: {
            "shape": vectors[..., :7].argmax(-1),
            "color": vectors[..., 7:16].argmax(-1),
            "background": vectors[:, 0, 16:].argmax(-1),
        },
    )
    monkeypatch.setattr(score, "encode_rows", lambda *_: true_vectors)
    drawings = {"short": true_vectors, "detailed": true_vectors.mean(0).expand_as(true_vectors)}
    asked = []

    def draw(model, processor, captions):
        asked.append(captions)
        return drawings["short" if len(asked) == 1 else "detailed"]

    monkeypatch.setattr(score, "draw_captions", draw)
    found = score.score_drawing(None, None, exact, data, rows)
    assert found["short"]["strict"]["value"] == found["short"]["vector_r2"] == 1.0
    assert found["detailed"]["strict"]["value"] == 0.0 and found["detailed"]["vector_r2"] == pytest.approx(0, abs=1e-4)
    assert asked[0] == [caption_of(row, "describe") for row in rows] != asked[1]


def test_an_arm_is_scored_on_the_sides_that_it_was_trained_for(data, tmp_path):
    model, processor = make_model(), make_processor()
    readers.make_reader(model, processor, [data], data, tmp_path, max_steps=1)
    both = score.score_checkpoint(model, processor, tmp_path, data, "ug", num_questions=9)
    assert both["understanding"]["overall"]["n"] == 9 and both["drawing"]["short"]["strict"]["n"] == 24
    assert both["ceiling"] == json.loads((tmp_path / "reader.json").read_text())["ceiling"]
    assert "drawing" not in score.score_checkpoint(model, processor, tmp_path, data, "u", num_questions=9)
    assert "understanding" not in score.score_checkpoint(model, processor, tmp_path, data, "g", num_questions=9)


def test_drawings_are_what_the_model_draws_for_the_caption():
    model, processor = make_model(), make_processor()
    drawn = score.draw_captions(model, processor, ["a red star", "two blue circles and a cross"], batch_size=2)
    alone = score.draw_captions(model, processor, ["a red star"])
    assert drawn.shape == (2, 4, 12)
    torch.testing.assert_close(drawn[:1], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)


def test_the_check_counts_equal_verdicts_of_reader_and_decoder(data, words, monkeypatch):
    """The decoder gives back the true pictures; the reader is right about every second drawing."""
    rows = read_rows(data, 4)
    truth = scene_labels([row["truth"] for row in rows], words)
    wrong = {name: value.clone() for name, value in truth.items()}
    wrong["background"][::2] = 1 - wrong["background"][::2]
    reader = SimpleNamespace(words=words, read=lambda vectors: wrong)
    pictures = [Image.open(data / row["image"]).convert("RGB") for row in rows]
    pipeline = type("Pipeline", (), {"__call__": lambda self, **_: SimpleNamespace(images=pictures)})()
    pipeline.encode_prompt = lambda captions, generator: torch.zeros(len(captions), 4, 12)
    found = readers.check_reader(pipeline, reader, data, num_drawings=4)
    assert found["strict_reader"]["value"] == found["agreement"]["value"] == 0.5
    assert found["strict_decoder"]["value"] == 1.0


def test_a_folder_without_scenes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rows in scenes.jsonl. Write a data folder with finetune.scenes first"):
        read_rows(tmp_path)
