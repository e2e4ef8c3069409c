"""Rejection sampling: draw, score, keep what passes, train on it, and again with the better model.

    python -m finetune.rejection_sampling --config finetune/configs/rejection_sampling.yaml --prompts prompts.txt \
        --scorer my_scorer:score --threshold 0.9 --output runs/rejection

Each round draws every prompt n times (`finetune.best_of_n`) with the adapter of the round before, keeps the best
picture of a prompt if its score reaches the threshold, and trains a new adapter on the base (`lora_generation`) from
all that was kept so far. Starting from the base each time keeps errors from adding up (STaR, Zelikman et al., arXiv
2203.14465); best-of-n as the filter is RAFT (Dong et al., arXiv 2304.06767). An interrupted command goes on where it
stopped: inside a round's drawings, or at the last checkpoint of its training.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from finetune import best_of_n, lora_generation
from finetune.best_of_n import BestOfNArguments
from finetune.flags.parsing import parse_classes, run_command
from finetune.preferences.candidates import keep_settings
from pisces_commands.ending import CommandFailed
from pisces_commands.writing import write_whole


FREE = (*best_of_n.FREE, "rounds")  # what may change when a command goes on: more rounds may follow


@dataclass(kw_only=True)
class RejectionArguments(BestOfNArguments):
    """Flags of this command: those of `best_of_n`, and what happens with the drawings."""

    threshold: float = field(metadata={"help": "the score that a picture must reach to be trained on"})
    rounds: int = field(default=2, metadata={"help": "rounds of drawing and training"})
    sft_config: str = field(
        default="finetune/configs/rejection_sampling_sft.yaml", metadata={"help": "YAML of the lora_generation runs"}
    )
    output: str = field(metadata={"help": "folder; ROUND/drawings and ROUND/adapter go into it"})

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: expected at least 1.")
        super().__post_init__()
        if self.adapter is not None or self.pairs:
            raise ValueError("--adapter and --pairs are for finetune.best_of_n; the first round draws with the base.")
        if not Path(self.sft_config).is_file():
            raise ValueError(f"--sft_config {self.sft_config}: no such file. Give the YAML of a lora_generation run.")


def main(arguments: Sequence[str] | None = None) -> Path:
    (options,) = parse_classes([RejectionArguments], arguments)
    output = Path(options.output)
    keep_settings(output, "rejection_sampling", {k: v for k, v in asdict(options).items() if k not in FREE})
    history, kept, adapter = [], [], None
    for number in range(1, options.rounds + 1):
        folder = output / f"round_{number}"

        # draw and score
        drawings = best_of_n.main(drawing_flags(options, number, adapter))

        # keep
        scored = read_lines(drawings / "metadata.jsonl")
        passed = [row for row in scored if row["score"] >= options.threshold]
        history.append(summarize(number, scored, len(passed)))
        print(" ".join(f"{name} {value:.4g}" for name, value in history[-1].items()))
        if not passed:
            raise CommandFailed(nothing_passed(number, scored, options.threshold))
        kept += [kept_row(row, number) for row in passed]
        data = output / f"kept_{number}.jsonl"
        write_whole(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

        # train: a new adapter on the base, from everything kept so far
        adapter = folder / "adapter"
        if not (adapter / "run.yaml").is_file():  # written last
            flags = ("--model_name_or_path", options.checkpoint, "--data", str(data), "--output_dir", str(adapter))
            lora_generation.main(["--config", options.sft_config, *flags])
        write_whole(output / "rounds.yaml", yaml.safe_dump(history, sort_keys=False))
    print(f"{adapter}: the adapter of the last round")
    return output


def drawing_flags(options: RejectionArguments, number: int, adapter: Path | None) -> list[str]:
    """The flags of one round's `best_of_n`; every round has seeds of its own."""
    flags = {
        "checkpoint": options.checkpoint,
        "prompts": options.prompts,
        "scorer": options.scorer,
        "output": Path(options.output) / f"round_{number}" / "drawings",
        "n": options.n,
        "adapter": adapter,
        "batch_size": options.batch_size,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed + number - 1,
        "device": options.device,
    }
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def summarize(number: int, rows: list[dict], num_kept: int) -> dict[str, float]:
    """A round in numbers: the mean score of all pictures is what the training of the rounds before has changed."""
    scores = [score for row in rows for score in row["scores"]]
    return {
        "round": number,
        "prompts": len(rows),
        "kept": num_kept,
        "mean_score": sum(scores) / len(scores),
        "mean_best_score": sum(row["score"] for row in rows) / len(rows),
    }


def nothing_passed(number: int, rows: list[dict], threshold: float) -> str:
    best = max(row["score"] for row in rows)
    return (
        f"round {number}: none of the best pictures of {len(rows)} prompts reached --threshold {threshold} (the best "
        f"score is {best:.4g}), so there is nothing to train on. Lower it, raise --n, or choose easier prompts."
    )


def kept_row(row: dict, number: int) -> dict[str, str]:
    """A row of training data whose picture is named from the output folder."""
    picture = f"round_{number}/drawings/{row['file_name']}"
    return {"id": f"{number}-{row['id']}", "image": picture, "prompt": row["prompt"]}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    run_command(main)
