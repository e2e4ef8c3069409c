"""Cases for `PiscesProcessor`: conversations with typed control tokens, malformed ones, raw prompts, odd settings."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from conversion.assembly.chat_formats import make_chat_template
from modeling_pisces import PiscesProcessor
from tests.fixtures import make_processor, make_tokenizer
from tests.fuzz.outcomes import Case, Wrong


SURFACE = "processor"
FAMILIES = {
    "llama3": [],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]"],
    "phi": ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"],
}
WORDS = (
    "a red cube",
    "1 < 2 |> 3",
    "ünï \U0001f600",
    " ",
    "\n\n",
    "<b>",
    "[1]",
    "</s>",
    "<|",
    "|>",
    "CONTINUE",
    "{{ x }}",
    "{% if %}",
    "\ue000",
    "\U000f0000",
)
STUFF: tuple[Any, ...] = (
    None,
    3,
    2.5,
    b"bytes",
    [],
    {},
    [None],
    "",
    "\ud800",
    np.array([1]),
    np.str_("word"),
    {"type": "image"},
    {"type": "text"},
    object(),
    True,
)
SIDE = 8


@functools.lru_cache
def make_family(name: str) -> PiscesProcessor:
    base = make_processor()
    if name == "llama3":
        return base
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": FAMILIES[name]})
    template = make_chat_template(tokenizer, "<|image|>", "<|gen_image|>", chat_format=name).template
    parts = (base.image_processor, base.gen_image_processor, tokenizer, template)
    return PiscesProcessor(*parts, num_image_tokens=9, num_gen_image_tokens=4)


def cases(seed: int) -> Iterator[Case]:
    yield make_case(np.random.default_rng(seed))


def make_case(random: Generator) -> Case:
    makers = [typed_chat, typed_chat, typed_chat, malformed_chat, raw_prompt, raw_prompt]
    return makers[random.integers(len(makers))](random)


def picture() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE + 1), "red")


def _fragment(random: Generator, tokens: list[str]) -> str:
    kind = random.random()
    token = tokens[random.integers(len(tokens))]
    if kind < 0.8:
        return str(random.choice(WORDS))
    if kind < 0.85:
        return token
    cut = int(random.integers(0, len(token) + 1))
    return token[:cut] if random.random() < 0.5 else token[cut:]


def _content(random: Generator, tokens: list[str]) -> tuple[str | list, str, int]:
    """A content, the text that the template makes of it (pictures as a mark), and how many pictures it has."""
    pieces = [_fragment(random, tokens) for _ in range(random.integers(1, 5))]
    if random.random() < 0.15:
        token = tokens[random.integers(len(tokens))]  # a whole token, cut in two or three
        cuts = sorted(random.integers(0, len(token) + 1, 2).tolist())
        pieces += [token[: cuts[0]], token[cuts[0] : cuts[1]], token[cuts[1] :]]
    if random.random() < 0.4:
        return "".join(pieces), "".join(pieces), 0
    parts: list = [{"type": "text", "text": piece} if random.random() < 0.8 else piece for piece in pieces]
    texts, num_pictures = list(pieces), int(random.integers(0, 3)) if random.random() < 0.4 else 0
    for _ in range(num_pictures):
        place = int(random.integers(0, len(parts) + 1))
        parts.insert(place, {"type": "image", "image": picture()})
        texts.insert(place, "\0")
    return parts, "".join(texts), num_pictures


def typed_chat(random: Generator) -> Case:
    """Turns of any text: refused exactly if a turn's joined text holds a control token, right if read as plain text."""
    family = str(random.choice(list(FAMILIES)))
    processor = make_family(family)
    tokens = list(processor.tokenizer.added_tokens_encoder)
    rows = []
    for _ in range(random.integers(1, 4)):
        roles = ["user", "assistant"] * 3
        rows.append([(role, *_content(random, tokens)) for role in roles[: random.integers(1, 5)]])
    chats = [[{"role": role, "content": content} for role, content, _, _ in row] for row in rows]
    has_token = any(_holds_token(processor, text) for row in rows for _, _, text, _ in row)
    settings = {
        "add_generation_prompt": bool(random.random() < 0.5),
        "sanitize_control_tokens": bool(random.random() < 0.5),
        "return_assistant_tokens_mask": bool(random.random() < 0.5),
        "return_tensors": [None, "pt", "np"][random.integers(3)],
        "padding_side": str(random.choice(["left", "right"])),
    }

    def check():
        inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, **settings)
        calm = [[{**m, "content": _calm(m["content"])} for m in chat] for chat in chats]
        expected = processor.apply_chat_template(calm, tokenize=True, return_dict=True, add_generation_prompt=settings["add_generation_prompt"])  # fmt: skip
        _compare(processor, rows, inputs, expected, settings)

    name = f"chat {family} {'plain text' if settings['sanitize_control_tokens'] else 'refusing'}"
    return Case(name, check, must=has_token and not settings["sanitize_control_tokens"])


def _holds_token(processor: PiscesProcessor, text: str) -> bool:
    """As the tokenizer itself reads the joined text of a turn; added words do not exist in these tokenizers."""
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    return bool(set(ids) & set(processor.tokenizer.added_tokens_encoder.values()))


def _calm(content: str | list) -> str | list:
    if isinstance(content, str):
        return "x"
    return [part if isinstance(part, dict) and part["type"] == "image" else "x" for part in content]


