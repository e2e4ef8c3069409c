"""The scenes benchmark: one checkpoint answers, reconstructs and draws held-out scenes, and the scorer judges.

`python -m evaluation.scenes --model pisces-tiny --data HELDOUT --output results/NAME.json` writes one results file
with every number, its confidence interval and its protocol, and next to it a sheet of drawings and a table of answers.
The data folder is written by `python -m finetune.scenes --split heldout`; the scorer is `evaluation.scene_scorer`.
"""

import argparse
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tqdm import tqdm

from evaluation.scene_detector import detect_objects, load_silhouettes
from evaluation.scene_scorer import score_prompt, score_scene


Outcomes = dict[str, list[bool]]
PROTOCOL = (
    "Scenes of combinations that training never showed. Answers: greedy, exact match after lower case and without a "
    "final full stop. Reconstruction: true vectors to pixels, strict = background and every object's colour, shape "
    "and place. Drawing: {images_per_prompt} seeds per prompt, no rewriting; overall = mean of the categories."
)


def wilson_interval(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score)."""
    if total == 0:
        return 0.0, 1.0
    share, scale = successes / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return middle - half, middle + half


def summarize(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Share, number and interval of each category."""
    summary = {}
    for name, values in sorted(outcomes.items()):
        low, high = wilson_interval(sum(values), len(values))
        share = sum(values) / len(values) if values else 0.0
        summary[name] = {"value": round(share, 4), "n": len(values), "low": round(low, 4), "high": round(high, 4)}
    return summary


def batches(items: list, size: int, description: str) -> Iterator[list]:
    """`items` in lists of `size`, with a progress bar that counts items."""
    with tqdm(total=len(items), desc=description) as bar:
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            yield chunk
            bar.update(len(chunk))


def normalize_answer(text: str) -> str:
    return text.strip().lower().rstrip(".").strip()


