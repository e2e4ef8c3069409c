"""Thousands of seeded requests that are nearly right: wrong types, sizes, bytes, names; whole bodies of nonsense."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from typing import Any

import httpx
from PIL import Image


HANG_S = 120  # an answer later than that counts as a hang; the machine is shared
# fmt: off
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", " ", "y", "1", "0", "true",
    "\x00", "\ud800", "\u202e", "é", "日本", "🙂" * 50, "long" * 1250, "../../etc/passwd", "{{7*7}}", "<|image|>",
    "<|gen_start|>", "<|gen_image|>", "<|end|>", [], [[]], {}, [None], [1], ["x"], {"a": 1}, [{"type": "text"}],
    "data:,", "null", "NaN", "data:image/png;base64,", "http://127.0.0.1:1/x.png", "file:///etc/passwd",
    [[[[[[[[1]]]]]]]],
)
PATHS = ("/chat/completions", "/images/generations", "/images/edits", "/embeddings")
NAMES = (
    "model", "messages", "prompt", "n", "size", "seed", "stop", "stream", "temperature", "top_p", "max_tokens",
    "input", "modalities", "negative_prompt", "guidance_scale", "num_inference_steps", "response_format", "user",
    "encoding_format", "stream_options", "tools", "logprobs", "dimensions", "quality", "strength", "mask", "unknown",
    "", "\u0000", "__class__",
)
# fmt: on


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 128 if mode in "L1" else None).save(buffer, "PNG")
    return buffer.getvalue()


def good_body(chooser: random.Random, path: str) -> dict[str, Any]:
    """A small request that is right."""
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    if path == "/chat/completions":
        parts: list[Any] = [{"type": "text", "text": chooser.choice(["hello", "what is it?", ""])}]
        if chooser.random() < 0.3:
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, "stream": chooser.random() < 0.2}
    if path == "/embeddings":
        return {"input": chooser.choice(["red", ["red", "blue"], url])}
    return {"prompt": chooser.choice(["red", "blue star"]), "num_inference_steps": 1, "seed": chooser.randrange(9)}


def mutated(chooser: random.Random, value: Any) -> Any:
    """A value with one place in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and chooser.random() < 0.8:
        name = chooser.choice(list(value))
        deeper = chooser.random()
        if deeper < 0.5:
            return {**value, name: mutated(chooser, value[name])}
        if deeper < 0.65:
            return {key: inner for key, inner in value.items() if key != name}
        return {**value, chooser.choice(NAMES): chooser.choice(ODD)}
    if isinstance(value, list) and value and chooser.random() < 0.8:
        place = chooser.randrange(len(value))
        if chooser.random() < 0.2:
            return value * chooser.choice([2, 20])
        return [mutated(chooser, inner) if n == place else inner for n, inner in enumerate(value)]
    if isinstance(value, str) and value.startswith("data:") and chooser.random() < 0.8:
        return broken_url(chooser)
    return chooser.choice(ODD)


def broken_url(chooser: random.Random) -> str:
    size = chooser.choice([(8, 8), (1, 1), (3000, 3), (300, 300)])
    data = bytearray(png(size, chooser.choice(["RGB", "L", "RGBA", "1"])))
    for _ in range(chooser.randrange(4)):
        data[chooser.randrange(len(data))] = chooser.randrange(256)
    return f"data:image/png;base64,{base64.b64encode(data[: chooser.choice([None, len(data) // 2])]).decode()}"


def request_of(chooser: random.Random) -> dict[str, Any]:
    """Arguments of one request for httpx."""
    path = chooser.choice(PATHS)
    method = (
        "POST" if chooser.random() < 0.96 else chooser.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
    )
    if chooser.random() < 0.02:
        path = chooser.choice(["/", "/nothing", "/models/x", "/chat/completions/", "/%00", "/../health", "/é"])
    body = good_body(chooser, path)
    for _ in range(chooser.choice([1, 1, 1, 2, 3])):
        body = mutated(chooser, body)
    if path == "/images/edits" and chooser.random() < 0.9:
        return {"method": method, "url": path, **_form(chooser, body)}
    text = json.dumps(body).encode("ascii")
    nonsense = chooser.random()
    if nonsense < 0.04:
        text = text[: chooser.randrange(len(text) + 1)]
    elif nonsense < 0.06:
        text = chooser.randbytes(chooser.randrange(300))
    elif nonsense < 0.07:
        text = b"[" * chooser.choice([10, 100_000])
    kind = "application/json" if chooser.random() < 0.97 else chooser.choice(["text/plain", "", "multipart/form-data"])
    return {"method": method, "url": path, "content": text, "headers": {"Content-Type": kind}}


def _form(chooser: random.Random, body: Any) -> dict[str, Any]:
    fields = {}
    for name, value in body.items() if isinstance(body, dict) else ():
        text = value if isinstance(value, str) else json.dumps(value)
        fields[name or "x"] = text.encode("utf-8", "replace").decode()
    data = base64.b64decode(broken_url(chooser).partition(",")[2]) if chooser.random() < 0.5 else png()
    files = [(chooser.choice(["image", "image", "image", "image[]", "mask", "file"]), ("a.png", data))]
    return {"data": fields, "files": files * chooser.choice([1, 1, 1, 2, 20])}


def judge(response: httpx.Response) -> str | None:
    """What is wrong with an answer, or None."""
    if "Traceback" in response.text:
        return "a traceback"
    if response.status_code < 400 or response.request.method == "HEAD":
        return None
    if response.status_code == 500:
        return "500"
    try:
        error = response.json()["error"]
        is_right = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        is_right = False
    return None if is_right else f"{response.status_code} in another form"


async def fuzz(address: str, num_requests: int, seed: int, at_once: int = 32) -> dict[str, Any]:
    """Send them, and count answers by status and what is wrong by kind."""
    statuses: Counter[int] = Counter()
    faults: Counter[str] = Counter()
    examples: list[str] = []
    numbers = iter(range(num_requests))

    async def one_client() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=HANG_S) as client:
            for number in numbers:
                wanted = request_of(random.Random(seed * 1_000_003 + number))
                try:
                    response = await client.request(**wanted)
                    fault = judge(response)
                    statuses[response.status_code] += 1
                except httpx.TimeoutException:
                    fault = "a hang"
                except httpx.HTTPError as error:
                    fault = f"no answer ({type(error).__name__})"
                if fault is not None:
                    faults[fault] += 1
                    examples.append(f"{number}: {fault}")

    start = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(at_once)))
    return {
        "requests": num_requests,
        "seed": seed,
        "seconds": round(time.monotonic() - start),
        "by_status": {str(status): count for status, count in sorted(statuses.items())},
        "faults": dict(faults),
        "examples": examples[:20],
    }


__all__ = ["fuzz", "judge", "request_of"]
