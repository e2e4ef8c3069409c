"""Questions to a server with the answers of the same functions called directly, without any code of the server's."""

import base64
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_pisces.console.commands import answer_question
from modeling_pisces.console.embedding import embed_images, embed_texts
from modeling_pisces.image_loading_pisces import load_image


PROMPTS = (
    "a red circle",
    "two blue stars",
    "a yellow heart left of a purple square",
    "three crosses on a dark background",
    "a large cyan circle at the top and a small green star at the bottom",
    "four white triangles",
)
QUESTIONS = ("describe the picture in detail.", "how many objects are in the picture?")
EDITS = ("make the circle red", "add a star at the top", "remove the star")
MOST_PIXEL_DIFFERENCE = 2  # of 255: what a batch may change
MOST_VECTOR_DIFFERENCE = 1e-4


@dataclass
class Case:
    """One question: `ask(client)` sends it, `expected` is the direct call's answer, `is_right` compares."""

    kind: str
    ask: Callable[[Any], Awaitable[Any]]
    expected: Any
    is_right: Callable[[Any, Any], bool]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def make_deck(pipeline: Any, model_name: str, pictures: Sequence[Path]) -> list[Case]:
    """Every endpoint, whole and streamed, with answers computed now."""
    draws = [_draw(pipeline, model_name, prompt, seed) for seed, prompt in enumerate(PROMPTS * 2)]
    others = [
        _draw(pipeline, model_name, prompt, 50, num_inference_steps=3, guidance_scale=2.0) for prompt in PROMPTS[:4]
    ]
    edits = [_edit(pipeline, model_name, path, EDITS[number % len(EDITS)], 60) for number, path in enumerate(pictures)]
    chats = [
        _chat(pipeline, model_name, path, question, streamed)
        for number, path in enumerate(pictures)
        for question in QUESTIONS
        for streamed in (bool(number % 2),)
    ]
    mixed = [_interleaved(pipeline, model_name, f"draw {prompt}", 70) for prompt in PROMPTS[:2]]
    embeds = [_embed(pipeline, model_name, path, prompt) for path, prompt in zip(pictures, PROMPTS, strict=False)]
    return [*draws, *others, *edits, *chats, *mixed, *embeds]


def _draw(pipeline: Any, name: str, prompt: str, seed: int, **options: Any) -> Case:
    expected = [_pixels(image) for image in pipeline([prompt], generator=[seeded(seed)], **options).images]

    async def ask(client: Any) -> Any:
        answer = await client.images.generate(model=name, prompt=prompt, extra_body={"seed": seed, **options})
        return [_opened(datum.b64_json) for datum in answer.data]

    return Case("draw", ask, expected, _same_pictures)


def _edit(pipeline: Any, name: str, path: Path, words: str, seed: int) -> Case:
    data = path.read_bytes()
    expected = [_pixels(i) for i in pipeline([words], image=[[path]], generator=[seeded(seed)]).images]

    async def ask(client: Any) -> Any:
        answer = await client.images.edit(model=name, image=(path.name, data), prompt=words, extra_body={"seed": seed})
        return [_opened(datum.b64_json) for datum in answer.data]

    return Case("edit", ask, expected, _same_pictures)


def _chat(pipeline: Any, name: str, path: Path, question: str, streamed: bool) -> Case:
    model, processor = pipeline.vision_language_model, pipeline.processor
    expected = answer_question(model, processor, load_image(path), question)
    shown = {"type": "image_url", "image_url": {"url": _data_url(path)}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]

    async def ask(client: Any) -> str:
        if not streamed:
            answer = await client.chat.completions.create(model=name, messages=messages)
            return answer.choices[0].message.content.strip()
        stream = await client.chat.completions.create(model=name, messages=messages, stream=True)
        pieces, ending = [], None
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            ending = chunk.choices[0].finish_reason or ending
        if ending is None:
            raise ConnectionError("the stream broke off")
        return "".join(pieces).strip()

    return Case("stream" if streamed else "chat", ask, expected, lambda found, wanted: found == wanted)


def _interleaved(pipeline: Any, name: str, words: str, seed: int) -> Case:
    model, processor = pipeline.vision_language_model, pipeline.processor
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": words}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(
        **inputs, generation_mode="interleaved", max_new_tokens=64, do_sample=False, generator=seeded(seed)
    )
    vectors = output.image_vectors
    generators = [seeded(seed + k) for k in range(len(vectors))]
    expected = [_pixels(image) for image in pipeline(image_vectors=vectors, generator=generators).images]

    async def ask(client: Any) -> Any:
        answer = await client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": words}],
            modalities=["text", "image"],
            seed=seed,
            max_tokens=64,
        )
        parts = answer.choices[0].message.content
        return [_opened(part["image_url"]["url"].partition(",")[2]) for part in parts if part["type"] == "image_url"]

    return Case("interleaved", ask, expected, _same_pictures)


def _embed(pipeline: Any, name: str, path: Path, prompt: str) -> Case:
    model, processor = pipeline.vision_language_model, pipeline.processor
    expected = np.concatenate([embed_texts(model, processor, [prompt]), embed_images(model, processor, [path])])

    async def ask(client: Any) -> Any:
        answer = await client.embeddings.create(model=name, input=[prompt, _data_url(path)])
        return np.array([datum.embedding for datum in answer.data], dtype=np.float32)

    return Case("embed", ask, expected, _same_vectors)


def _same_pictures(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        a.shape == b.shape and abs(a - b).max() <= MOST_PIXEL_DIFFERENCE for a, b in zip(found, wanted, strict=True)
    )


def _same_vectors(found: Any, wanted: Any) -> bool:
    return found.shape == wanted.shape and bool(abs(found - wanted).max() <= MOST_VECTOR_DIFFERENCE)


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _opened(b64: str) -> Any:
    return _pixels(load_image(base64.b64decode(b64)))


def _pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB")).astype(np.int16)


__all__ = ["Case", "make_deck", "seeded"]
