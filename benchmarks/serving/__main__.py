"""The bars of `pisces serve`: right answers under load, flat memory, batching, a lone request, fuzz, dying processes.

`python -m benchmarks.serving --output results/serving.json` starts servers of its own on free ports of this machine.
Every answer is compared with the same function called directly in this process. What --parts leaves out stays in the
results file as it was. Needs the extras `serve` and `dev`.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pisces_commands.arguments import COUNT, SEED, LineParser, UsageError
from pisces_commands.ending import run_command
from pisces_commands.measurement import current_command, current_commit, write_result


BAR = (
    "0 wrong, 0 lost, memory growth <= 5 % after the first minute; images per second at once >= 2.5 x one by one; "
    "p95 of a lone request <= 1.1 x direct + 50 ms; fuzz: 0 tracebacks, 0 hangs, every refusal in the one form; "
    "killed: started again, none answered wrong"
)
PARTS = ("latency", "batching", "load", "fuzz", "ends")
FUZZ_FLAGS = (
    "--max_tokens 4 --max_steps 2 --max_n 2 --max_draw_pixels 4096 --max_pixels 100000 --max_body_mib 1".split()
)


def parse() -> argparse.Namespace:
    parser = LineParser(prog="python -m benchmarks.serving", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="pisces-tiny", help="checkpoint folder with a decoder")
    parser.add_argument("--pictures", default="examples/images", help="folder of PNG files to ask about")
    parser.add_argument("--output", required=True, help="results file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--clients", type=COUNT, default=64, help="that ask at once")
    parser.add_argument("--seconds", type=COUNT, default=300, help="of load")
    parser.add_argument("--num_fuzz", type=COUNT, default=10_000, help="requests of the fuzz")
    parser.add_argument("--seed", type=SEED, default=0, help="of the fuzz")
    parser.add_argument("--rounds", type=COUNT, default=60, help="lone requests")
    parser.add_argument("--pairs", type=COUNT, default=5, help="of requests at once and one by one")
    parser.add_argument("--threads", type=COUNT, default=1, help="of the server, and of the direct calls")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        import httpx  # noqa: F401
        import openai  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error}. Install the extras: pip install 'modeling-pisces[serve,dev]'.") from error
    import torch

    from modeling_pisces.checkpoint.loading import load_pipeline, quiet_libraries

    from .deck import make_deck

    pictures = sorted(Path(args.pictures).glob("*.png"))[:6]
    if not pictures:
        raise UsageError(f"--pictures {args.pictures}: no PNG files there.")
    torch.set_num_threads(args.threads)
    with quiet_libraries():
        pipeline = load_pipeline(Path(args.model))
        pipeline.set_progress_bar_config(disable=True)
        deck = make_deck(pipeline, Path(args.model).name, pictures)
        for part in args.parts:
            load = round(os.getloadavg()[0], 2)
            run = {"command": current_command(), "commit": current_commit(), "load_average": load}
            measured = {part: {**MEASURES[part](args, deck, pipeline), "run": run}}
            write_result(args.output, "serving", BAR, {"threads": args.threads, **_kept(args.output), **measured})


def _kept(output: str) -> dict[str, Any]:
    """Parts of a results file that another run has measured."""
    path = Path(output)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {part: found[part] for part in PARTS if part in found}


def _with_server(args: argparse.Namespace, measure: Callable[[Any], Any], *flags: str) -> Any:
    from .process import ServerProcess

    server = ServerProcess(args.model, args.threads, *flags)
    try:
        server.wait_for("ready at ")
        return asyncio.run(measure(server))
    finally:
        if server.process.poll() is None:
            server.end()


def _draws(deck: list[Any]) -> list[Any]:
    return [case for case in deck if case.kind == "draw"][:12]  # of equal shape


def _latency(args: argparse.Namespace, deck: list[Any], pipeline: Any) -> Any:
    from .deck import PROMPTS, seeded
    from .load import lone_latency

    def directly(number: int) -> None:
        pipeline([PROMPTS[number % len(PROMPTS)]], generator=[seeded(number)])

    return _with_server(args, lambda server: lone_latency(server, _draws(deck), directly, args.rounds))


def _batching(args: argparse.Namespace, deck: list[Any], pipeline: Any) -> Any:
    from .load import batching_gain

    return _with_server(args, lambda server: batching_gain(server, _draws(deck) * 2, args.pairs))


def _load(args: argparse.Namespace, deck: list[Any], pipeline: Any) -> Any:
    from .load import steady_load

    return _with_server(args, lambda server: steady_load(server, deck, args.clients, args.seconds))


def _fuzz(args: argparse.Namespace, deck: list[Any], pipeline: Any) -> Any:
    from .fuzz import fuzz
    from .load import Tally, make_client

    async def measure(server: Any) -> Any:
        found = await fuzz(server.address, args.num_fuzz, args.seed)
        tally, client = Tally(), make_client(server.address)
        for case in [case for case in deck if case.kind == "embed"]:
            await tally.ask(client, case)
        await client.close()
        found["right_afterwards"] = tally.summary()
        found["tracebacks_in_the_log"] = sum("Traceback" in line for line in server.said)
        return found

    return _with_server(args, measure, *FUZZ_FLAGS)


def _ends(args: argparse.Namespace, deck: list[Any], pipeline: Any) -> Any:
    from .ends import kill_under_load, terminate_under_load

    num_clients = min(args.clients, 16)

    async def measure(server: Any) -> Any:
        killed = await kill_under_load(server, deck, num_clients)
        return {"killed": killed, "terminated": await terminate_under_load(server, deck, num_clients)}

    return _with_server(args, measure)


MEASURES = {"latency": _latency, "batching": _batching, "load": _load, "fuzz": _fuzz, "ends": _ends}


if __name__ == "__main__":
    run_command(main)
