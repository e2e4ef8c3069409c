"""What becomes of requests when the process that has the model is killed, and when the server is asked to end."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from typing import Any

from .deck import Case
from .load import Tally, make_client
from .process import ServerProcess


async def kill_under_load(server: ServerProcess, deck: Sequence[Case], num_clients: int) -> dict[str, Any]:
    """SIGKILL the child while clients ask; it is started again, and then everybody is answered."""
    during, after = Tally(), Tally()
    is_over = asyncio.Event()
    clients = [asyncio.create_task(_ask_until(is_over, server, deck, during, number)) for number in range(num_clients)]
    await asyncio.sleep(5)
    start = time.monotonic()
    os.kill(server.child, signal.SIGKILL)
    await asyncio.to_thread(server.wait_for, "it is started again")
    told = time.monotonic() - start
    await asyncio.to_thread(server.wait_for, "ready at ", 2)
    back = time.monotonic() - start
    await asyncio.sleep(5)
    is_over.set()
    await asyncio.gather(*clients)
    client = make_client(server.address)
    for case in deck[:10]:
        await after.ask(client, case)
    await client.close()
    return {
        "signal": "SIGKILL of the process that has the model",
        "clients": num_clients,
        "noticed_after_s": round(told, 2),
        "ready_again_after_s": round(back, 1),
        "during": during.summary(),
        "afterwards": after.summary(),
    }


async def terminate_under_load(server: ServerProcess, deck: Sequence[Case], num_clients: int) -> dict[str, Any]:
    """SIGTERM while clients ask: answers are right or errors, and the command ends."""
    tally = Tally()
    is_over = asyncio.Event()
    clients = [asyncio.create_task(_ask_until(is_over, server, deck, tally, number)) for number in range(num_clients)]
    await asyncio.sleep(5)
    start = time.monotonic()
    code = await asyncio.to_thread(server.end)
    took = time.monotonic() - start
    is_over.set()
    await asyncio.gather(*clients)
    return {
        "signal": "SIGTERM of the command",
        "clients": num_clients,
        "exit_code": code,
        "ended_after_s": round(took, 1),
        **tally.summary(),
    }


async def _ask_until(
    is_over: asyncio.Event, server: ServerProcess, deck: Sequence[Case], tally: Tally, number: int
) -> None:
    chooser, client = random.Random(number), make_client(server.address, timeout_s=120)
    while not is_over.is_set():
        await tally.ask(client, chooser.choice(deck))
        await asyncio.sleep(0.05)  # a refused connection returns at once
    await client.close()


__all__ = ["kill_under_load", "terminate_under_load"]
