"""The commands of the study.

`python -m evaluation.study run` trains and scores all arms and goes on where it was stopped; `report` turns the scores
into results/study.json, plots and the tables of docs/study.md. `run` itself calls `reader`, `check` and `score`.
"""

import argparse
from pathlib import Path
from typing import Any

from evaluation.runs.files import describe_machine, keep_settings
from evaluation.study.arms import BUDGETS
from evaluation.study.report import check_page, report
from evaluation.study.steps import Plan, run_plan
from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint
from pisces_commands.arguments import COUNT, SEED, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import write_json


SEEDS = [0, 1, 2, 3]


def run(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected at least one command at a time.")
    check_checkpoint(find_checkpoint(options.model), with_decoder=True)  # the decoder is what readers are held against
    plan = Plan(options.work, options.model, BUDGETS[options.budget], options.seeds, options.bf16)
    settings = {"budget": options.budget, "model": options.model, "bf16": options.bf16}
    keep_settings(options.work / "settings.json", settings, describe_machine(), flag="--work")
    run_plan(plan, options.jobs)


def load_checkpoint(name: str) -> tuple[Any, Any]:
    """Model and processor, ready to be asked, on the GPU if there is one."""
    from modeling_pisces.checkpoint.loading import load_model

    folder, adapters = find_model(name)
    model, processor = load_model(folder)
    attach_adapters(adapters, model)
    return model, processor


def reader(options: argparse.Namespace) -> None:
    from evaluation.study.reader import make_reader

    model, processor = load_checkpoint(options.checkpoint)
    make_reader(model, processor, options.data, options.heldout, options.output, options.max_steps)


def check(options: argparse.Namespace) -> None:
    from evaluation.study.reader import VectorReader, check_reader
    from modeling_pisces import PiscesPipeline

    pipeline = PiscesPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    verdicts = check_reader(pipeline, VectorReader.load(options.reader)[0], options.data, options.num_drawings)
    write_json(options.output, verdicts)


def score(options: argparse.Namespace) -> None:
    from evaluation.study.score import score_checkpoint

    model, processor = load_checkpoint(options.checkpoint)
    settings = (options.reader, options.data, options.sides, options.num_questions)
    write_json(options.output, score_checkpoint(model, processor, *settings))


def write_report(options: argparse.Namespace) -> None:
    if options.check:
        check_page(options.results, options.page)
    else:
        report(options.work, options.seeds, options.results, options.page)


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="python -m evaluation.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("run", help="train and score every arm; repeat it to go on")
    one.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of all that the study makes")
    one.add_argument("--model", default="pisces-tiny", help="checkpoint whose towers are used")
    one.add_argument("--budget", choices=BUDGETS, default="reduced", help="how much of everything; full wants a GPU")
    one.add_argument("--seeds", type=SEED, nargs="+", default=SEEDS, help="more of them can be added later")
    one.add_argument("--jobs", type=COUNT, default=2, help="commands at a time, each on one thread")
    one.add_argument("--bf16", action="store_true", help="bf16 products; faster with avx512_bf16 or a GPU")
    one.set_defaults(main=run)

    one = commands.add_parser("report", help="results file, plots and page from the scores")
    one.add_argument("--work", type=Path, default=Path("runs/study"))
    one.add_argument("--seeds", type=SEED, nargs="+", default=SEEDS, help="those that were run")
    one.add_argument("--results", type=Path, default=Path("results/study.json"))
    one.add_argument("--page", type=Path, default=Path("docs/study.md"))
    one.add_argument("--check", action="store_true", help="compare only; fails where the page says something else")
    one.set_defaults(main=write_report)

    one = commands.add_parser("reader", help="train what reads the vectors of a checkpoint")
    one.add_argument("--checkpoint", required=True)
    one.add_argument("--data", type=Path, nargs="+", required=True, help="data folders to learn from")
    one.add_argument("--heldout", type=Path, required=True, help="data folder for the ceiling")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--max_steps", type=COUNT, default=1500)
    one.set_defaults(main=reader)

    one = commands.add_parser("check", help="hold a reader against a checkpoint's decoder")
    one.add_argument("--model", required=True, help="checkpoint with a decoder")
    one.add_argument("--reader", type=Path, required=True)
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--num_drawings", type=COUNT, default=200)
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(main=check)

    one = commands.add_parser("score", help="score one trained arm")
    one.add_argument("--checkpoint", required=True)
    one.add_argument("--reader", type=Path, required=True)
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--sides", default="ug")
    one.add_argument("--num_questions", type=COUNT, default=720)
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(main=score)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    with one_line_ending():  # a command that failed is a ChildProcessError, which is an OSError
        options.main(options)


if __name__ == "__main__":
    main()
