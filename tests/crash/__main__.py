"""Disturbs every command that writes, and looks at what is left: `make crash`, or

    python -m tests.crash --kills 200 --disks 20 --writers 20 --seed 1 --output results/robustness_files.json

`kill -9` at random moments, full disks, two writers of one output, Ctrl-C, standard output that is closed, full or
absent, HOME that is missing or read-only, the C locale. Disks need root, which mounts small ones in memory.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    from pisces_commands.arguments import SEED, LineParser, whole_number

    parser = LineParser(
        prog="python -m tests.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = whole_number(0)
    parser.add_argument("--kills", type=count, default=200, help="kill -9, and a rerun each")
    parser.add_argument("--disks", type=count, default=20, help="full disks")
    parser.add_argument("--writers", type=count, default=20, help="pairs of writers of one output")
    parser.add_argument("--interrupts", type=count, default=20, help="Ctrl-C")
    parser.add_argument("--streams", type=count, default=20, help="runs whose standard output takes nothing")
    parser.add_argument("--environments", type=count, default=10, help="runs without HOME, or in the C locale")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--minutes", type=whole_number(1), help="stop after so many; the rest is not tried")
    parser.add_argument("--only", default="", help="jobs whose name has one of these in it, by commas")
    parser.add_argument("--output", metavar="FILE", help="results file, to which the counts are added")
    options = parser.parse_args(arguments)

    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.crash.jobs import JOBS, write_shared
    from tests.crash.running import warm_up
    from tests.crash.trials import PUSH, STREAMS, TRIALS, Bench, kill_push

    only = options.only.split(",")
    jobs = tuple(job for job in JOBS if any(word in job.name for word in only))
    randoms, start = random.Random(options.seed), time.monotonic()
    plan = ["kill"] * (options.kills // 4) + ["three kills"] * (options.kills // 4)
    plan += ["full disk"] * options.disks + ["two writers"] * options.writers + ["interrupt"] * options.interrupts
    plan += [f"stdout {kind}" for kind in list(STREAMS) * options.streams][: options.streams]
    plan += (["missing HOME", "read-only HOME", "C locale"] * options.environments)[: options.environments]
    warm_up(jobs)
    randoms.shuffle(plan)  # a run that is stopped has some of everything
    choices = [job for job in jobs for _ in range(job.weight)] + [PUSH] * any(word in PUSH.name for word in only)
    counts: Counter = Counter()
    tried: Counter = Counter()
    failures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pisces-crash-", ignore_cleanup_errors=True) as name:
        bench = Bench(write_shared(Path(name) / "shared"), Path(name), randoms)
        for trial in plan:
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                break
            job = randoms.choice(choices)
            if job is PUSH:
                trial, problem = "kill", attempt(lambda: kill_push(bench))
            else:
                problem = attempt(lambda trial=trial, job=job: TRIALS[trial](bench, job))
            counts[trial] += 1
            tried[job.name] += 1
            if problem:
                failures.append({"trial": trial, "job": job.name, "problem": problem[:600]})
                print(f"{trial}, {job.name}: {problem}", flush=True)
            if options.output:
                write(options.output, counts, bench.hits, failures, options.seed, time.monotonic() - start, tried)
    print(dict(counts), dict(bench.hits), f"{len(failures)} failures, {time.monotonic() - start:.0f} s")
    return int(bool(failures))


def attempt(trial: Callable[[], str]) -> str:
    try:
        return trial()
    except AssertionError as error:  # a job that fails undisturbed
        return str(error)


def write(
    path: str, counts: Counter, hits: Counter, failures: list, seed: int, seconds: float, tried: Counter
) -> None:
    """Add a run to "crash" of a results file, with the sums over all runs there; its other parts stay."""
    from pisces_commands.measurement import current_command, current_commit, describe_hardware
    from pisces_commands.writing import write_json

    file = Path(path)
    results = json.loads(file.read_text()) if file.is_file() else {"benchmark": "robustness"}
    runs = [run for run in results.get("crash", {}).get("runs", []) if run["seed"] != seed]  # its earlier state
    runs.append(
        {
            "trials": dict(counts),
            "kills": hits["kill"],
            "full_disks": hits["full disk"],
            "failures": failures,
            "jobs": dict(tried),
            "seed": seed,
            "hours": round(seconds / 3600, 2),
            "command": current_command(),
            "commit": current_commit(),
            "hardware": describe_hardware(),
        }
    )
    trials: Counter = sum((Counter(run["trials"]) for run in runs), Counter())
    results["crash"] = {
        "kills": sum(run["kills"] for run in runs),
        "full_disks": sum(run["full_disks"] for run in runs),
        "double_writers": trials["two writers"],
        "others": sum(trials.values())
        - sum(trials[name] for name in ("kill", "three kills", "full disk", "two writers")),
        "failures": sum(len(run["failures"]) for run in runs),
        "runs": runs,
    }
    write_json(file, results)


if __name__ == "__main__":
    sys.exit(main())
