"""Every flag of every command with eight kinds of wrong value: `python -m tests.fuzz.flags [--cases N] [--seed S]`.

The flags are read off the commands' own parsers, so a new flag is tried without a line here. A command runs in this
process with arguments that are right but for one flag, up to its first heavy step, which stands in `COMMANDS` and is
replaced. A wrong value has to end in exit code 1 or 2 with one line on stderr, before that step, and leave no file. A
value that is no fault for its flag (a text for a text) only must not end in a traceback. `test_flags.py` runs a sample.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pisces_commands.console import build_parser
from tests.fuzz.recording import record


ROOT = str(Path(__file__).parents[2])


class Command(NamedTuple):
    """A command, right arguments for it ({d} is an empty folder, nothing named there exists), its first heavy step."""

    module: str
    arguments: str
    step: str
    main: str = "main"
    stand_in: str = ""  # what stands before the step and reads a folder that is not there


_LORA = "--model_name_or_path {d}/model --data {d}/data.jsonl --output_dir {d}/out"
_RUN = "--data {d}/data --output {d}/out"
_CONVERT = "--output {d}/out"
_BENCHMARK = "--output {d}/out.json"
_CURATE = "--index {d}/index"
_INDEX = {"stand_in": "Index"}


def _console_commands() -> Iterator[Command]:
    """Every sub-command of `pisces`: what it must have is a name in the empty folder, so it ends for want of it."""
    (choices,) = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in choices.items():
        words = [name]
        for action in parser._actions:
            if action.required:
                value = "me/mine" if action.dest == "repo" else f"{{d}}/{action.dest}"
                words += [*action.option_strings[-1:], value]
        if any(action.dest == "model" for action in parser._actions) and "--model" not in words:
            words += ["--model", "{d}/model"]
        if any(action.dest == "output" for action in parser._actions) and "--output" not in words:
            words += ["--output", "{d}/out"]
        yield Command("pisces_commands.console", " ".join(words), "")


COMMANDS = (
    Command("finetune.lora_understanding", _LORA, "load_checkpoint"),
    Command("finetune.lora_generation", _LORA, "load_checkpoint"),
    Command("finetune.lora_editing", _LORA, "load_checkpoint"),
    Command("finetune.lora_joint", _LORA, "load_checkpoint"),
    Command("finetune.lora_decoder", _LORA, "set_seed"),
    Command("finetune.dpo_understanding", _LORA, "load_checkpoint"),
    Command("finetune.dpo_generation", _LORA, "load_checkpoint"),
    Command("finetune.grpo", _LORA + " --rewards exact_match", "load_checkpoint"),
    Command(
        "finetune.best_of_n",
        "--checkpoint {d}/model --prompts {d}/p.txt --scorer tests.fuzz.flags:score --output {d}/out",
        "read_prompts",
    ),
    Command(
        "finetune.rejection_sampling",
        "--checkpoint {d}/model --prompts {d}/p.txt --scorer tests.fuzz.flags:score --output {d}/out --threshold 0.5 "
        "--sft_config {root}/finetune/configs/lora_generation.yaml",
        "keep_settings",
    ),
    Command("finetune.train_stages", _RUN + " --checkpoint {d}/model", "train_stage"),
    Command("finetune.parts.gen_encoder", _RUN, "load_data_of"),
    Command("finetune.parts.decoder", _RUN, "load_data_of"),
    Command("finetune.parts.vision", _RUN, "load_data_of"),
    Command(
        "finetune.from_scratch",
        "--config {root}/finetune/configs/from_scratch_small.yaml --data {d}/data --output {d}/out",
        "FromScratch",
    ),
    Command("finetune.parts.assemble", "prepare --data {d}/data --output {d}/out", "prepare"),
    Command("finetune.check_data", "--data {d}/data.jsonl", "open_source"),
    Command("finetune.precompute", "--checkpoint {d}/model --data {d}/data.jsonl --output {d}/out", "load_data"),
    Command("finetune.scenes.render", "--output {d}/out --num_scenes 2", "write_scenes"),
    Command("finetune.scenes.new_concept", "--output {d}/out", "write_concept"),
    Command(
        "finetune.parts.assemble",
        "assemble --data {d}/data --vision_tower {d}/a --gen_vision_tower {d}/b --output {d}/out",
        "assemble",
    ),
    Command("finetune.parts.assemble", "towers --checkpoint {d}/model --output {d}/out", "split_towers"),
    Command(
        "finetune.parts.assemble", "finish --checkpoint {d}/model --decoder {d}/decoder --output {d}/out", "finish"
    ),
    Command("benchmarks.lora_step", _BENCHMARK, "measure_understanding"),
    Command("benchmarks.gpu", _BENCHMARK + " --preset tiny --device cpu", "measure_all"),
    Command("benchmarks.roofline", _BENCHMARK, "tasks"),
    Command("benchmarks.peers", _BENCHMARK, "measure"),
    Command(
        "conversion.assemble",
        "--language_model {d}/a --vision_tower {d}/b --gen_vision_tower {d}/c " + _CONVERT,
        "assemble",
    ),
    Command("conversion.from_sdxl", "--sdxl {d}/a --gen_vector_size 32 " + _CONVERT, "from_sdxl"),
    Command("conversion.from_emu2_gen", "--emu2_gen {d}/a " + _CONVERT, "from_emu2_gen"),
    Command("conversion.from_llava", "--llava {d}/a " + _CONVERT, "from_llava"),
    Command("conversion.to_llava", "--checkpoint {d}/a " + _CONVERT, "to_llava"),
    Command("conversion.export", "--checkpoint {d}/a " + _CONVERT, "export"),
    Command("conversion.quantize", "--checkpoint {d}/a --method torchao_int8 " + _CONVERT, "quantize"),
    Command("conversion.merge_adapter", "--base {d}/a --adapter {d}/b " + _CONVERT, "merge_adapter"),
    Command("conversion.verify", "--checkpoint {d}/a", "verify"),
    Command("evaluation.report.pages", "card --results {d}/r.json --card {d}/page.md", "write_card"),
    Command("evaluation.report.pages", "compare {d}/a.json {d}/b.json --output {d}/out.md", "write_comparison"),
    Command("evaluation.report.pages", "curves {d}/a.json --output {d}/out.png", "write_curves"),
    Command("evaluation.geneval", "--drawings {d}/drawings --output {d}/out.json", "score"),
    Command("evaluation.picture_metrics", "--drawings {d}/drawings --output {d}/out.json", "measure"),
    Command("evaluation.understanding.benchmark", "--model {d}/a --tasks mme --output {d}/out.json", "evaluate"),
    Command("evaluation.draw_prompts", "--model {d}/a --prompts own:{d}/p.txt --output {d}/out", "draw"),
    Command("evaluation.scenes.benchmark", "--model {d}/a --data {d}/data --output {d}/out.json", "evaluate"),
    Command("evaluation.scenes.scorer", "--data {d}/data --validate", "validate"),
    Command("evaluation.study.__main__", "run --work {d}/work --model {d}/a", "run"),
    Command(
        "evaluation.study.__main__", "report --work {d}/work --results {d}/r.json --page {d}/p.md", "write_report"
    ),
    Command(
        "evaluation.study.__main__",
        "reader --checkpoint {d}/a --data {d}/b --output {d}/out --heldout {d}/data",
        "reader",
    ),
    Command("benchmarks.llava_round_trip", _BENCHMARK, "measure"),
    Command("benchmarks.assemble", _BENCHMARK, "write_parts"),
    Command("benchmarks.import_time", _BENCHMARK, "loaded_files"),
    Command("benchmarks.draw", "--model {d}/a " + _BENCHMARK, "drawer"),
    Command("benchmarks.new_concept", "--model {d}/a --work {d}/work " + _BENCHMARK, "measure"),
    Command("benchmarks.image_generation", _BENCHMARK, "make_models"),
    Command("demo.run_demo", "--model {d}/a --output {d}/out", "show"),
    Command("pisces_demo.app", "--model {d}/a", "serve"),
    Command("curation.scan", f"--data {ROOT}/examples/images --index {{d}}/index", "run_scan"),
    Command("curation.filter", _CURATE + " --config {root}/curation/configs/drawing.yaml", "run_filter", **_INDEX),
    Command("curation.dedup", _CURATE, "run_dedup", **_INDEX),
    Command("curation.contamination", _CURATE + " --prompts {d}/p.txt", "run_contamination", **_INDEX),
    Command("curation.caption", _CURATE + " --model {d}/model", "run_captions", **_INDEX),
    Command("curation.balance", _CURATE + " --by source --cap 3", "run_balance", **_INDEX),
    Command("curation.export", _CURATE + " --output {d}/out", "run_export", **_INDEX),
    Command("curation.report", _CURATE, "Report", **_INDEX),
    Command(
        "curation.run",
        "--config {root}/curation/configs/drawing.yaml --data {root}/examples/images --output {d}/out",
        "run_all",
    ),
    Command("finetune.scenes.edits", "--output {d}/out", "write_edits"),
    Command("examples.emoji.make_data", "--source {d}/packages --output {d}/out", "write_data"),
    Command("examples.emoji.contact_sheet", "--data {d}/data --output {d}/out.png", "make_sheet"),
    Command("examples.emoji.judge", "--data {d}/data --output {d}/out", "run"),
    Command("examples.emoji.evaluate", "--model {d}/a --data {d}/b --judge {d}/c --output {d}/out.json", "evaluate"),
    Command("benchmarks.curation", "--part faults " + _BENCHMARK, "measure_faults"),
    Command("benchmarks.real_parts", "--language_model {d}/a.gguf --work {d} " + _BENCHMARK, "make_rows"),
    *_console_commands(),
)

# The eight kinds; {d} as above
VALUES = {
    "empty": "",
    "text": "many",
    "nan": "nan",
    "inf": "inf",
    "negative": "-3",
    "huge": "1" + "0" * 22,
    "missing": "{d}/nowhere/at/all",
    "newline": "\u00e9\n\u2028x",
}
NUMBERS = ("text", "nan", "inf", "negative", "huge", "missing", "newline")  # wrong for every number ...
NEGATIVE_IS_RIGHT = {  # ... but for these, of which -3 means something
    "local_rank",  # set by launchers
    "vision_feature_layer",  # a layer counted from the end
    "threshold",  # of scores of any sign, in rejection_sampling
    "f_alpha_divergence_coef",
    "off_policy_mask_threshold",
    "reward_weights",
    "label_pad_token_id",
    "eos_token_id",
}


class Started(BaseException):
    """The heavy step was reached: the command found nothing wrong."""


class _Stop:
    """Stands in for a heavy function, or for a class with a constructor of its own."""

    def __call__(self, *args, **kwargs):
        raise Started

    from_pretrained = __call__


class _Caught(BaseException):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


class Outcome(NamedTuple):
    code: int | None  # None: the heavy step was reached
    lines: list[str]
    problem: str  # a traceback, or files left behind; empty for none


def score(pictures: list, prompt: Any) -> list[float]:
    """A scorer, as best_of_n takes them."""
    return [0.0] * len(pictures)


def words_of(command: Command, folder: str) -> list[str]:
    return [word.replace("{d}", folder).replace("{root}", ROOT) for word in command.arguments.split()]


def flags_of(command: Command) -> list[argparse.Action]:
    """The flags of a command's own parser, those of its sub-command where it has one."""
    module = importlib.import_module(command.module)

    def catch(parser: argparse.ArgumentParser, args=None, namespace=None):
        subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in subparsers:
            raise _Caught(action.choices[command.arguments.split()[0]])
        raise _Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            _call(module, command, words_of(command, "x"))
        except _Caught as caught:
            actions = caught.parser._actions
    return [a for a in actions if a.option_strings and a.nargs != 0 and a.dest not in ("help", "version")]


