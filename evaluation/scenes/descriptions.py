"""Interleaved use, judged: the model draws a prompt and then, in the same conversation, says what it has drawn.

`evaluation.scenes` calls `describe_drawings`. The follow-up reads the drawn vectors, not pixels, so a right answer
means that the language model understands its own drawing. An answer is read by `parse_description` into objects,
relation and background, and compared with what the prompt asked for.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from evaluation.runs.batches import KeptBatches
from evaluation.runs.summaries import Outcomes, seed_generators


REQUEST = "describe the picture."
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right", "center")


@dataclass
class Description:
    """What an answer says: `objects` as (shape, color or None, place or None), one entry per object."""

    objects: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    relation: str | None = None  # of the first object to the second
    background: str = "light"


def parse_description(text: str, shapes: Iterable[str], colors: Iterable[str]) -> Description:
    """Read a short caption like "a red star left of a blue cross at the top on a dark background".

    A relation counts where it stands between two noun phrases; a place belongs to the phrase before it. Words that
    are not part of the scenes' language are passed over.
    """
    text = text.lower()
    found = Description(background="dark" if "dark background" in text else "light")
    noun = re.compile(
        rf"\b({'|'.join(NUMBERS)}) (?:small |large )?(?:({'|'.join(colors)}) )?({'|'.join(shapes)})(?:es|s)?\b"
    )
    phrases = list(noun.finditer(text))
    for index, phrase in enumerate(phrases):
        number, color, shape = phrase.groups()
        after = text[phrase.end() : phrases[index + 1].start() if index + 1 < len(phrases) else len(text)]
        relation = next((word for word in RELATIONS if after.strip() == word), None)
        place = None if relation else next((word for word in PLACES if re.search(rf"\bthe {word}\b", after)), None)
        found.objects += [(shape, color, place)] * NUMBERS[number]
        if index == 0:
            found.relation = relation
    return found


def agrees(said: Description, prompt: dict[str, Any]) -> bool:
    """Whether a description has everything the prompt asked for, and no object more.

    `prompt` is a row of `prompts.jsonl`. What the prompt leaves unsaid is not asked for.
    """
    include = prompt["include"]
    if Counter(shape for shape, _, _ in said.objects) != _asked_shapes(include):
        return False
    looks = Counter((shape, color) for shape, color, _ in said.objects)
    if any("color" in item and looks[item["class"], item["color"]] < item["count"] for item in include):
        return False
    if prompt["background"] not in (None, said.background):
        return False
    if len(said.objects) == 1 and prompt["place"] not in (None, said.objects[0][2] or "center"):
        return False
    return all(_is_related(said, item, include) for item in include if "position" in item)


def _asked_shapes(include: list[dict]) -> Counter:
    asked: Counter = Counter()
    for item in include:
        asked[item["class"]] += item["count"]
    return asked


def _is_related(said: Description, item: dict, include: list[dict]) -> bool:
    """Whether the description puts the item where the prompt wants it, in so many words or by the objects' places."""
    relation, other = item["position"][0], include[item["position"][1]]["class"]
    (first, _, first_place), (second, _, second_place) = said.objects[:2]
    if said.relation is not None:
        wanted = relation if (first, second) == (item["class"], other) else RELATIONS[relation]
        return said.relation == wanted
    if first_place is None or second_place is None:
        # "A and B" is the words' own convention for A left of B
        return relation == ("left of" if first == item["class"] else "right of")
    places = {first: first_place, second: second_place}
    (row, col), (other_row, other_col) = (_cell(places[name]) for name in (item["class"], other))
    return {
        "left of": col < other_col,
        "right of": col > other_col,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def _cell(place: str) -> tuple[int, int]:
    row = 0 if place.startswith("top") else 2 if place.startswith("bottom") else 1
    return row, 0 if place.endswith("left") else 2 if place.endswith("right") else 1


@torch.no_grad()
def describe_drawings(
    pipeline, prompts: list[dict], words: dict[str, Any], batch_size: int = 48, kept: KeptBatches | None = None
) -> tuple[Outcomes, list[dict]]:
    """Draw every prompt once (seed 0), ask for a description, and compare it with the prompt.

    Args:
        pipeline: a `PiscesPipeline` with its language model.
        prompts: rows of `prompts.jsonl`.
        words: "shapes" and "colors" of `shapes.json`.
        kept: where a killed run goes on.

    Returns:
        outcomes by category, and the table of answers.
    """
    model, processor = pipeline.vision_language_model, pipeline.processor

    def describe(chunk: list[dict]) -> list[dict]:
        texts = [prompt["prompt"] for prompt in chunk]
        vectors = pipeline.encode_prompt(texts, generator=seed_generators([0] * len(chunk)))
        conversations = [_conversation(text, row) for text, row in zip(texts, vectors, strict=True)]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [{"answer": answer} for answer in answers]

    outcomes: Outcomes = {}
    table = []
    for prompt, said in (kept or KeptBatches()).run("describing drawings", prompts, batch_size, describe):
        correct = agrees(parse_description(said["answer"], words["shapes"], words["colors"]), prompt)
        outcomes.setdefault(prompt["tag"], []).append(correct)
        table.append({"prompt": prompt["prompt"], **said, "correct": correct})
    return outcomes, table


def _conversation(prompt: str, vectors: torch.Tensor) -> list[dict]:
    """The prompt, the drawing as its vectors, and the request for a description."""
    return [
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "image", "image_vectors": vectors}]},
        {"role": "user", "content": [{"type": "text", "text": REQUEST}]},
    ]
