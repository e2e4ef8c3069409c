"""What pisces-tiny learns from 200 pictures of something new, what it costs, and what it forgets.

    python -m benchmarks.new_concept --model pisces-tiny --work runs/new_concept --output results/new_concept.json

A colour (or shape) that the checkpoint never saw is taught by LoRA, once for drawing and once for understanding, each
in at most ten processor minutes. Every step is a command of a room, joined by folders: `finetune.scenes.new_concept`
writes the data, `finetune.lora_generation` and `finetune.lora_understanding` train, `conversion.merge_adapter` merges,
`evaluation.scenes` scores base and results on held-out scenes with and without the new thing. Steps whose result lies
in `--work` are not repeated.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pisces_commands.arguments import COUNT, LineParser, whole_number
from pisces_commands.ending import run_command
from pisces_commands.measurement import difference_interval, wilson_interval, write_result
from pisces_commands.writing import write_json


ROOT = Path(__file__).parents[1]
BAR = "new concept >= 0.80 on its own side; old concepts and the other side lose <= 0.03; <= 10 processor minutes"
RECIPES = {"drawing": "lora_generation", "understanding": "lora_understanding"}
OTHER = {"drawing": "understanding", "understanding": "drawing"}
# Half of the rows show the new thing; --drawing_flags and --understanding_flags override.
FLAGS = {
    "drawing": (
        "--flavour full --lora_r 32 --lora_alpha 32 --learning_rate 1e-3 --max_steps 600 --warmup_steps 20 "
        "--lr_scheduler_type cosine --per_device_train_batch_size 24 --gen_input_noise 0.1"
    ),
    "understanding": (
        "--flavour portable --lora_r 32 --lora_alpha 32 --learning_rate 1e-3 --max_steps 400 --warmup_steps 20 "
        "--lr_scheduler_type cosine --per_device_train_batch_size 16"
    ),
}
QUIET = "--max_grad_norm 1.0 --use_cpu True --save_strategy no --logging_steps 20 --disable_tqdm True --guard_rows 24"


class Share(NamedTuple):
    """How many of how many were right."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total

    def summary(self) -> dict[str, float]:
        low, high = wilson_interval(self.right, self.total)
        return {"value": round(self.value, 4), "n": self.total, "low": round(low, 4), "high": round(high, 4)}


def run(module: str, *flags: str) -> float:
    """Run one command of the repository on one thread; returns the processor seconds it took.

    Raises:
        SystemExit: the command failed; its own error is on stderr.
    """
    print(f"== python -m {module} {shlex.join(flags)}", flush=True)
    before = os.times()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, env=environment).returncode:
        sys.exit(f"error: python -m {module} failed; the same command goes on from here.")
    after = os.times()  # Windows counts no children: 0 there
    return after.children_user + after.children_system - before.children_user - before.children_system


def train(model: str, data: Path, side: str, extra: str, folder: Path) -> dict[str, Any]:
    """Teach one side, watched by the guard; returns settings and processor seconds, kept beside the adapter."""
    record = folder / "cost.json"
    if not record.is_file():
        rows = [f"{{path: {data / 'train' / f'{part}_{side}.jsonl'}, weight: 1}}" for part in ("concept", "replay")]
        others = str(data / "others")
        flags = ["--model_name_or_path", model, "--judge_rows", "0", "--output_dir", str(folder), "--data", *rows]
        flags += ["--guard_understanding", others, "--guard_drawing", others]
        settings = f"{FLAGS[side]} {QUIET} {extra}".strip()
        seconds = run(f"finetune.{RECIPES[side]}", *flags, *shlex.split(settings))
        cost = {"recipe": RECIPES[side], "settings": settings, "processor_seconds": round(seconds, 1)}
        write_json(record, cost, indent=None)
    return json.loads(record.read_text(encoding="utf-8"))