def _call(module: Any, command: Command, words: list[str]) -> Any:
    main = getattr(module, command.main)
    door = module
    if importlib.util.find_spec(f"{module.__package__}.__main__"):  # `python -m` of a folder ends as its door says
        door = importlib.import_module(f"{module.__package__}.__main__")
    wrapper = getattr(module, "run_command", None) or getattr(door, "run_command", None)
    with mock.patch.object(sys, "argv", [command.module, *words]):
        if command.module == "pisces_commands.console":
            return main(words)
        return wrapper(main) if wrapper else main()


def run(command: Command, words: list[str], folder: str) -> Outcome:
    """Run a command in this process until it ends or reaches its heavy step."""
    module = importlib.import_module(command.module)
    errors, problem, code = io.StringIO(), "", 0

    before, here = set(os.listdir(folder)), os.getcwd()
    os.chdir(folder)
    replaced: dict[str, Any] = {command.step: _Stop()} if command.step else {}
    if command.stand_in:
        replaced[command.stand_in] = mock.MagicMock()
    environment = dict(os.environ)
    with (
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        mock.patch.multiple(module, **replaced) if replaced else contextlib.nullcontext(),
    ):
        warnings.simplefilter("ignore")
        try:
            code = _call(module, command, words)
        except Started:
            code = None
        except SystemExit as stopped:
            code = stopped.code
            if isinstance(code, str):  # the interpreter prints it, and ends with 1
                errors.write(code + "\n")
                code = 1
            code = code or 0
        except BaseException:
            problem = traceback.format_exc(limit=-3)
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    if left := sorted(set(os.listdir(folder)) - before):
        problem = problem or f"left {', '.join(left)}"
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    return Outcome(code if isinstance(code, int) or code is None else 0, lines, problem)


