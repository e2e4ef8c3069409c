"""The scenes benchmark: one checkpoint answers, reconstructs and draws held-out scenes, and the scorer judges.

`python -m evaluation.scenes --model pisces-tiny --data HELDOUT --output results/NAME.json` writes one results file
with every number, its confidence interval and its protocol, and next to it a sheet of drawings and a table of answers.
The same command goes on where a killed one stopped.
The data folder is written by `python -m finetune.scenes --split heldout`; the scorer is `evaluation.scenes.scorer`.
With `--edits` it changes pictures as instructions say, of a folder that `python -m finetune.scenes.edits --split
heldout` writes, and stands beside two baselines (`evaluation.scenes.edits`).
"""

import argparse
import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evaluation.runs.batches import KeptBatches
from evaluation.runs.files import describe_machine, identify_adapters, identify_weights, keep_settings
from evaluation.runs.results import make_results
from evaluation.runs.summaries import (
    Outcomes,
    answer_summary,
    drawing_summary,
    save_sample,
    seed_generators,
    summarize,
)
from evaluation.scenes.descriptions import describe_drawings
from evaluation.scenes.detector import detect_objects, load_silhouettes
from evaluation.scenes.edits import answer_edits, ask_about_edits, edit_summary, edits_against
from evaluation.scenes.scorer import score_prompt, score_scene
from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, LineParser, add_adapter_flag, finite_number
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import current_command, hash_files
from pisces_commands.writing import held_output, write_json, write_whole


PROTOCOL = (
    "{scenes} Answers: greedy, exact match after lower case and without a final full stop. Reconstruction: true "
    "vectors to pixels, strict = background and every object's colour, shape and place. Drawing: {images_per_prompt} "
    "seeds per prompt, {settings}, no rewriting; overall = mean of the categories. Interleaved: one drawing per "
    "prompt, described in the next turn; right if all that was asked is said."
)
SCENES = {
    "heldout": "Scenes of combinations that training never showed.",
    "train": "New scenes of combinations that training shows.",
}


EDIT_PROTOCOL = (
    "{scenes} One drawing per instruction, seed 0, {settings}. Edited: what is asked for is there; kept: every other "
    "object has its colour, shape and place, and the background; both: the two at once. Of chained edits the last "
    "picture is judged, where nothing is to change that nothing did. Copy: the source as it is. Redraw: the model's "
    "own description, its words changed by the truth of the instruction, drawn. Shift: the source's true vectors, "
    "plus those drawn of the changed words, minus those drawn of the words before. Differences are of pairs. "
    "Described: asked in the next turn, the model says every object of the first result with its place."
)

DATA_FILES = ("scenes.jsonl", "prompts.jsonl", "shapes.json")
EDIT_FILES = ("edits.jsonl", "shapes.json")


def normalize_answer(text: str) -> str:
    return text.strip().lower().rstrip(".").strip()


@torch.no_grad()
def answer_questions(
    pipeline,
    data: Path,
    rows: list[dict],
    wording: str,
    limit: int,
    batch_size: int = 64,
    kept: KeptBatches | None = None,
) -> tuple[Outcomes, list[dict]]:
    """Ask `limit` questions of the rows in the given wording ("question" or "paraphrase"); all types equally often."""
    model, processor = pipeline.vision_language_model, pipeline.processor

    def answer(chunk: list[tuple[dict, dict]]) -> list[dict]:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": str(data / row["image"])}, _text(item[wording])]}]
            for row, item in chunk
        ]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [{"answer": text} for text in texts]

    outcomes: Outcomes = defaultdict(list)
    answered = []
    chosen = _choose_questions(rows, limit)
    for (row, item), said in (kept or KeptBatches()).run(f"answering ({wording})", chosen, batch_size, answer):
        correct = normalize_answer(said["answer"]) == normalize_answer(item["answer"])
        outcomes[item["type"]].append(correct)
        answered.append(
            {"image": row["image"], "question": item[wording], **said, "expected": item["answer"]}
            | {"type": item["type"], "correct": correct}
        )
    return outcomes, answered


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _choose_questions(rows: list[dict], limit: int) -> list[tuple[dict, dict]]:
    """The first questions of each type, equally many; descriptions have no single right wording and stay out."""
    by_type: dict[str, list] = defaultdict(list)
    for row in rows:
        seen = set()
        for item in row["questions"]:
            if not item["type"].startswith("describe") and item["type"] not in seen:  # one of a type per picture
                seen.add(item["type"])
                by_type[item["type"]].append((row, item))
    share = math.ceil(limit / max(len(by_type), 1))
    return [pair for pairs in by_type.values() for pair in pairs[:share]]