def score(model: Path | str, data: Path, output: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """The scenes benchmark of one checkpoint on one held-out folder."""
    if not output.is_file():
        flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        run("evaluation.scenes", "--model", str(model), "--data", str(data), "--output", str(output), *flags)
    return json.loads(output.read_text(encoding="utf-8"))


def share_of(results: dict[str, Any], side: str) -> Share:
    """Exact answers to questions, or drawings with everything right, over both wordings."""
    if side == "understanding":
        parts = [results[f"understanding_{wording}"]["overall"] for wording in ("question", "paraphrase")]
    else:
        wordings = [results[f"drawing_{wording}"]["categories"] for wording in ("prompt", "paraphrase")]
        parts = [part for categories in wordings for part in categories.values()]
    return Share(sum(round(part["value"] * part["n"]) for part in parts), sum(part["n"] for part in parts))


def change(before: Share, after: Share) -> dict[str, float]:
    """The difference of two shares with Newcombe's interval; too wide here, where the same items were asked twice."""
    value, low, high = difference_interval(*((share.value, *wilson_interval(*share)) for share in (before, after)))
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def compare(side: str, base: dict[str, dict], tuned: dict[str, dict], cost: dict[str, Any]) -> dict[str, Any]:
    """All numbers of one side, and which parts of the bar they meet.

    Args:
        base, tuned: results of `evaluation.scenes` by folder, "concept" and "others".
    """
    shares = {
        name: {when: share_of(results[folder], of) for when, results in (("before", base), ("after", tuned))}
        for name, folder, of in (
            ("new_concept", "concept", side),
            ("old_concepts", "others", side),
            ("other_side", "others", OTHER[side]),
        )
    }
    numbers: dict[str, Any] = {
        name: {when: share.summary() for when, share in pair.items()}
        | {"change": change(pair["before"], pair["after"])}
        for name, pair in shares.items()
    }
    key = "drawing_prompt" if side == "drawing" else "understanding_question"
    detail = "categories" if side == "drawing" else "types"
    numbers["new_concept"][detail] = {name: part["value"] for name, part in tuned["concept"][key][detail].items()}
    met = {
        "new_concept >= 0.80": shares["new_concept"]["after"].value >= 0.80,
        "old_concepts lose <= 0.03": numbers["old_concepts"]["change"]["value"] >= -0.03,
        "other_side loses <= 0.03": numbers["other_side"]["change"]["value"] >= -0.03,
        "<= 10 processor minutes": cost["processor_seconds"] <= 600,
    }
    return {"met": all(met.values()), "parts_met": met, **numbers, "training": cost}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every step in order; see the module."""
    work = Path(options.work).resolve()
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    data = work / "data"
    if not (data / "concept.json").is_file():
        pictures = ["--num_pictures", str(options.num_pictures), "--num_replay", str(options.num_replay)]
        run("finetune.scenes.new_concept", "--concept", options.concept, "--output", str(data), *pictures)
    names = ("num_questions", "num_reconstructions", "num_prompts", "images_per_prompt")
    sizes = {name: getattr(options, name) for name in names}
    base = {name: score(model, data / name, work / f"base_{name}.json", sizes) for name in ("concept", "others")}
    measured: dict[str, Any] = {
        "model": options.model,
        "concept": json.loads((data / "concept.json").read_text(encoding="utf-8")),
        "ceiling": {
            "what": "pictures with the new thing, encoded and decoded by the base: no drawing can be better",
            "reconstruction": base["concept"]["reconstruction"],
        },
    }
    for side in options.sides:
        adapter, merged = work / side, work / f"{side}_merged"
        cost = train(model, data, side, getattr(options, f"{side}_flags"), adapter)
        if not merged.is_dir():
            run("conversion.merge_adapter", "--base", model, "--adapter", str(adapter), "--output", str(merged))
        tuned = {
            name: score(merged, data / name, work / f"{side}_{name}.json", sizes) for name in ("concept", "others")
        }
        measured[side] = compare(side, base, tuned, cost)
    measured["protocol"] = (
        "Held-out scenes in the world with the new word. Understanding: exact greedy answers; of the new thing, every "
        "question or answer names it. Drawing: everything right, over all drawings; of the new thing, every prompt "
        "names it. Both wordings of each. Replay pictures show no new thing and are not among num_pictures."
    )
    measured["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "diffusers")}
    return measured


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument(
        "--work", required=True, help="folder for data, adapters and scores; steps there are not repeated"
    )
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--concept", default="lime", help="of finetune.scenes.new_concept")
    parser.add_argument("--sides", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--num_pictures", type=COUNT, default=200, help="pictures of the new thing to learn from")
    parser.add_argument("--num_replay", type=whole_number(0), default=1500, help="ordinary pictures beside them")
    parser.add_argument("--num_questions", type=COUNT, default=600, help="of each evaluation, in two wordings")
    parser.add_argument("--num_reconstructions", type=COUNT, default=120)
    parser.add_argument("--num_prompts", type=COUNT, default=192, help="of each evaluation, in two wordings")
    parser.add_argument("--images_per_prompt", type=COUNT, default=2)
    for side in RECIPES:
        parser.add_argument(
            f"--{side}_flags", default="", help=f"more flags for finetune.{RECIPES[side]}, in one string"
        )
    options = parser.parse_args()
    write_result(options.output, "new_concept", BAR, measure(options))


if __name__ == "__main__":
    run_command(main)
