"""How well drawings fit their prompts (CLIP score), and how far they are from real pictures (CMMD, FID).

    python -m evaluation.picture_metrics --drawings drawings/geneval --reference photos --output results/pictures.json

Reads a folder that `evaluation.draw_prompts` filled, and any folder of pictures to compare it with. CLIP score and
CMMD need a CLIP checkpoint of transformers and nothing else. `--fid` adds the Frechet distance of InceptionV3's
vectors by torchmetrics, where that is installed; the distance in CLIP's space is never called FID. CLIP's vectors are
kept in a folder beside the results file, where a killed run goes on.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.drawing.clip import ClipVectors
from evaluation.drawing.folder import picture_path, read_entries, read_run
from evaluation.runs.files import describe_command, describe_machine, keep_settings
from evaluation.runs.results import make_results
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES, load_image
from pisces_commands.arguments import LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import hash_files
from pisces_commands.writing import write_json


CLIP = "openai/clip-vit-large-patch14"
# Source: CMMD, arXiv 2401.09603, section 4: a Gaussian kernel of this width on unit vectors, times 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
FID_PACKAGES = ("torchmetrics", "torch-fidelity")


def clip_scores(pictures: Tensor, texts: Tensor) -> list[float]:
    """100 x the cosine of each picture with its text, at least 0.

    Args:
        pictures, texts: (pictures, width), length 1, row by row.

    Source: CLIPScore, arXiv 2104.08718, with the factor 100 in place of 2.5, as torchmetrics and most tables have it.
    """
    return (100 * (pictures.double() * texts.double()).sum(dim=1)).clamp(min=0).tolist()


def mean_over_prompts(scores: Sequence[float], images_per_prompt: int) -> dict[str, Any]:
    """The mean and its 95 % interval; pictures of one prompt are alike, so the prompts are what is counted."""
    groups = [
        statistics.fmean(scores[start : start + images_per_prompt])
        for start in range(0, len(scores), images_per_prompt)
    ]
    value, low, high = statistics.fmean(groups), None, None
    if len(groups) > 1:
        half = 1.96 * statistics.stdev(groups) / math.sqrt(len(groups))
        low, high = round(value - half, 4), round(value + half, 4)
    return {"value": round(value, 4), "n": len(groups), "low": low, "high": high}


def cmmd(drawn: Tensor, real: Tensor) -> float:
    """The squared maximum mean discrepancy of two sets of unit vectors, times 1000; 0 for equal sets, lower is better.

    Args:
        drawn, real: (pictures, width), length 1; the two numbers of pictures may differ.

    Source: CMMD, arXiv 2401.09603; the estimator with the diagonals in it, as in the authors' code.
    """
    drawn, real = drawn.double(), real.double()
    within = _mean_kernel(drawn, drawn) + _mean_kernel(real, real)
    return CMMD_SCALE * (within - 2 * _mean_kernel(drawn, real))


def _mean_kernel(left: Tensor, right: Tensor, rows: int = 1024) -> float:
    """Mean of exp(-distance^2 / (2 sigma^2)) over all pairs of unit vectors, some rows at a time."""
    total = 0.0
    for part in left.split(rows):
        squared_distance = (2 - 2 * part @ right.T).clamp(min=0)
        total += float(torch.exp(-squared_distance / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(left) * len(right))


def load_fid() -> Any:
    """torchmetrics' FID with InceptionV3's 2048 numbers.

    Raises:
        ValueError: a package or the weights are missing; says which and how to get them.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        # resized as the TensorFlow of the first FID did it, like the published numbers
        return FrechetInceptionDistance(feature=2048, antialias=False)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"--fid: {error}. It needs torchmetrics and torch-fidelity (pip install torchmetrics torch-fidelity), a "
            "torchvision that fits the installed torch, and on its first use the network for InceptionV3's weights. "
            "Without --fid the distance to the reference is measured in CLIP's space."
        ) from error