def reconstruct_scenes(
    pipeline, data: Path, rows: list[dict], silhouettes, batch_size: int = 50, kept: KeptBatches | None = None
) -> Outcomes:
    """Encode and decode each picture, then compare what is seen with its truth."""

    def reconstruct(chunk: list[dict]) -> list[dict]:
        pictures = [load_image(data / row["image"]) for row in chunk]
        images = pipeline.reconstruct(pictures, generator=seed_generators(range(len(chunk)))).images
        seen = [detect_objects(image, silhouettes) for image in images]
        return [_as_bools(score_scene(found, row["truth"])) for found, row in zip(seen, chunk, strict=True)]

    outcomes: Outcomes = defaultdict(list)
    for _, scores in (kept or KeptBatches()).run("reconstructing", rows, batch_size, reconstruct):
        for name, value in scores.items():
            outcomes[name].append(value)
    return outcomes


def _as_bools(scores: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(value) for name, value in scores.items()}  # what is read back is equal to what was kept


def draw_prompts(
    pipeline,
    prompts: list[dict],
    wording: str,
    images_per_prompt: int,
    silhouettes,
    batch_size: int = 50,
    kept: KeptBatches | None = None,
) -> tuple[Outcomes, list[tuple[dict, Image.Image, dict]]]:
    """Draw every prompt `images_per_prompt` times; seed k of a prompt is k, whatever the batch.

    Returns:
        outcomes by category, and each prompt with its first drawing and the scores of that.
    """
    kept = kept or KeptBatches()
    jobs = [(number, seed) for number in range(len(prompts)) for seed in range(images_per_prompt)]

    def draw(chunk: list[tuple[int, int]]) -> list[dict]:
        texts = [prompts[number][wording] for number, _ in chunk]
        images = pipeline(texts, generator=seed_generators(seed for _, seed in chunk)).images
        rows = []
        for (number, seed), image in zip(chunk, images, strict=True):
            scores = _as_bools(score_prompt(detect_objects(image, silhouettes), prompts[number]))
            shown = kept.keep_picture(image, f"{wording}_{number:05d}") if seed == 0 else None
            rows.append({"scores": scores, "picture": shown})
        return rows

    outcomes: Outcomes = defaultdict(list)
    drawn = []
    for (number, seed), row in kept.run(f"drawing ({wording})", jobs, batch_size, draw):
        prompt, scores = prompts[number], row["scores"]
        outcomes[prompt["tag"]].append(scores["correct"])
        for name, value in scores.items():
            outcomes[f"any/{name}"].append(value)
        if seed == 0:
            drawn.append((prompt, kept.open_picture(row["picture"]), scores))
    return outcomes, drawn


def save_sheet(drawn: list[tuple[dict, Image.Image, dict]], path: Path, per_category: int = 8) -> None:
    """The first drawings of each category with their prompts; a cross before the prompt marks a wrong one."""
    from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet

    tiles: dict[str, list] = defaultdict(list)
    for prompt, image, scores in drawn:
        if len(tiles[prompt["tag"]]) < per_category and all(prompt is not other for other, _ in tiles[prompt["tag"]]):
            mark = "" if scores["correct"] else "x "
            tiles[prompt["tag"]].append((prompt, Tile(image, mark + prompt["prompt"])))
    sections = [Section(tag, [tile for _, tile in pairs]) for tag, pairs in tiles.items()]
    write_whole(path, make_contact_sheet(sections, tile_side=128, columns=per_category).save)


