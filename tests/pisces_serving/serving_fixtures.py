"""A server without a process: the application, a worker with a random tiny model, and requests in one line."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pisces_serving.settings import Settings


pytest.importorskip("diffusers")
pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from pisces_serving.__main__ import open_server
from pisces_serving.app import create_app


LIMITS: dict[str, Any] = {
    "max_body_mib": 1,
    "max_pixels": 10_000,
    "max_draw_pixels": 32 * 32,
    "max_images": 2,
    "max_tokens": 40,
    "max_n": 3,
    "max_steps": 5,
    "max_inputs": 4,
    "batch_wait_ms": 0,
}


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def opened(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64.rpartition(",")[2]))).convert("RGB"))


def user(*parts: Any) -> dict[str, Any]:
    """A user's turn: texts and pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


class Served:
    """A server and a client of it."""

    def __init__(self, folder: Path, start: bool = True, **changes: Any):
        self.server = open_server(Settings(model=str(folder), **{**LIMITS, **changes}))
        self.worker = self.server.worker
        self.client = TestClient(create_app(self.server), raise_server_exceptions=False)
        if start:
            self.worker.start()
            assert self.worker.is_ready.wait(60) or self.worker.error, "not loaded after a minute"
            if self.worker.error:
                raise self.worker.error

    def ask(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST JSON, or GET without a body."""
        if body is None:
            return self.client.get(path, **options)
        return self.client.post(path, json=body, **options)

    def chat(self, *messages: dict[str, Any], **options: Any) -> Any:
        return self.ask("/v1/chat/completions", {"messages": list(messages), **options})

    def draw(self, prompt: str, **options: Any) -> Any:
        return self.ask("/v1/images/generations", {"prompt": prompt, **options})

    def close(self) -> None:
        self.server.batcher.close()


def refusal(answer: Any) -> dict[str, Any]:
    """The error of a refused request, whose form is checked."""
    assert answer.headers["content-type"] == "application/json", answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and "\n" not in error["message"] and "Traceback" not in error["message"]
    return error