def _compare(processor: PiscesProcessor, rows: list, inputs: Any, expected: Any, settings: dict) -> None:
    added = set(processor.tokenizer.added_tokens_encoder.values())
    pad = processor.tokenizer.pad_token_id
    for index, row in enumerate(rows):
        mask = np.asarray(inputs["attention_mask"][index]).astype(bool)
        ids = np.asarray(inputs["input_ids"][index])[mask].tolist()
        found = [token for token in ids if token in added and token != pad]
        wanted = [token for token in expected["input_ids"][index] if token in added]
        if found != wanted:
            raise Wrong(f"row {index}: control tokens {found}, expected {wanted}")
        text = processor.decode(ids)
        shown = {"user": "<|image|>" * 9, "assistant": "<|gen_start|>" + "<|gen_image|>" * 4 + "<|gen_end|>"}
        for role, _, words, _ in row:
            if words.replace("\0", shown[role]) not in text:
                raise Wrong(f"row {index}: {words!r} is not in {text!r}")
        if settings["return_assistant_tokens_mask"]:
            chosen = np.asarray(inputs["assistant_masks"][index]).astype(bool)[mask]
            said = processor.decode([token for token, is_said in zip(ids, chosen, strict=True) if is_said])
            turns = [words.replace("\0", shown[role]) for role, _, words, _ in row if role == "assistant"]
            if len(said) < sum(map(len, turns)) or any(words not in said for words in turns):
                raise Wrong(f"row {index}: the mask holds {said!r}, expected {turns}")
    for key, role in (("pixel_values", "user"), ("gen_pixel_values", "assistant")):
        number = sum(count for row in rows for turn, _, _, count in row if turn == role)
        if len(inputs.get(key, [])) != number:
            raise Wrong(f"{len(inputs.get(key, []))} {key} for {number} pictures")


def malformed_chat(random: Generator) -> Case:
    """A chat with one of its nodes exchanged for something else."""
    processor = make_family(str(random.choice(list(FAMILIES))))
    chat = [{"role": role, "content": _content(random, ["a word"])[0]} for role in ("user", "assistant", "user")]
    root = [[chat, [{"role": "user", "content": "a"}]], chat][random.integers(2)]
    node: Any = root
    for _ in range(random.integers(1, 5)):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[random.integers(len(keys))]
        if isinstance(node[key], (list, dict)) and random.random() < 0.6:
            node = node[key]
        else:
            node[key] = STUFF[random.integers(len(STUFF))]
            break
    extra = [{}, {"tools": [{"name": "<|pad|>"}]}, {"documents": [3]}, {"tools": 3}, {"continue_final_message": True}, {"chat_template": "{{ x.y.z }}"},
             {"processor_kwargs": 3}, {"generation_mode": "image"}, {"mood": object()}, {"return_tensors": "xx"}][random.integers(10)]  # fmt: skip
    tokenize = bool(random.random() < 0.7)

    def check():
        outputs = processor.apply_chat_template(root, tokenize=tokenize, return_dict=tokenize, **extra)
        if tokenize and "input_ids" not in outputs:
            raise Wrong("no ids")

    return Case("malformed chat", check)


def raw_prompt(random: Generator) -> Case:
    """Prompts as they are, pictures in every form, settings that may make no sense."""
    processor = make_family("llama3")
    num_rows = int(random.integers(1, 4))
    counts = [int(random.integers(0, 3)) for _ in range(num_rows)]
    texts: Any = ["words" + "<|image|> and " * count for count in counts]
    pictures: Any = [[picture() for _ in range(count)] for count in counts]
    is_right = random.random() < 0.5
    if random.random() < 0.3:
        pictures = [one for row in pictures for one in row]
    if not is_right:
        texts, pictures = _spoil(random, texts, pictures)
    odd: list[dict] = [{"padding": "x"}, {"truncation": True, "max_length": 8}, {"max_length": -1}, {"return_tensors": "xx"}, {"text_kwargs": "x"},
                       {"images_kwargs": []}, {"images_kwargs": 3}, {"truncation": "x"}, {"padding": "max_length"}, {"padding_side": "up"}, {"gen_images_kwargs": 1},
                       {"generation_mode": "image", "truncation": True, "max_length": 3}, {"size": "x"}, {"images_kwargs": {"size": 0}}, {"max_length": "x", "truncation": True}]  # fmt: skip
    settings = {"return_tensors": [None, "pt", "np"][random.integers(3)]}
    if not is_right and random.random() < 0.7:
        settings |= odd[random.integers(len(odd))]

    def check():
        outputs = processor(text=texts, images=pictures, **settings)
        if is_right:
            found = [np.asarray(row).tolist().count(processor.image_token_id) for row in outputs["input_ids"]]
            if found != [9 * count for count in counts] or len(outputs.get("pixel_values", [])) != sum(counts):
                raise Wrong(f"{found} placeholders for {counts} pictures")
            if settings["return_tensors"] == "pt" and not isinstance(outputs["input_ids"], torch.Tensor):
                raise Wrong("no tensor")

    return Case("raw prompt" if is_right else "spoiled prompt", check, must=False if is_right else None)


def _spoil(random: Generator, texts: list, pictures: list) -> tuple[Any, Any]:
    stuff = STUFF[random.integers(len(STUFF))]
    kind = random.integers(7)
    if kind == 0:
        return stuff, pictures
    if kind == 1:
        return texts, stuff
    if kind == 2:
        return [*texts, stuff], pictures
    if kind == 3:
        return texts, [*pictures, stuff]
    if kind == 4:
        return np.array(texts), pictures
    if kind == 5:
        return texts[0] + str(random.choice(["\ud800", "<|gen_image|>", "<|gen_end|>"])), pictures
    return texts, [np.zeros((1, 2, 3, 4, 5)), torch.ones(2, 3, 8, 8), {}, {"a": picture()}, iter(())][
        random.integers(5)
    ]