def measure_fid(metric: Any, drawn: Sequence[Path], real: Sequence[Path]) -> float:
    """Feed both sets picture by picture, since sizes may differ; nothing of it is kept on disk."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metric = metric.to(device)
    for paths, is_real in ((drawn, False), (real, True)):
        for path in tqdm(paths, desc="FID, reference" if is_real else "FID, drawings", unit="picture"):
            pixels = torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1)  # (3, H, W), 0 to 255
            metric.update(pixels[None].to(device), real=is_real)
    return float(metric.compute())


def find_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and below, by name.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        known = ", ".join(PICTURE_SUFFIXES)
        raise ValueError(
            f"--reference {folder}: no pictures in it. Expected a folder with .png files or others of {known}."
        )
    return paths


def describe_settings(
    arguments: argparse.Namespace, drawn: dict[str, Any], clip: ClipVectors, reference: list[Path]
) -> dict[str, Any]:
    """Everything that decides the numbers."""
    settings = {"drawings": drawn["settings"], "clip": clip.name, "clip_max_tokens": clip.max_tokens}
    if reference:
        settings["reference"] = {
            "folder": arguments.reference.as_posix(),
            "pictures": len(reference),
            "sha256": hash_files(reference),
        }
    if arguments.fid:
        settings["fid"] = {name: version(name) for name in FID_PACKAGES}
    return settings


def describe_protocol(settings: dict[str, Any], too_long: int) -> str:
    """One paragraph for whoever reads the numbers."""
    drawn = settings["drawings"]
    lines = [
        f"Drawings of {drawn['num_prompts']} prompts ({drawn['prompt_set']}, drawn from {drawn['wording']} words), "
        f"{drawn['images_per_prompt']} pictures each of {drawn['width']} x {drawn['height']} pixels, "
        f"{drawn['num_inference_steps']} steps, guidance {drawn['guidance_scale']}, seeds from {drawn['seed']}.",
        f"CLIP score: 100 x cosine of picture and prompt as published, by {settings['clip']}; the mean over prompts.",
    ]
    if too_long:
        lines.append(f"Of {too_long} prompts only the first {settings['clip_max_tokens']} tokens count.")
    if "reference" in settings:
        lines.append(
            f"CMMD (arXiv 2401.09603) to {settings['reference']['pictures']} reference pictures, on vectors of the "
            "same CLIP with its own resizing; published values are of ViT-L/14 at 336 pixels without cropping."
        )
    if "fid" in settings:
        names = ", ".join(f"{name} {number}" for name, number in settings["fid"].items())
        lines.append(f"FID: InceptionV3, 2048 numbers, {names}; it is biased upwards where pictures are few.")
    return " ".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a folder of drawings, written to the results file.

    Raises:
        ValueError: drawings, reference, CLIP or a package is missing, or vectors of other settings are kept there.
    """
    start = time.monotonic()
    drawn, entries = read_run(arguments.drawings), read_entries(arguments.drawings)
    if arguments.fid and not arguments.reference:
        raise ValueError("--fid measures a distance and needs pictures to measure it to. Give --reference FOLDER.")
    reference = find_pictures(arguments.reference) if arguments.reference else []
    number = drawn["settings"]["images_per_prompt"]
    jobs = [(index, image) for index in range(len(entries)) for image in range(number)]
    paths = [picture_path(arguments.drawings, *job) for job in jobs]
    if arguments.fid and min(len(paths), len(reference)) < 2:
        raise ValueError(f"--fid: {len(paths)} drawings and {len(reference)} reference pictures, expected 2 of each.")
    fid = load_fid() if arguments.fid else None
    texts = [entry["prompt"] for entry in entries]

    clip = ClipVectors(arguments.clip, arguments.clip_revision)
    settings, facts = describe_settings(arguments, drawn, clip, reference), describe_machine()
    folder = arguments.output.with_name(arguments.output.stem + "_vectors")
    keep_settings(folder / "run.json", settings, facts)
    pictures = clip.embed_and_keep(paths, folder, "drawings")
    scores = clip_scores(pictures, clip.embed_texts(texts).repeat_interleave(number, dim=0))
    parts: dict[str, Any] = {"clip_score": mean_over_prompts(scores, number)}
    if reference:
        parts["cmmd"] = round(cmmd(pictures, clip.embed_and_keep(reference, folder, "reference")), 4)
    if fid is not None:
        parts["fid"] = round(measure_fid(fid, paths, reference), 4)
    results = make_results(
        "picture_metrics",
        drawn["settings"]["model"],
        parts,
        settings,
        command=describe_command("evaluation.picture_metrics", build_parser(), arguments),
        facts=facts,
        commits_of_drawing=drawn["commits"],
        protocol=describe_protocol(settings, clip.count_too_long(texts)),
        start=start,
    )
    write_json(arguments.output, results)
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True, help="folder that evaluation.draw_prompts filled")
    parser.add_argument("--reference", type=Path, help="folder of pictures to measure the distance to")
    parser.add_argument("--output", type=Path, required=True, help="results file to write, .json")
    parser.add_argument("--clip", default=CLIP, help="Hub id or folder of a CLIP model")
    parser.add_argument("--clip_revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--fid", action="store_true", help="also FID; needs torchmetrics and torch-fidelity")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with one_line_ending():
        results = measure(options)
        for name in ("clip_score", "cmmd", "fid"):
            if name in results:
                print(f"{name:<10} {results[name]['value'] if name == 'clip_score' else results[name]}")


if __name__ == "__main__":
    main()