def is_number(action: argparse.Action) -> bool:
    """Whether a flag's type reads numbers and nothing else."""
    if action.type is None or action.choices:
        return False
    try:
        return action.type("1") == 1 and not isinstance(action.type("1"), (bool, str))
    except Exception:
        return False


def is_wrong(action: argparse.Action, kind: str) -> bool:
    """Whether a value of a kind can only be a mistake for this flag."""
    if kind == "empty":
        return True
    if action.choices:
        return True
    if is_number(action):
        return kind in NUMBERS and not (kind == "negative" and action.dest in NEGATIVE_IS_RIGHT)
    return False


def judge(action: argparse.Action, kind: str, outcome: Outcome) -> str:
    """What is wrong with how a command took a value; empty if nothing is."""
    if outcome.problem:
        return outcome.problem
    if outcome.code is None or outcome.code == 0:
        return "accepted" if is_wrong(action, kind) else ""
    if outcome.code not in (1, 2):
        return f"exit code {outcome.code}"
    if len(outcome.lines) != 1:
        return f"{len(outcome.lines)} lines on stderr: {outcome.lines[:3]}"
    if is_wrong(action, kind) and outcome.code != 2:
        return f"exit code 1, not 2: {outcome.lines[0]}"
    return ""


def cases(only: str = "") -> Iterator[tuple[Command, argparse.Action, str]]:
    for command in (command for command in COMMANDS if only in command.module):
        for action in flags_of(command):
            for kind in VALUES:
                yield command, action, kind


