"""Any server that speaks OpenAI's chat completions: words about a picture, over HTTP. vLLM, SGLang, llama.cpp do.

Only the address that the user names is called. A server may say something else on the next run; what a shard has is
kept.
"""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from PIL import Image

from pisces_commands.ending import CommandFailed


TRIES = 4
TIMEOUT_S = 120
MAX_SIDE = 1024  # of a picture that is sent; servers shrink more than that anyway


class ChatServer:
    """One model of one server.

    Args:
        url: the API's root, such as http://127.0.0.1:8000/v1. A key is read from OPENAI_API_KEY if it is set.
        model: its name there.
    """

    def __init__(self, url: str, model: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url!r}: expected an address such as http://127.0.0.1:8000/v1.")
        self.url, self.model = url.rstrip("/") + "/chat/completions", model

    def answer(self, image: Image.Image, request: str, max_new_tokens: int) -> tuple[str, bool]:
        """The words of the answer, and whether it was cut at the limit of tokens.

        Raises:
            CommandFailed: the server does not answer as it should, after four tries.
        """
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": _data_url(image)}},
                        {"type": "text", "text": request},
                    ],
                }
            ],
        }
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                choice = self._post(body)["choices"][0]
                return str(choice["message"]["content"] or ""), choice.get("finish_reason") == "length"
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read(300).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__} {error}"
        problem = " ".join(problem.split())[:200]
        raise CommandFailed(f"{self.url}: no answer ({problem}). Check the server and run the same command again.")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
