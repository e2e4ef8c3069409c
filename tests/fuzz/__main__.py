"""Random cases by the thousand: each ends right, refused in one clear line, or as a failure with the seed that repeats it.

python -m tests.fuzz --seeds 0:1000 --surface processor,images --output results/robustness.json

Cases run in child processes of limited time and memory. The results file keeps one entry per surface; a surface that is
run again takes the place of its own entry. `--seeds 17:18 --here` repeats one seed in this process, for a debugger.
"""

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pisces_commands.measurement import current_commit, describe_hardware
from pisces_commands.writing import write_json
from tests.fuzz import limits
from tests.fuzz.outcomes import FINE, Outcome, run


SURFACES = {
    "images": "tests.fuzz.images",
    "processor": "tests.fuzz.processor",
    "forward": "tests.fuzz.forward",
    "generate": "tests.fuzz.generation",
    "pipeline": "tests.fuzz.pipeline",
}
NOTED = 40  # failures that an entry of the results names


def parse_seeds(text: str) -> range:
    first, _, last = text.partition(":")
    if not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise argparse.ArgumentTypeError(f"{text}: expected FIRST:LAST, such as 0:1000; LAST is not run any more")
    return range(int(first), int(last))


def parse_surfaces(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SURFACES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: expected some of {', '.join(SURFACES)}, by commas")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", type=parse_surfaces, default=list(SURFACES), help=f"of {', '.join(SURFACES)}")
    parser.add_argument("--seeds", type=parse_seeds, default=range(1000), help="FIRST:LAST (default: 0:1000)")
    parser.add_argument("--output", help="JSON file to note the outcomes in")
    parser.add_argument("--kinds", action="store_true", help="print the outcomes by kind of case too")
    parser.add_argument("--here", action="store_true", help="run in this process, without limits")
    parser.add_argument("--child", choices=SURFACES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments.child, arguments.seeds)
    num_failures = 0
    for name in arguments.surface:
        if arguments.here:
            outcomes: Iterable[Outcome] = run(importlib.import_module(SURFACES[name]).cases, arguments.seeds)
        else:
            outcomes = (Outcome(*fields) for fields in limits.run_in_children(name, arguments.seeds))
        entry = summarize(name, arguments.seeds, outcomes)
        _print(entry, arguments.kinds)
        if arguments.output:
            note(Path(arguments.output), entry)
        num_failures += entry["failures"]
    return int(num_failures > 0)


def summarize(surface: str, seeds: range, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """One entry of the results."""
    kinds: dict[str, Counter] = {}
    noted, core_s, num_failures, commit = [], 0.0, 0, current_commit()
    for outcome in outcomes:
        kinds.setdefault(outcome.name, Counter())[outcome.result] += 1
        core_s += outcome.core_s
        if outcome.result not in FINE:
            num_failures += outcome.result != "unclear"
            noted.append(f"seed {outcome.seed} ({outcome.name}): {outcome.result}: {outcome.problem[:600]}")
    totals = sum(kinds.values(), Counter())
    return {
        "surface": surface,
        "cases": totals.total(),
        "failures": num_failures,
        "outcomes": dict(totals),
        "seeds": f"{seeds.start}:{seeds.stop}",
        "core_s": round(core_s),
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "pillow", "tokenizers")},
        "hardware": describe_hardware(),
        "command": f"python -m tests.fuzz --surface {surface} --seeds {seeds.start}:{seeds.stop}",
        "kinds": {name: dict(counts) for name, counts in sorted(kinds.items())},
        "noted": noted[:NOTED],
    }


def note(path: Path, entry: dict[str, Any]) -> None:
    """Put an entry into the results file, in the place of an older one of the same surface."""
    found = json.loads(path.read_text()) if path.exists() else {}
    others = [one for one in found.get("surfaces", []) if one["surface"] != entry["surface"]]
    surfaces = sorted([*others, entry], key=lambda one: one["surface"])
    totals = {key: sum(one[key] for one in surfaces) for key in ("cases", "failures", "core_s")}
    write_json(path, {**found, "fuzz": totals, "surfaces": surfaces})


def _print(entry: dict[str, Any], with_kinds: bool) -> None:
    print(
        f"{entry['surface']}: {entry['cases']} cases, {entry['outcomes']}, {entry['core_s']} core seconds", flush=True
    )
    for name, counts in entry["kinds"].items() if with_kinds else ():
        print(f"  {name:28} {counts}")
    for line in entry["noted"]:
        print(f"  {line}", flush=True)


def _child(surface: str, seeds: range) -> int:
    """Write what happens as lines of JSON; whatever else is printed goes to standard error."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", no_proxy="*")
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.dont_write_bytecode = True
    cases = importlib.import_module(SURFACES[surface]).cases
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    if transformers := sys.modules.get("transformers"):
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    limits.limit_memory()
    print(json.dumps({"ready": surface}), file=channel)
    for seed in seeds:
        print(json.dumps({"begin": seed}), file=channel)
        for outcome in run(cases, [seed]):
            print(json.dumps({"outcome": list(outcome)}), file=channel)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
