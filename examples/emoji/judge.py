"""Trains the judge: a classifier of real emoji, changed at random, that tells what a drawing shows.

    python -m examples.emoji.judge --data data/emoji data/twemoji --output data/judge

It learns every picture of every split, since it has to know what a held-out composition looks like, and never sees a
drawing of a model. Its accuracy on changes that it was not trained with is measured at the end and printed; it stands
in `judge.json` and in every results file. A run that was stopped goes on from its last epoch.
"""

import argparse
import hashlib
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from examples.emoji.compositions import COLORS, NO_TONE
from examples.emoji.contact_sheet import read_truth
from examples.emoji.judge_network import NOT_ASKED, Judge, Labels, augment, read_pictures
from examples.emoji.source import TONES
from pisces_commands.arguments import COUNT, SEED, LineParser, finite_number
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.writing import whole_folder, write_whole


WEIGHTS = {"name": 1.0, "tone": 0.5, "color": 0.25, "style": 0.25}
MEASURED_CHANGES = 2  # of each picture, for the accuracy


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m examples.emoji.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data folders, one of each vendor")
    parser.add_argument("--output", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--epochs", type=COUNT, default=30, help="times that each picture is seen")
    parser.add_argument("--batch_size", type=COUNT, default=64, help="pictures per step")
    parser.add_argument(
        "--learning_rate", type=finite_number(above=0, most=100), default=3e-3, help="peak, then down to 0"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of weights, order and changes")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="bf16 products; twice as fast with avx512_bf16 or a GPU, far slower without",
    )
    return parser


def collect_labels(rows: Sequence[dict[str, Any]]) -> Labels:
    """What the heads can say: all names of the data, and the attributes that occur."""
    concepts = {row["name"]: row["concept"] for row in rows}
    attributes = {(row["attribute_kind"], row["attribute"]) for row in rows}
    return Labels(
        names=tuple(sorted(concepts)),
        concepts=tuple(concepts[name] for name in sorted(concepts)),
        times=tuple(sorted(attribute for kind, attribute in attributes if kind == "time")),
        tones=tuple(tone for tone in (NO_TONE, *TONES.values()) if ("tone", tone) in attributes),
        colors=tuple(color for color in COLORS if ("color", color) in attributes),
        styles=tuple(sorted({row["vendor"] for row in rows})),
    )


def loss_of(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each head over the pictures that it is asked about; names are smoothed, as there are many."""
    total = torch.zeros(())
    for head, weight in WEIGHTS.items():
        if bool((targets[head] != NOT_ASKED).any()):
            smoothing = 0.1 if head == "name" else 0.0
            total = total + weight * F.cross_entropy(logits[head], targets[head], label_smoothing=smoothing)
    return total


def train(judge: Judge, pictures: Tensor, targets: dict[str, Tensor], options: argparse.Namespace, work: Path) -> None:
    """All epochs, from the last one that `work` holds; order and changes of an epoch follow from the seed alone."""
    steps = options.epochs * -(-len(pictures) // options.batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=options.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps, pct_start=0.15)
    parts = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    first = _load_state(parts, work / "state.pt")
    with tqdm(total=steps, initial=first * (steps // options.epochs), desc="judge", unit="step") as bar:
        for epoch in range(first, options.epochs):
            judge.train()
            generator = torch.Generator().manual_seed(options.seed * 100_000 + epoch)
            torch.manual_seed(options.seed * 100_000 + epoch)  # dropout
            for batch in torch.randperm(len(pictures), generator=generator).split(options.batch_size):
                changed = augment(pictures[batch], generator).to(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                    logits = {head: found.float() for head, found in judge(changed).items()}
                loss = loss_of(logits, {head: target[batch] for head, target in targets.items()})
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            state = {"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}
            write_whole(work / "state.pt", partial(torch.save, state), sync=False)


def _load_state(parts: dict[str, Any], path: Path) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


@torch.no_grad()
def measure(judge: Judge, pictures: Tensor, targets: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Accuracy of each head, and of the five best names, on changes from another seed than any of training."""
    judge.eval()
    right: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(2**40 + seed)
    for _ in range(MEASURED_CHANGES):
        for batch in torch.arange(len(pictures)).split(256):
            logits = judge(augment(pictures[batch], generator))
            for head, found in logits.items():
                asked = targets[head][batch] != NOT_ASKED
                wanted = targets[head][batch][asked]
                right.setdefault(head, []).append(found[asked].argmax(1) == wanted if len(wanted) else wanted.bool())
            best = logits["name"].topk(min(5, logits["name"].shape[1])).indices
            right.setdefault("name_top5", []).append((best == targets["name"][batch][:, None]).any(1))
    return {
        head: round(float(torch.cat(parts).float().mean()), 4)
        for head, parts in right.items()
        if len(torch.cat(parts))
    }


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train, measure and write; returns the accuracies.

    Raises:
        ValueError: a folder is no data of `make_data`, or the output is taken by another judge.
    """
    if (options.output / "judge.json").exists():
        raise ValueError(f"{options.output}: there is a judge already. Choose another --output, or remove it.")
    start = time.monotonic()
    found = [(folder, read_truth(folder)) for folder in options.data]
    rows = [row for _, part in found for row in part]
    if not rows:
        raise ValueError(f"--data {options.data[0]}: no pictures in it. Write it again with examples.emoji.make_data.")
    work = options.output.with_name(options.output.name + "_unfinished")
    _keep_settings(work, options, found)
    torch.manual_seed(options.seed)
    judge = Judge(collect_labels(rows)).to(memory_format=torch.channels_last)
    pictures = torch.cat([read_pictures(folder, part) for folder, part in found])
    asked = [judge.labels.targets(row) for row in rows]
    targets = {head: torch.tensor([row[head] for row in asked]) for head in WEIGHTS}
    train(judge, pictures, targets, options, work)
    accuracy = measure(judge, pictures, targets, options.seed)
    facts = {
        "accuracy": accuracy,
        "pictures": len(rows),
        "epochs": options.epochs,
        "seed": options.seed,
        "command": current_command(),
        "commit": current_commit(),
        "hardware": describe_hardware(),
        "seconds": round(time.monotonic() - start, 1),
    }
    with whole_folder(options.output) as folder:
        judge.write_into(folder, facts)
    shutil.rmtree(work)
    return accuracy


def _keep_settings(work: Path, options: argparse.Namespace, found: Sequence[tuple[Path, list]]) -> None:
    """Refuse to go on from a state of other settings or data."""
    digest = hashlib.sha256(repr([part for _, part in found]).encode()).hexdigest()[:16]
    names = ("epochs", "batch_size", "learning_rate", "seed", "bf16")
    settings = " ".join([*(f"{name}={getattr(options, name)}" for name in names), f"data={digest}"])
    path = work / "settings.txt"
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{work} was begun with {before}, not {settings}. Remove it, or choose another --output.")
    write_whole(path, settings)


def main(arguments: list[str] | None = None) -> None:
    """The command: train, and say how good the judge is."""
    options = build_parser().parse_args(arguments)
    with one_line_ending(interrupted="interrupted; the same command goes on from the last epoch"):
        accuracy = run(options)
        print(f"{options.output}: " + ", ".join(f"{head} {share:.3f}" for head, share in accuracy.items()))


if __name__ == "__main__":
    main()
