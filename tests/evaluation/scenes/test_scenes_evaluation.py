"""Claims about `evaluation.scenes`: scripted answers and pictures of known score."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evaluation.runs.batches import KeptBatches
from evaluation.scenes import benchmark as scenes
from evaluation.scenes.detector import load_silhouettes
from finetune.scenes.render import write_scenes
from pisces_commands.measurement import wilson_interval


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", num_scenes=20, seed=4, split="heldout")


@pytest.fixture(scope="module")
def rows(data) -> list[dict]:
    return [json.loads(line) for line in (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]


class ScriptedPipeline:
    """Answers and draws from a list; stands in for a checkpoint, so that the score is known beforehand."""

    def __init__(self, answers: dict[str, str] | None = None, pictures: list[Image.Image] | None = None):
        self.answers, self.pictures = answers or {}, pictures
        self.vision_language_model = SimpleNamespace(device="cpu", generate=self.generate)
        self.processor = SimpleNamespace(apply_chat_template=self.encode, batch_decode=self.decode)

    def encode(self, conversations, **kwargs):
        self.asked = [conversation[0]["content"] for conversation in conversations]
        batch = {"input_ids": torch.zeros(len(conversations), 3, dtype=torch.long)}
        return type("Batch", (dict,), {"to": lambda self, device: self})(batch)

    def generate(self, input_ids, **kwargs):
        return torch.cat([input_ids, torch.arange(len(input_ids)).unsqueeze(1)], dim=1)

    def decode(self, ids, **kwargs):
        return [self.answers[image["image"], text["text"]] for image, text in (self.asked[i] for i in ids.flatten())]

    def reconstruct(self, pictures, generator):
        return SimpleNamespace(images=self.pictures or pictures)


def test_true_answers_score_one_and_one_wrong_in_four_scores_three_quarters(data, rows):
    chosen = scenes._choose_questions(rows, 40)
    truth = {(str(data / row["image"]), q["question"]): f" {q['answer'].upper()}. " for row, q in chosen}
    outcomes, _ = scenes.answer_questions(ScriptedPipeline(truth), data, rows, "question", 40)
    assert scenes.answer_summary(outcomes)["overall"]["value"] == 1.0

    wrong = {key: "nonsense" if index % 4 == 0 else value for index, (key, value) in enumerate(truth.items())}
    outcomes, answered = scenes.answer_questions(ScriptedPipeline(wrong), data, rows, "question", 40)
    expected = sum(wrong[str(data / a["image"]), a["question"]] != "nonsense" for a in answered) / len(answered)
    assert scenes.answer_summary(outcomes)["overall"]["value"] == pytest.approx(expected, abs=1e-4)
    assert 0.7 < expected < 0.8


def test_questions_are_chosen_equally_over_the_types(rows):
    types = [question["type"] for _, question in scenes._choose_questions(rows, 45)]
    assert {types.count(name) for name in set(types)} == {5}
    assert not any(name.startswith("describe") for name in types)


def test_perfect_reconstructions_score_one_and_blank_ones_zero(data, rows):
    silhouettes = load_silhouettes(data)
    perfect = scenes.summarize(scenes.reconstruct_scenes(ScriptedPipeline(), data, rows, silhouettes))
    assert {item["value"] for item in perfect.values()} == {1.0}
    blank = ScriptedPipeline(pictures=[Image.new("RGB", (64, 64), "white")] * len(rows))
    scores = scenes.summarize(scenes.reconstruct_scenes(blank, data, rows, silhouettes))
    assert scores["strict"]["value"] == scores["count"]["value"] == 0.0


def test_the_interval_is_wilsons():
    # 8 of 10, by hand: centre (0.8 + 3.8416 / 20) / 1.38416, half width 1.96 * sqrt(0.016 + 0.009604) / 1.38416
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


@pytest.mark.parametrize("total", [1, 5, 10, 30, 1000])
def test_the_interval_of_none_and_of_all_ends_at_zero_and_at_one(total):
    assert str(wilson_interval(0, total)[0]) == "0.0"  # not -0.0
    assert wilson_interval(total, total)[1] == pytest.approx(1) and wilson_interval(total, total)[1] <= 1


def test_a_folder_without_scenes_ends_in_one_line(tmp_path, monkeypatch):
    flags = ["--model", "pisces-tiny", "--data", str(tmp_path), "--output", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", ["scenes", *flags])
    with pytest.raises(
        SystemExit, match=r"no scenes\.jsonl in it. Write one: python -m finetune.scenes --split heldout"
    ):
        scenes.main()


def test_the_protocol_says_whether_training_showed_the_combinations(data, tmp_path):
    assert scenes.describe_scenes(data) == "Scenes of combinations that training never showed."
    shown = write_scenes(tmp_path / "shown", num_scenes=1, seed=4, split="train")
    assert scenes.describe_scenes(shown) == "New scenes of combinations that training shows."
    (shown / "settings.json").unlink()
    assert scenes.describe_scenes(shown) == f"Scenes of {shown.name}."
    assert scenes.PROTOCOL.startswith("{scenes} Answers: greedy")


@pytest.mark.parametrize(
    ("head", "own", "words"),
    [
        ("flow", {"image_temperature": 0.3}, "image temperature 0.3"),
        ("flow", {}, "image temperature 1.0"),
        ("mlp", {}, ""),
    ],
)
def test_the_protocol_states_the_temperature_in_force_also_where_the_checkpoint_names_none(head, own, words):
    backbone = SimpleNamespace(gen_head=SimpleNamespace(is_stochastic=head == "flow"))
    model = SimpleNamespace(model=backbone, generation_config=SimpleNamespace(**own))
    config = SimpleNamespace(default_num_inference_steps=20, default_guidance_scale=1.0)
    said = scenes.describe_settings(SimpleNamespace(config=config, vision_language_model=model))
    assert said == "20 steps, guidance 1.0" + (f", {words}" if words else "")


# ---- going on after a kill


class CountingPipeline(ScriptedPipeline):
    """Answers with its question, draws by the seed, and is killed before the call of a given number."""

    def __init__(self, killed_at: int | None = None):
        super().__init__()
        self.killed_at, self.calls = killed_at, 0

    def _count(self):
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        self.calls += 1

    def generate(self, input_ids, **kwargs):
        self._count()
        return super().generate(input_ids, **kwargs)

    def decode(self, ids, **kwargs):
        return [self.asked[i][1]["text"] for i in ids.flatten()]

    def reconstruct(self, pictures, generator):
        self._count()
        return SimpleNamespace(images=pictures)

    def __call__(self, texts, generator):
        self._count()
        side = 64
        colors = [tuple(torch.randint(0, 256, (3,), generator=one).tolist()) for one in generator]
        return SimpleNamespace(images=[Image.new("RGB", (side, side), color) for color in colors])


def run_parts(pipeline, data, rows, folder):
    """Outcomes of all parts, in batches of two or three."""
    kept = KeptBatches(folder)
    prompts = [json.loads(line) for line in (data / "prompts.jsonl").read_text(encoding="utf-8").splitlines()][:4]
    silhouettes = load_silhouettes(data)
    answers = scenes.answer_questions(pipeline, data, rows, "question", 6, batch_size=3, kept=kept)
    again = scenes.reconstruct_scenes(pipeline, data, rows[:4], silhouettes, batch_size=2, kept=kept)
    outcomes, drawn = scenes.draw_prompts(pipeline, prompts, "prompt", 2, silhouettes, batch_size=3, kept=kept)
    return answers, again, outcomes, [(prompt, image.tobytes(), scores) for prompt, image, scores in drawn]


def test_a_run_that_is_killed_before_any_batch_goes_on_with_equal_results(data, rows, tmp_path):
    whole = CountingPipeline()
    expected = run_parts(whole, data, rows, None)
    assert whole.calls > 6
    for killed_at in range(whole.calls):
        folder = tmp_path / str(killed_at)
        with pytest.raises(KeyboardInterrupt):
            run_parts(CountingPipeline(killed_at), data, rows, folder)
        if killed_at:
            with (folder / "batches.jsonl").open("a") as log:
                log.write('{"part": "half a li')  # killed while it wrote
        again = CountingPipeline()
        assert run_parts(again, data, rows, folder) == expected
        assert again.calls == whole.calls - killed_at
        assert run_parts(CountingPipeline(0), data, rows, folder) == expected  # nothing is left to do


def test_an_unfinished_run_of_other_flags_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "describe_settings", lambda pipeline: "20 steps")
    flags = {"model": "pisces-tiny", "data": str(data), "output": str(tmp_path / "out.json"), "num_questions": 6}
    flags |= {"num_reconstructions": 4, "num_prompts": 4, "images_per_prompt": 2, "adapter": []}
    scenes.begin(SimpleNamespace(**flags), None)
    scenes.begin(SimpleNamespace(**flags), None)
    with pytest.raises(ValueError, match=r"out_unfinished/run.json was begun with num_prompts 4, not 5"):
        scenes.begin(SimpleNamespace(**flags | {"num_prompts": 5}), None)
