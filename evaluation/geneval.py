"""Scores a folder of drawings by GenEval's rules with detectors of transformers: a *variant* of GenEval.

    python -m evaluation.geneval --drawings drawings --output results/geneval.json

The official scorer finds objects with mmdet's Mask2Former; here any detector of transformers does, so the numbers are
comparable among themselves and not with published ones until agreement is shown. Rules are in
`evaluation.drawing.geneval_rules`, models in `evaluation.drawing.detectors`. Every picture's verdict is kept in a
folder beside the results file, where a killed run goes on; `--shard 1/2` and `--shard 2/2` share the work, and the
last one sums up.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.drawing.detectors import ColorClassifier, load_detector
from evaluation.drawing.folder import picture_path, read_entries, read_run
from evaluation.drawing.geneval_rules import Detect, NameColors, Thresholds, judge
from evaluation.drawing.prompt_sets import check_geneval_row
from evaluation.runs.files import (
    cut_half_line,
    describe_command,
    describe_machine,
    identify_weights,
    keep_settings,
    parse_shard,
    read_lines,
    take_shard,
)
from evaluation.runs.results import make_results
from evaluation.runs.summaries import Outcomes, drawing_summary
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SHARE, LineParser, finite_number
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import append_line, write_json


# What the official scorer uses, in its form for transformers.
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOR_MODEL = "openai/clip-vit-large-patch14"

Job = tuple[int, int]  # index of the prompt, index of its picture


def load_models(arguments: argparse.Namespace, entries: list[dict]) -> tuple[Detect, NameColors, dict[str, Any]]:
    """The detector, the colour classifier, and what identifies both."""
    objects = [item for entry in entries for item in [*entry["include"], *entry.get("exclude", [])]]
    classes = sorted({item["class"] for item in objects})
    least = min(arguments.threshold, arguments.counting_threshold)
    detect, commit = load_detector(arguments.detector, arguments.detector_revision, classes, least)
    name_colors = ColorClassifier(arguments.color_model, arguments.color_model_revision)
    names = {
        "detector": f"{arguments.detector}, {identify_weights(arguments.detector, commit)}",
        "color_model": f"{arguments.color_model}, {identify_weights(arguments.color_model, name_colors.commit)}",
    }
    return detect, name_colors, names


def verdict_files(output: Path) -> Path:
    """The folder of verdicts that belongs to a results file."""
    return output.with_name(output.stem + "_verdicts")


def judge_pictures(
    drawings: Path,
    entries: list[dict],
    jobs: Sequence[Job],
    lines: Path,
    models: tuple[Detect, NameColors],
    thresholds: Thresholds,
) -> None:
    """Add a line with the verdict on each picture of `jobs` that has none."""
    detect, name_colors = models
    cut_half_line(lines)
    done = set(read_verdicts(lines.parent))
    for prompt_index, image_index in tqdm([job for job in jobs if job not in done], desc="scoring", unit="picture"):
        path = picture_path(drawings, prompt_index, image_index)
        image = load_image(path)
        entry = entries[prompt_index]
        verdict = judge(image, detect(image), entry, name_colors, thresholds)
        row = {"file": path.relative_to(drawings).as_posix(), "prompt": prompt_index, "image": image_index}
        append_line(lines, json.dumps(row | {"tag": entry["tag"], **verdict._asdict()}, ensure_ascii=False))


def read_verdicts(folder: Path) -> dict[Job, dict[str, Any]]:
    """All verdicts so far, of every shard."""
    rows = [row for lines in sorted(folder.glob("*.jsonl")) for row in read_lines(lines)]
    return {(row["prompt"], row["image"]): row for row in rows}


def sum_up(verdicts: dict[Job, dict[str, Any]], jobs: Sequence[Job]) -> dict[str, Any]:
    """Share, number and interval of each task, and the mean of the tasks."""
    outcomes: Outcomes = defaultdict(list)
    for job in jobs:
        outcomes[verdicts[job]["tag"]].append(verdicts[job]["correct"])
    summary = drawing_summary(outcomes)
    return {"overall": summary["overall"], "categories": summary["categories"]}


def describe_protocol(settings: dict[str, Any], drawn: dict[str, Any]) -> str:
    """One sentence for whoever reads the number."""
    known = drawn["prompt_set"] == "geneval"
    return (
        f"A variant of GenEval (arXiv 2310.11513) on {'its' if known else 'our own'} {drawn['num_prompts']} prompts "
        f"({drawn['wording']}), {drawn['images_per_prompt']} pictures each of {drawn['width']} x {drawn['height']} "
        f"pixels, {drawn['num_inference_steps']} steps, guidance {drawn['guidance_scale']}, seeds from "
        f"{drawn['seed']}. Objects: {settings['detector']}; colours: {settings['color_model']}. Overall = mean of the "
        "tasks."
    )


def score(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Judge one shard of the pictures; the results, or None while other shards have pictures left.

    Raises:
        ValueError: drawings are missing, cannot be scored, or the results file has verdicts of other settings.
    """
    start = time.monotonic()
    shard = parse_shard(arguments.shard)
    drawn, entries = read_run(arguments.drawings), read_entries(arguments.drawings)
    for index, entry in enumerate(entries):
        check_geneval_row(entry, f"{arguments.drawings}, prompt {index}")
    jobs = [(index, image) for index in range(len(entries)) for image in range(drawn["settings"]["images_per_prompt"])]
    thresholds = Thresholds(
        arguments.threshold,
        arguments.counting_threshold,
        arguments.max_objects,
        arguments.max_overlap,
        arguments.position_threshold,
    )
    detect, name_colors, names = load_models(arguments, entries)
    settings = {"drawings": drawn["settings"], **names, "thresholds": asdict(thresholds)}
    facts = describe_machine()
    folder = verdict_files(arguments.output)
    keep_settings(folder / "run.json", settings, facts)
    lines = folder / f"{shard[0]}_of_{shard[1]}.jsonl"
    judge_pictures(arguments.drawings, entries, take_shard(jobs, shard), lines, (detect, name_colors), thresholds)

    verdicts = read_verdicts(folder)
    if missing := [job for job in jobs if job not in verdicts]:
        print(f"{len(verdicts)} of {len(jobs)} pictures are judged; run the shards of the other {len(missing)}.")
        return None
    results = make_results(
        "geneval-variant" if drawn["settings"]["prompt_set"] == "geneval" else "geneval-variant-own",
        drawn["settings"]["model"],
        sum_up(verdicts, jobs),
        settings,
        command=describe_command("evaluation.geneval", build_parser(), arguments),
        facts=facts,
        commits_of_drawing=drawn["commits"],
        protocol=describe_protocol(settings, drawn["settings"]),
        start=start,
    )
    write_json(arguments.output, results)
    return results


