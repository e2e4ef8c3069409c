"""Many clients at once, each answer compared; and how fast one and many are served."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import openai

from .deck import Case
from .process import ServerProcess


def make_client(address: str, timeout_s: float = 600) -> Any:
    return openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=timeout_s)


class Tally:
    """What became of requests; an error is told by its kind and status."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def ask(self, client: Any, case: Case) -> bool:
        try:
            answer = await case.ask(client)
        except openai.APIStatusError as error:
            self.errors[f"{error.status_code} {getattr(error, 'code', None)}"] += 1
            return False
        except openai.APIError as error:  # a broken connection, and an error event of a stream
            self.errors[type(error).__name__] += 1
            return False
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self.errors[f"{type(error).__name__}: {str(error)[:60]}"] += 1
            return False
        except Exception as error:  # of the HTTP library below, when a stream is cut in the middle
            self.errors[type(error).__name__] += 1
            return False
        is_right = case.is_right(answer, case.expected)
        (self.right if is_right else self.wrong)[case.kind] += 1
        return is_right

    def summary(self) -> dict[str, Any]:
        return {
            "asked": sum(self.right.values()) + sum(self.wrong.values()) + sum(self.errors.values()),
            "right": dict(sorted(self.right.items())),
            "wrong": sum(self.wrong.values()),
            "lost": sum(self.errors.values()),
            "errors": dict(self.errors),
        }


async def steady_load(server: ServerProcess, deck: Sequence[Case], num_clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask one question after the other; memory of the server every second."""
    tally, ends = Tally(), time.monotonic() + seconds
    memory: list[float] = []

    async def one_client(number: int) -> None:
        chooser, client = random.Random(number), make_client(server.address)
        while time.monotonic() < ends:
            await tally.ask(client, chooser.choice(deck))
        await client.close()

    async def watch_memory() -> None:
        while time.monotonic() < ends:
            memory.append(server.memory_mib())
            await asyncio.sleep(1)

    start = time.monotonic()
    await asyncio.gather(watch_memory(), *(one_client(number) for number in range(num_clients)))
    took = time.monotonic() - start
    first_minute = min(60, len(memory) // 2)
    early, late = memory[first_minute], statistics.median(memory[-max(1, len(memory) // 10) :])
    return {
        "clients": num_clients,
        "seconds": round(took),
        **tally.summary(),
        "answers_per_second": round(sum(tally.right.values()) / took, 2),
        "memory_mib": {"after_first_minute": round(early), "at_the_end": round(late), "largest": round(max(memory))},
        "memory_growth": round(late / early - 1, 4),
    }


async def batching_gain(server: ServerProcess, cases: Sequence[Case], pairs: int) -> dict[str, Any]:
    """Pictures per second of requests sent at once, and of the same requests one after the other, in turn.

    The server's processor time stands beside the wall clock, which on a shared machine measures the neighbours too.
    """
    client, tally = make_client(server.address), Tally()

    async def all_at_once() -> None:
        await asyncio.gather(*(tally.ask(client, case) for case in cases))

    async def one_by_one() -> None:
        for case in cases:
            await tally.ask(client, case)

    times = []
    for _ in range(pairs):
        pair = []
        for ask in (all_at_once, one_by_one):
            wall, processor = time.monotonic(), server.cpu_s()
            await ask()
            pair.append((time.monotonic() - wall, server.cpu_s() - processor))
        times.append(pair)
    await client.close()
    found: dict[str, Any] = {"requests": len(cases), "pairs": pairs}
    for index, clock in enumerate(("wall", "processor")):
        seconds = [(once[index], single[index]) for once, single in times]
        at_once, single = (statistics.median(column) for column in zip(*seconds, strict=True))
        found[clock] = {
            "images_per_second_at_once": round(len(cases) / at_once, 2),
            "images_per_second_one_by_one": round(len(cases) / single, 2),
            "gain_median": round(statistics.median(b / a for a, b in seconds), 2),
            "gain_min": round(min(b / a for a, b in seconds), 2),
        }
    return {**found, "wrong_or_lost": tally.summary()["asked"] - sum(tally.right.values())}


async def lone_latency(
    server: ServerProcess, cases: Sequence[Case], directly: Callable[[int], Any], rounds: int
) -> dict[str, Any]:
    """Seconds of a request with nobody else there, in turn with the direct call in this process.

    By the wall clock, and by processor time: of the server and of this client together against that of the call.
    """
    client, tally = make_client(server.address), Tally()
    served: list[tuple[float, float]] = []
    direct: list[tuple[float, float]] = []
    for number in range(-1, rounds):  # the first of both pays for much and is not counted
        wall, processor = time.monotonic(), server.cpu_s() + time.process_time()
        await tally.ask(client, cases[number % len(cases)])
        served.append((time.monotonic() - wall, server.cpu_s() + time.process_time() - processor))
        wall, processor = time.monotonic(), time.process_time()
        directly(number % len(cases))
        direct.append((time.monotonic() - wall, time.process_time() - processor))
    await client.close()
    found: dict[str, Any] = {"rounds": rounds, "wrong_or_lost": rounds + 1 - sum(tally.right.values())}
    for index, clock in enumerate(("wall", "processor")):
        ours, theirs = ([times[index] for times in both[1:]] for both in (served, direct))
        found[clock] = {
            "served_median_s": round(statistics.median(ours), 4),
            "direct_median_s": round(statistics.median(theirs), 4),
            "served_p95_s": round(_p95(ours), 4),
            "direct_p95_s": round(_p95(theirs), 4),
            "bar_s": round(1.1 * _p95(theirs) + 0.05, 4),
        }
    return found


def _p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * (len(times) - 1))]


__all__ = ["Tally", "batching_gain", "lone_latency", "make_client", "steady_load"]