@torch.no_grad()
def answer_questions(
    pipeline, data: Path, rows: list[dict], wording: str, limit: int, batch_size: int = 64
) -> tuple[Outcomes, list[dict]]:
    """Ask `limit` questions of the rows in the given wording ("question" or "paraphrase"); all types equally often."""
    model, processor = pipeline.vision_language_model, pipeline.processor
    outcomes: Outcomes = defaultdict(list)
    answered = []
    for chunk in batches(_choose_questions(rows, limit), batch_size, f"answering ({wording})"):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": str(data / row["image"])}, _text(item[wording])]}]
            for row, item in chunk
        ]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (row, item), text in zip(chunk, texts, strict=True):
            correct = normalize_answer(text) == normalize_answer(item["answer"])
            outcomes[item["type"]].append(correct)
            answered.append(
                {"image": row["image"], "question": item[wording], "answer": text, "expected": item["answer"]}
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


def reconstruct_scenes(pipeline, data: Path, rows: list[dict], silhouettes, batch_size: int = 50) -> Outcomes:
    """Encode and decode each picture, then compare what is seen with its truth."""
    outcomes: Outcomes = defaultdict(list)
    for chunk in batches(rows, batch_size, "reconstructing"):
        pictures = [Image.open(data / row["image"]).convert("RGB") for row in chunk]
        images = pipeline.reconstruct(pictures, generator=_generators(range(len(chunk)))).images
        for row, image in zip(chunk, images, strict=True):
            for name, value in score_scene(detect_objects(image, silhouettes), row["truth"]).items():
                outcomes[name].append(value)
    return outcomes


def _generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_prompts(
    pipeline, prompts: list[dict], wording: str, images_per_prompt: int, silhouettes, batch_size: int = 50
) -> tuple[Outcomes, list[tuple[dict, Image.Image, dict]]]:
    """Draw every prompt `images_per_prompt` times; seed k of a prompt is k, whatever the batch."""
    jobs = [(prompt, seed) for prompt in prompts for seed in range(images_per_prompt)]
    outcomes: Outcomes = defaultdict(list)
    drawn = []
    for chunk in batches(jobs, batch_size, f"drawing ({wording})"):
        texts = [prompt[wording] for prompt, _ in chunk]
        images = pipeline(texts, generator=_generators(seed for _, seed in chunk)).images
        for (prompt, _), image in zip(chunk, images, strict=True):
            scores = score_prompt(detect_objects(image, silhouettes), prompt)
            outcomes[prompt["tag"]].append(scores["correct"])
            for name, value in scores.items():
                outcomes[f"any/{name}"].append(value)
            drawn.append((prompt, image, scores))
    return outcomes, drawn


def drawing_summary(outcomes: Outcomes) -> dict[str, Any]:
    """Categories, their mean, and the single attributes over all drawings."""
    summary = summarize({name: values for name, values in outcomes.items() if not name.startswith("any/")})
    overall = sum(item["value"] for item in summary.values()) / max(len(summary), 1)
    attributes = summarize({name[4:]: values for name, values in outcomes.items() if name.startswith("any/")})
    return {"overall": round(overall, 4), "categories": summary, "attributes": attributes}


def answer_summary(outcomes: Outcomes) -> dict[str, Any]:
    every = [value for values in outcomes.values() for value in values]
    return {"overall": summarize({"overall": every})["overall"], "types": summarize(outcomes)}


def save_sheet(drawn: list[tuple[dict, Image.Image, dict]], path: Path, per_category: int = 8) -> None:
    """The first drawings of each category with their prompts; a cross before the prompt marks a wrong one."""
    from modeling_pisces.contact_sheet_pisces import Section, Tile, make_contact_sheet

    tiles: dict[str, list] = defaultdict(list)
    for prompt, image, scores in drawn:
        if len(tiles[prompt["tag"]]) < per_category and all(prompt is not other for other, _ in tiles[prompt["tag"]]):
            mark = "" if scores["correct"] else "x "
            tiles[prompt["tag"]].append((prompt, Tile(image, mark + prompt["prompt"])))
    sections = [Section(tag, [tile for _, tile in pairs]) for tag, pairs in tiles.items()]
    make_contact_sheet(sections, tile_side=128, columns=per_category).save(path)


def describe_run(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a reader needs to run it again."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": "python -m evaluation.scenes " + " ".join(sys.argv[1:]),
        "commit": commit,
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(seconds, 1),
        "protocol": PROTOCOL.format(images_per_prompt=arguments.images_per_prompt),
    }


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all parts and return the results file's content."""
    from modeling_pisces import PiscesPipeline

    start = time.monotonic()
    data = Path(arguments.data)
    rows = [json.loads(line) for line in (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [json.loads(line) for line in (data / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(prompts)
    prompts = prompts[: arguments.num_prompts]
    silhouettes = load_silhouettes(data)
    pipeline = PiscesPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)

    results: dict[str, Any] = {"benchmark": "scenes", "model": arguments.model}
    for wording in ("question", "paraphrase"):
        outcomes, answered = answer_questions(pipeline, data, rows, wording, arguments.num_questions)
        results[f"understanding_{wording}"] = answer_summary(outcomes)
        if wording == "question":
            table = answered
    results["reconstruction"] = summarize(
        reconstruct_scenes(pipeline, data, rows[: arguments.num_reconstructions], silhouettes)
    )
    for wording in ("prompt", "paraphrase"):
        outcomes, drawn = draw_prompts(pipeline, prompts, wording, arguments.images_per_prompt, silhouettes)
        results[f"drawing_{wording}"] = drawing_summary(outcomes)
        if wording == "prompt":
            sheet = drawn
    results["run"] = describe_run(arguments, time.monotonic() - start)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    save_sheet(sheet, output.with_name(output.stem + "_drawings.png"))
    sample = table[:: max(len(table) // 60, 1)]
    output.with_name(output.stem + "_answers.json").write_text(json.dumps(sample, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data", required=True, help="held-out data folder with scenes.jsonl and prompts.jsonl")
    parser.add_argument("--output", required=True, help="results file to write, .json")
    parser.add_argument("--num_questions", type=int, default=1800, help="questions, equally many of each type")
    parser.add_argument("--num_reconstructions", type=int, default=300, help="pictures to reconstruct")
    parser.add_argument("--num_prompts", type=int, default=192, help="drawing prompts")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="drawings of each prompt")
    results = evaluate(parser.parse_args())
    for name, part in results.items():
        if isinstance(part, dict) and "overall" in part:
            print(name, json.dumps(part["overall"]))


if __name__ == "__main__":
    main()