def load_pipeline(arguments: argparse.Namespace):
    """The checkpoint's pipeline; flags that were given replace its own defaults of sampling."""
    from modeling_pisces import PiscesPipeline

    folder, adapters = find_model(arguments.model, arguments.adapter)
    pipeline = PiscesPipeline.from_pretrained(folder)
    attach_adapters(adapters, pipeline.vision_language_model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.guidance_scale is not None:
        pipeline.register_to_config(default_guidance_scale=arguments.guidance_scale)
    if arguments.image_temperature is not None:
        pipeline.vision_language_model.generation_config.image_temperature = arguments.image_temperature
    return pipeline


def describe_settings(pipeline) -> str:
    """How a call of this pipeline draws when it names nothing."""
    config, generation = pipeline.config, pipeline.vision_language_model.generation_config
    words = [f"{config.default_num_inference_steps} steps", f"guidance {config.default_guidance_scale}"]
    if pipeline.vision_language_model.model.gen_head.is_stochastic:
        words.append(f"image temperature {getattr(generation, 'image_temperature', 1.0)}")
    return ", ".join(words)


def describe_scenes(data: Path) -> str:
    """Whether training showed the combinations in a data folder, by the split it was rendered for."""
    settings = data / "settings.json"
    if not settings.is_file():  # a folder of somebody's own, as finetune.scenes.new_concept writes them
        return f"Scenes of {data.name}."
    split = json.loads(settings.read_text(encoding="utf-8"))["split"]
    return SCENES.get(split, f"Scenes of the split {split}.")


def describe_protocol(arguments: argparse.Namespace, pipeline) -> str:
    """A few sentences for whoever reads the numbers."""
    return PROTOCOL.format(
        scenes=describe_scenes(Path(arguments.data)),
        images_per_prompt=arguments.images_per_prompt,
        settings=describe_settings(pipeline),
    )


def begin(
    arguments: argparse.Namespace,
    pipeline,
    names: Sequence[str] = ("num_questions", "num_reconstructions", "num_prompts", "images_per_prompt"),
    files: Sequence[str] = DATA_FILES,
) -> tuple[dict[str, Any], KeptBatches]:
    """Everything that decides the numbers, and the folder beside the results file in which a killed run goes on.

    Raises:
        ValueError: it was begun with other flags, data or weights.
    """
    data, output = Path(arguments.data), Path(arguments.output)
    folder = output.with_name(output.stem + "_unfinished")
    checkpoint, adapters = find_model(arguments.model, arguments.adapter)
    settings = {
        "model": arguments.model,
        "weights": identify_weights(str(checkpoint)),
        "adapters": identify_adapters(adapters),
        "data_sha256": hash_files([data / name for name in files]),
        **{name: getattr(arguments, name) for name in names},
        "drawing": describe_settings(pipeline),
    }
    keep_settings(folder / "run.json", settings, describe_machine())
    return settings, KeptBatches(folder)


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all parts and return the results file's content; a run that was killed goes on where it stopped.

    Raises:
        ValueError: the data folder has no scenes or no prompts, or the unfinished run had other settings.
    """
    start = time.monotonic()
    data = Path(arguments.data)
    for name in DATA_FILES:
        if not (data / name).is_file():
            raise ValueError(f"--data {data}: no {name} in it. Write one: python -m finetune.scenes --split heldout.")
    rows = [json.loads(line) for line in (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [json.loads(line) for line in (data / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(prompts)
    prompts = prompts[: arguments.num_prompts]
    silhouettes = load_silhouettes(data)
    pipeline = load_pipeline(arguments)
    settings, kept = begin(arguments, pipeline)

    parts: dict[str, Any] = {"adapters": arguments.adapter} if arguments.adapter else {}
    for wording in ("question", "paraphrase"):
        outcomes, answered = answer_questions(pipeline, data, rows, wording, arguments.num_questions, kept=kept)
        parts[f"understanding_{wording}"] = answer_summary(outcomes)
        if wording == "question":
            table = answered
    parts["reconstruction"] = summarize(
        reconstruct_scenes(pipeline, data, rows[: arguments.num_reconstructions], silhouettes, kept=kept)
    )
    for wording in ("prompt", "paraphrase"):
        outcomes, drawn = draw_prompts(pipeline, prompts, wording, arguments.images_per_prompt, silhouettes, kept=kept)
        parts[f"drawing_{wording}"] = drawing_summary(outcomes)
        if wording == "prompt":
            sheet = drawn
    words = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    outcomes, described = describe_drawings(pipeline, prompts, words, kept=kept)
    parts["interleaved"] = drawing_summary(outcomes)
    output = Path(arguments.output)
    results = make_results(
        "scenes",
        arguments.model,
        parts,
        settings,
        command=current_command(),
        facts=describe_machine(),
        protocol=describe_protocol(arguments, pipeline),
        start=start,
    )
    save_sheet(sheet, output.with_name(output.stem + "_drawings.png"))
    save_sample(table, output.with_name(output.stem + "_answers.json"))
    save_sample(described, output.with_name(output.stem + "_descriptions.json"))
    write_json(output, results)  # last: where it is, the run is finished
    shutil.rmtree(output.with_name(output.stem + "_unfinished"))
    return results


def evaluate_edits(arguments: argparse.Namespace) -> dict[str, Any]:
    """As `evaluate`, for `--edits`: the model's own edits beside copying and beside describing and drawing again.

    Raises:
        ValueError: the data folder has no edits, or the unfinished run had other settings.
    """
    start, facts = time.monotonic(), describe_machine()  # before the run's own folder counts as a change
    data, output = Path(arguments.data), Path(arguments.output)
    for name in EDIT_FILES:
        if not (data / name).is_file():
            raise ValueError(
                f"--data {data}: no {name} in it. Write one: python -m finetune.scenes.edits --split heldout."
            )
    rows = [json.loads(line) for line in (data / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[: arguments.num_edits]
    world = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    pipeline = load_pipeline(arguments)
    settings, kept = begin(arguments, pipeline, ("num_edits",), EDIT_FILES)
    outcomes, drawn = answer_edits(pipeline, data, rows, world, load_silhouettes(data), kept=kept)
    parts: dict[str, Any] = {"adapters": arguments.adapter} if arguments.adapter else {}
    parts |= {way: edit_summary(values) for way, values in outcomes.items()}
    parts["edit_minus"] = edits_against(outcomes)
    parts["described"] = answer_summary(ask_about_edits(pipeline, data, rows, world, kept=kept))
    protocol = EDIT_PROTOCOL.format(scenes=describe_scenes(data), settings=describe_settings(pipeline))
    results = make_results(
        "edits",
        arguments.model,
        parts,
        settings,
        command=current_command(),
        facts=facts,
        protocol=protocol,
        start=start,
    )
    save_edit_sheet(drawn, data, output.with_name(output.stem + "_edits.png"))
    write_json(output, results)  # last: where it is, the run is finished
    shutil.rmtree(output.with_name(output.stem + "_unfinished"))
    return results


def save_edit_sheet(drawn: list[tuple[dict, dict, dict]], data: Path, path: Path, per_kind: int = 2) -> None:
    """For each kind source, result, truth and redrawn picture; a cross marks a result that is not both."""
    from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet

    tiles: dict[str, list] = defaultdict(list)
    for row, pictures, scores in drawn:
        if len(tiles[row["kind"]]) >= 4 * per_kind:
            continue
        said = "; then ".join(turn["instruction"].rstrip(".") for turn in row["turns"])
        tiles[row["kind"]] += [
            Tile(load_image(data / row["image"]), said),
            Tile(pictures["edit"], "result" if scores["both"] else "x result"),
            Tile(load_image(data / row["turns"][-1]["image"]), "truth"),
            Tile(pictures["redraw"], "described and drawn again"),
        ]
    sections = [Section(kind, found) for kind, found in tiles.items()]
    write_whole(path, make_contact_sheet(sections, tile_side=128, columns=4 * per_kind).save)


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    add_adapter_flag(parser)
    parser.add_argument(
        "--data", required=True, help="held-out data folder with scenes.jsonl and prompts.jsonl, or edits.jsonl"
    )
    parser.add_argument("--output", required=True, help="results file to write, .json")
    parser.add_argument("--num_questions", type=COUNT, default=1800, help="questions, equally many of each type")
    parser.add_argument("--num_reconstructions", type=COUNT, default=300, help="pictures to reconstruct")
    parser.add_argument("--num_prompts", type=COUNT, default=192, help="drawing prompts")
    parser.add_argument("--images_per_prompt", type=COUNT, default=4, help="drawings of each prompt")
    parser.add_argument("--edits", action="store_true", help="score edits, of a folder with edits.jsonl, alone")
    parser.add_argument("--num_edits", type=COUNT, default=600, help="edits, with --edits")
    parser.add_argument("--image_temperature", type=finite_number(0, 100), help="instead of the checkpoint's own")
    parser.add_argument("--guidance_scale", type=finite_number(0, 1000), help="instead of the checkpoint's own")
    with one_line_ending():
        arguments = parser.parse_args()
        with held_output(arguments.output):
            results = evaluate_edits(arguments) if arguments.edits else evaluate(arguments)
        for name, part in results.items():
            if isinstance(part, dict) and "overall" in part:
                print(name, json.dumps(part["overall"]))
