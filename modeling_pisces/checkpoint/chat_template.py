"""Renders a checkpoint's chat template once, in a child process with little time and memory, before it is relied on.

A chat template is a program of the checkpoint's author. transformers runs it in a sandbox that keeps it from files and
attributes, not from looping for hours or from doubling a text until memory is full. The loader of the console calls
`check_chat_template`; a template that fails there would have failed at the first prompt.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any


MAX_SECONDS = 5  # a template of the usual kinds takes milliseconds
MAX_MEMORY_BYTES = 512 * 2**20  # beyond what the process holds already
MAX_CHARACTERS = 1_000_000  # the probes have tens
_DONE = "done"
_PROBES = (
    [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
)


def check_chat_template(processor: Any) -> None:
    """Render the two conversations that every command starts from: a text, and a picture with a question.

    Raises:
        ValueError: the template has an error, or needs too much time, memory or text. Time and memory are bounded on
            Linux; elsewhere only errors and the length of the text are found.
    """
    if processor.chat_template is None:
        return

    def render() -> str:
        for conversation in _PROBES:
            text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            if len(text) > MAX_CHARACTERS:
                return f"it makes {len(text)} characters of {conversation}, more than {MAX_CHARACTERS}"
        return _DONE

    problem = _in_child(render) if sys.platform == "linux" else _attempt(render)
    if problem != _DONE:
        raise ValueError(
            f"the chat template cannot be used: {problem}. Take chat_template.jinja from the checkpoint's publisher "
            "again, or repair it."
        )


def _attempt(render: Callable[[], str]) -> str:
    try:
        return render()
    except MemoryError:
        return f"it needs more than {MAX_MEMORY_BYTES // 2**20} MiB"
    except Exception as error:  # whatever a template raises, jinja's own errors and Python's
        cause = error.__cause__ or error  # the processor names the row, which says nothing of a probe
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:2000].rstrip(".")


def _in_child(render: Callable[[], str]) -> str:
    """What `render` returns in a copy of this process that is given up when it takes too much."""
    reading, writing = os.pipe()
    child = os.fork()  # no exec: the copy has everything loaded, and touches nothing but the template
    if child == 0:
        try:
            _limit_resources()
            os.write(writing, _attempt(render).encode("utf-8", "replace"))
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 2 * MAX_SECONDS)  # twice: the machine may be busy
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answer = os.read(reading, 1 << 16).decode("utf-8", "replace") if ready else ""
    os.close(reading)
    return answer or f"it needs more than {MAX_SECONDS} s or {MAX_MEMORY_BYTES // 2**20} MiB"


def _limit_resources() -> None:
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_AS, held + MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, MAX_SECONDS)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


__all__ = ["check_chat_template"]