def try_case(command: Command, action: argparse.Action, kind: str) -> str:
    """Run one case; what is wrong with its end, or empty."""
    with tempfile.TemporaryDirectory() as folder:
        flag, value = action.option_strings[-1], VALUES[kind].replace("{d}", folder)
        words = words_of(command, folder)
        if flag in words:  # its right value is replaced
            place = words.index(flag)
            words[place : place + 2] = []
        words += [flag, value]
        return judge(action, kind, run(command, words, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="a sample of so many; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--output", metavar="FILE", help="results file, to which the counts are added")
    options = parser.parse_args()
    start = time.perf_counter()
    chosen = list(cases(options.only))
    if options.cases:
        chosen = random.Random(options.seed).sample(chosen, options.cases)
    bad = 0
    for command, action, kind in chosen:
        if problem := try_case(command, action, kind):
            bad += 1
            shown = problem if "--verbose" in os.environ.get("FUZZ", "") else " ".join(problem.split())[-300:]
            print(f"{command.module} {command.arguments.split()[0]} {action.option_strings[-1]} {kind}: {shown}")
    flags = len({(command, action.dest) for command, action, _ in chosen})
    seconds = round(time.perf_counter() - start)
    numbers = {"flags": flags, "kinds_of_wrong_values": len(VALUES), "cases": len(chosen), "failures": bad}
    record(options.output, "flags", {"commands": len({c for c, _, _ in chosen}), **numbers, "seconds": seconds})
    print(f"{flags} flags, {len(chosen)} cases, {bad} failures, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
