"""Scores a checkpoint on the paper's understanding benchmarks through lmms-eval, and writes what is whole.

    python -m evaluation.understanding --model pisces-tiny --tasks pope,mme,mmmu_val --output results/qa.json

lmms-eval brings questions and scores, in an environment of its own (`make lmms-eval`); our plug-in for it,
evaluation/lmms_eval_plugin, brings the checkpoint. Answers are kept in a folder beside the results file, where a
killed run goes on. The tasks are in `evaluation.understanding.tasks`, the subprocess in
`evaluation.understanding.harness`, and what is believed of its files in `evaluation.understanding.results`.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.runs.files import (
    describe_command,
    describe_machine,
    identify_adapters,
    identify_weights,
    keep_settings,
)
from evaluation.runs.results import make_results
from evaluation.understanding.harness import ROOT, Run, ask_and_score, check_data, probe
from evaluation.understanding.results import collect_items, read_metrics, read_run, sum_up
from evaluation.understanding.tasks import SUITE, Task
from modeling_pisces.checkpoint.adapters import find_model
from modeling_pisces.checkpoint.files import check_checkpoint
from pisces_commands.arguments import COUNT, LineParser, add_adapter_flag
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import write_json


HARNESS_VARIABLE = "PISCES_LMMS_EVAL_PYTHON"
JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
PROTOCOL = (
    "lmms-eval {version}, its prompts, generation settings and metrics; pictures as PiscesProcessor prepares them; "
    "dtype {dtype}, batches of {batch_size}."
)


def choose_tasks(names: str) -> list[Task]:
    """The tasks of "pope,mme", or of "all" those without a judge, once each.

    Raises:
        ValueError: a task that is not in the suite; names all that are.
    """
    known = {task.name: task for task in SUITE}
    if names == "all":
        return [task for task in SUITE if not task.needs_judge]
    chosen = list(dict.fromkeys(name for name in names.split(",") if name))
    for name in chosen or [names]:
        if name not in known:
            raise ValueError(
                f"--tasks {name!r}: not in the suite, so nothing says how many items it has. Choose of all, "
                f"{', '.join(known)}; other tasks run by lmms-eval itself with --model pisces."
            )
    return [known[name] for name in chosen]


def name_judge(tasks: list[Task], environment: Mapping[str, str]) -> str | None:
    """The model that judges, or None where no task needs one.

    Raises:
        ValueError: a task needs a judge and there is no key for it.
    """
    needy = [task.name for task in tasks if task.needs_judge]
    if not needy:
        return None
    key = JUDGE_KEYS.get(environment.get("API_TYPE", "openai"), "OPENAI_API_KEY")
    if not environment.get(key):
        raise ValueError(
            f"{', '.join(needy)}: a language model judges the answers, and {key} is not set. Set it, with "
            "OPENAI_API_URL and MODEL_VERSION for a judge of your own, or leave these tasks out."
        )
    return environment.get("MODEL_VERSION", "the harness's default")


def describe_protocol(run: Run, version: str) -> str:
    """One or two sentences for whoever reads the numbers."""
    part = f" Only the first {run.limit} items of each task." if run.limit else ""
    return PROTOCOL.format(version=version, dtype=run.dtype, batch_size=run.batch_size) + part


def prepare(arguments: argparse.Namespace, tasks: list[Task]) -> tuple[Run, dict[str, Any]]:
    """Check everything that can be checked before anything is loaded; what to run, and what decides its answers.

    Raises:
        ValueError: a flag, the checkpoint, a data set or the harness is not as it should be.
    """
    checkpoint, adapters = find_model(arguments.model, arguments.adapter, arguments.revision)
    check_checkpoint(checkpoint)
    if arguments.data:
        check_data(arguments.data, tasks)
    run = Run(
        python=arguments.harness_python.absolute(),  # the harness runs in another folder; a resolved link is no venv
        checkpoint=checkpoint,
        adapters=tuple(adapter.folder for adapter in adapters),
        work=arguments.output.with_name(arguments.output.stem + "_answers"),
        **{name: getattr(arguments, name) for name in ("data", "device", "dtype", "batch_size", "limit")},
    )
    is_local = Path(arguments.model).expanduser().is_dir()
    settings = {
        "model": arguments.model,
        "weights": identify_weights(str(checkpoint) if is_local else arguments.model, checkpoint.name),
        "adapters": identify_adapters(adapters),
        **{name: getattr(arguments, name) for name in ("device", "dtype", "batch_size")},
        "harness": probe(run.python),
    }
    return run, settings


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the harness and write the results file.

    Raises:
        ValueError: as `choose_tasks`, `name_judge` and `prepare`; answers of other settings are in the way; or what
            the harness left is not whole.
    """
    start = time.monotonic()
    tasks = choose_tasks(arguments.tasks)
    judge = name_judge(tasks, os.environ)
    run, settings = prepare(arguments, tasks)
    facts = describe_machine()
    keep_settings(run.work / "run.json", settings, facts)
    ask_and_score(run, tasks, arguments.num_processes)
    found, samples = read_run(run.work)
    numbers = {
        task.name: sum_up(task, collect_items(task, found, samples, run.limit), read_metrics(task, found))
        for task in tasks
    }
    results = make_results(
        "understanding",
        arguments.model,
        {"tasks": numbers},
        {**settings, "limit": run.limit, "judge": judge},
        command=_describe_command(arguments),
        facts=facts,
        commits_of_answers=json.loads((run.work / "run.json").read_text(encoding="utf-8"))["commits"],
        protocol=describe_protocol(run, settings["harness"]["lmms-eval"]),
        start=start,
    )
    write_json(arguments.output, results)
    return results


def _describe_command(arguments: argparse.Namespace) -> str:
    """Without what has no part in the result: the number of processes, and where the harness's Python is."""
    kept = {name: value for name, value in vars(arguments).items() if name not in ("num_processes", "harness_python")}
    return describe_command("evaluation.understanding", build_parser(), argparse.Namespace(**kept))


def build_parser() -> argparse.ArgumentParser:
    python = os.environ.get(HARNESS_VARIABLE, ROOT / ".venv-lmms-eval/bin/python")
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    add_adapter_flag(parser)
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--tasks", required=True, help="names of lmms-eval with commas, or all: those without a judge")
    parser.add_argument("--output", type=Path, required=True, help="results file to write, .json")
    parser.add_argument("--data", type=Path, help="folder of local data sets, each under its Hub name; then offline")
    parser.add_argument("--limit", type=COUNT, help="only the first N items of each task; labelled in the results")
    parser.add_argument(
        "--batch_size", type=COUNT, default=1, help="questions at a time; may move an answer's last bit"
    )
    parser.add_argument("--num_processes", type=COUNT, default=1, help="that ask at once, each with its own GPU")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--harness_python", type=Path, default=Path(python), help="the Python that has lmms-eval")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with one_line_ending():
        results = evaluate(options)
        for name, item in results["tasks"].items():
            interval = f" ({item['low']:.4g}-{item['high']:.4g})" if "low" in item else ""
            part = "" if item["is_whole"] else ", not the whole task"
            score = f"{item['value']:.4g}{interval}, {item['scale']}, {item['n']} items{part}"
            print(f"{name:<24} {item['metric']:<22} {score}")