def build_parser() -> argparse.ArgumentParser:
    usual = Thresholds()
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True, help="folder that evaluation.draw_prompts filled")
    parser.add_argument("--output", type=Path, required=True, help="results file to write, .json")
    parser.add_argument("--detector", default=DETECTOR, help="Hub id or folder of a detector of transformers")
    parser.add_argument("--detector_revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--color_model", default=COLOR_MODEL, help="Hub id or folder of a CLIP model")
    parser.add_argument("--color_model_revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--threshold", type=SHARE, default=usual.score, help="confidence that an object needs")
    parser.add_argument("--counting_threshold", type=SHARE, default=usual.counting_score, help="the same for counting")
    parser.add_argument("--max_objects", type=COUNT, default=usual.max_objects, help="of one class in a picture")
    parser.add_argument("--max_overlap", type=SHARE, default=usual.max_overlap, help="IoU of two boxes; 1 keeps all")
    parser.add_argument(
        "--position_threshold", type=finite_number(0, 100), default=usual.position, help="in parts of both sizes"
    )
    parser.add_argument("--shard", default="1/1", help="i/n: judge the i-th of n parts")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with one_line_ending():
        results = score(options)
        for name, item in (results or {"categories": {}})["categories"].items():
            print(f"{name:<14} {item['value']:.3f} ({item['low']:.2f}-{item['high']:.2f}), {item['n']} pictures")
        if results:
            print(f"{'overall':<14} {results['overall']:.3f}, the mean of the tasks, by a variant of GenEval")


if __name__ == "__main__":
    main()
