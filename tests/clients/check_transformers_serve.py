"""Asks `transformers serve` about a picture through the OpenAI client, and compares with `generate`.

`make test-clients` runs it in an environment of its own. The server listens on 127.0.0.1 only and is stopped at the
end, whatever happens. For each checkpoint: one question with a picture as a data URL, the same as a stream, and eight
questions at once; all must equal what `generate` writes for the same messages.
"""

import argparse
import base64
import io
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from openai import APIConnectionError, OpenAI
from PIL import Image


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
QUESTIONS = ["What colour is it?", "What shape is it?", "How many objects are there?", "Is there a red cube?"]
MAX_NEW_TOKENS = 12


def data_url(path: Path) -> str:
    picture = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(picture, format="PNG")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def openai_messages(path: Path, question: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": data_url(path)}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def expected_answers(checkpoint: str, cases: list[tuple[Path, str]]) -> list[str]:
    """What `generate` writes, greedily, one question at a time."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    import modeling_pisces  # noqa: F401

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint).eval()
    answers = []
    for path, question in cases:
        with Image.open(path) as image:
            content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, **options)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(client: OpenAI, server: subprocess.Popen, timeout_s: float = 120.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit status {server.returncode} before it answered")
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {timeout_s:.0f} s")


def check(client: OpenAI, checkpoint: str, cases: list[tuple[Path, str]], expected: list[str]) -> list[str]:
    """The differences between what the server and `generate` wrote."""
    options = {"model": checkpoint, "temperature": 0.0, "max_tokens": MAX_NEW_TOKENS}

    def ask(case):
        return client.chat.completions.create(messages=openai_messages(*case), **options).choices[0].message.content

    def ask_streaming(case):
        parts = client.chat.completions.create(messages=openai_messages(*case), stream=True, **options)
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    with ThreadPoolExecutor(8) as pool:
        found = {
            "one question": [ask(cases[0])],
            "one stream": [ask_streaming(cases[0])],
            "eight at once": list(pool.map(ask, cases)),
        }
    return [
        f"{checkpoint}, {way}, question {index}: {answer!r} instead of {wanted!r}"
        for way, answers in found.items()
        for index, (answer, wanted) in enumerate(zip(answers, expected, strict=False))
        if (answer or "").strip() != wanted.strip()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="*", default=[str(REPOSITORY / "pisces-tiny")])
    parser.add_argument("--pictures", type=Path, default=REPOSITORY / "examples")
    args = parser.parse_args()
    pictures = sorted(args.pictures.rglob("*.png"))[:8]
    if not pictures:
        print(f"error: {args.pictures} holds no .png; `make examples` renders some", file=sys.stderr)
        return 2
    cases = [(pictures[i % len(pictures)], QUESTIONS[i % len(QUESTIONS)]) for i in range(8)]
    failures = []
    for checkpoint in args.checkpoints:
        expected = expected_answers(checkpoint, cases)
        port = free_port()
        command = [sys.executable, str(HERE / "transformers_serve.py"), "serve", checkpoint, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--device", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        server = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", timeout=120, max_retries=0)
            wait_for(client, server)
            failures += check(client, checkpoint, cases, expected)
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
        print(f"{checkpoint}: asked {len(cases)} questions, one of them also alone and as a stream")
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
