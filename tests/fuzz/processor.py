"""Cases for `PiscesProcessor`: conversations with typed control tokens, malformed ones, raw prompts, odd settings."""

import base64
import dataclasses
import functools
import io
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
    makers = [
        typed_chat,
        typed_chat,
        typed_chat,
        malformed_chat,
        raw_prompt,
        raw_prompt,
        same_rows,
        same_rows,
        odd_part,
        odd_text,
        decoded,
    ]
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


# ---- the same thing said in several ways ----------------------------------------------------------------------------


@dataclasses.dataclass
class Message:
    role: str
    content: Any


class Chat:
    def __init__(self, messages: list):
        self.messages = messages


def _noisy(random: Generator) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (*random.integers(5, 30, 2).tolist(), 3), dtype=np.uint8))


def _form(random: Generator, image: Image.Image) -> Any:
    """One picture as a user may have it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    forms = [image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), data, f"data:image/png;base64,{base64.b64encode(data).decode()}",
             np.asarray(image).astype(np.float32) / 255]  # fmt: skip
    return forms[random.integers(len(forms))]


def same_rows(random: Generator) -> Case:
    """Messages as dicts or objects, pictures in any form, alone or in a batch, as template and call or in one: all equal."""
    processor = make_family(str(random.choice(list(FAMILIES))))
    pictures = [[_noisy(random) for _ in range(random.integers(0, 3))] for _ in range(random.integers(1, 4))]
    words = [str(random.choice(WORDS)) for _ in pictures]
    drawn = [_noisy(random) if random.random() < 0.3 else None for _ in pictures]

    def chat(
        row: int, form=lambda image: image, message=lambda role, content: {"role": role, "content": content}
    ) -> list:
        content: list = [{"type": "image", "image": form(image)} for image in pictures[row]]
        turns = [message("user", [*content, {"type": "text", "text": words[row]}])]
        if drawn[row] is not None:
            turns.append(message("assistant", [{"type": "image", "image": form(drawn[row])}]))
        return turns

    settings = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": bool(random.random() < 0.5),
    }
    side, kind = str(random.choice(["left", "right"])), random.integers(4)

    def check():
        plain = [chat(row) for row in range(len(pictures))]
        together = processor.apply_chat_template(plain, **settings, padding_side=side)
        singles = [processor.apply_chat_template(one, **settings) for one in plain]
        for row, single in enumerate(singles):
            real = together["attention_mask"][row].bool()
            if together["input_ids"][row][real].tolist() != single["input_ids"][0].tolist():
                raise Wrong(f"row {row} is not what it is alone")
        for key in ("pixel_values", "gen_pixel_values"):
            own = [single[key] for single in singles if key in single]
            if (key in together) != bool(own) or (own and not torch.equal(together[key], torch.cat(own))):
                raise Wrong(f"{key} are not those of the rows alone")
        if kind == 0:
            other = processor.apply_chat_template([chat(row, lambda image: _form(random, image)) for row in range(len(pictures))], **settings, padding_side=side)  # fmt: skip
        elif kind == 1:
            other = processor.apply_chat_template([Chat(chat(row, message=Message)) for row in range(len(pictures))], **settings, padding_side=side)  # fmt: skip
        elif kind == 2:
            texts = processor.apply_chat_template(plain, add_generation_prompt=settings["add_generation_prompt"])
            images = [list(row) for row in pictures]
            gen_images = [[image] if image is not None else [] for image in drawn]
            other = processor(text=texts, images=images if any(images) else None, gen_images=gen_images if any(gen_images) else None, return_tensors="pt", padding_side=side)  # fmt: skip
        else:
            other = processor.apply_chat_template(plain, **settings, padding_side=side, sanitize_control_tokens=True)
        for key, value in together.items():
            close = torch.allclose(value.float(), other[key].float(), atol=1e-5) if key in other and value.shape == other[key].shape else False  # fmt: skip
            if not close:
                raise Wrong(f"{key} differs said in way {kind}")

    return Case(f"same rows {kind}", check, must=False)


def odd_part(random: Generator) -> Case:
    """A picture, or vectors of one, that is none, in a part of a message: refused, and named by row."""
    processor = make_family("llama3")
    vectors = torch.from_numpy(random.standard_normal((4, 12), dtype=np.float32))
    poisoned = vectors.clone()
    poisoned[1, 2] = float(random.choice([np.nan, np.inf]))
    bad = ["x", 3, [], [1, 2], {}, b"", object(), vectors[:3], vectors[0], vectors.T, poisoned, vectors.long(), vectors.to(torch.complex64), vectors.to_sparse(), vectors.to("meta"),
           np.array(["a"]), np.array([None]), vectors.bool()]  # fmt: skip
    good = [vectors, vectors.numpy(), vectors.double(), vectors.half(), vectors.tolist()]
    is_good = bool(random.random() < 0.3)
    value = good[random.integers(len(good))] if is_good else bad[random.integers(len(bad))]
    kind = str(random.choice(["image_vectors", "gen_image_vectors"]))

    def check():
        if kind == "image_vectors":
            chat = [
                {"role": "user", "content": "draw"},
                {"role": "assistant", "content": [{"type": "image", "image_vectors": value}]},
            ]
            outputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        else:
            outputs = processor(text="a <|gen_image|>", gen_image_vectors=[value], return_tensors="pt")
        found = outputs["gen_image_vectors"]
        if found.shape != (1, 4, 12) or not torch.isfinite(found).all() or not found.is_floating_point():
            raise Wrong(f"vectors {found.dtype} {tuple(found.shape)}")
        if not torch.allclose(found[0].float(), vectors, atol=1e-2):
            raise Wrong("other vectors")

    is_list = isinstance(value, list) and is_good
    return Case(kind, check, must=None if is_list else not is_good)


def odd_text(random: Generator) -> Case:
    """Texts of unusual kind and size."""
    processor = make_family("llama3")
    base = str(random.choice(WORDS)) or "x"
    long = (base * (200_000 // max(len(base), 1))) or "x"
    texts: list[tuple[Any, bool | None]] = [
        (np.str_("word"), None), ([np.str_("word")], None), (np.array(["a", "b"]), None), (torch.tensor([1]), True), (b"bytes", True), ((base, base), None), ({"text": "a"}, True), (3, True), ([], True),
        ([[]], True), ([["a"]], True), ([None], True), ("", None), ("\0", False), ("\ufeff", False), ("a" * 131_000, False), ("a" * 140_000, True), (iter(["a"]), None), ({"a"}, None),
        ("\U0010ffff" * 50, False), ("e\u0301" * 1000, False), ("\u202e abc", False), ("\r\n" * 100, False), (long, None), ("<|" * 20_000, False), ("<|image" * 5000, False), ("\ud800", True),
    ]  # fmt: skip
    text, must = texts[random.integers(len(texts))]

    def check():
        outputs = processor(text=text)
        given = [text] if isinstance(text, str) else list(text)
        for row, ids in zip(given, outputs["input_ids"], strict=True):
            if processor.decode(ids, skip_special_tokens=True) != str(row):
                raise Wrong("the ids decode to another text")

    return Case("odd text", check, must)


def decoded(random: Generator) -> Case:
    """What `generate` cannot have returned, handed to what reads its outputs."""
    processor = make_family("llama3")
    values: list[Any] = [[1, 2], [-1], [-100, 5], [10**9], [2**70], [1.5], ["a"], None, 3, -1, "text", b"x", [[1, 2], [3]], [[-100]], [None], torch.tensor([1, 2]), torch.tensor([[1, 2]]), torch.tensor([[-100, 3]]),
                         torch.tensor([0.5]), torch.zeros(1, 4, 12), torch.zeros(0), torch.zeros(2, 0, dtype=torch.long), np.array([1, 2]), np.array([[300]]), {"a": 1}, object(), [], [[]], torch.tensor(3)]  # fmt: skip
    value = values[random.integers(len(values))]
    calls = {
        "decode": lambda: processor.decode(value),
        "batch_decode": lambda: processor.batch_decode(value),
        "post_process_image_text_to_text": lambda: processor.post_process_image_text_to_text(value),
        "post_process_multimodal_output": lambda: processor.post_process_multimodal_output(
            value, generation_mode=[None, "text", "image", "interleaved", "x", 3][random.integers(6)]
        ),
        "find_control_tokens": lambda: processor.find_control_tokens(value),
    }
    name = str(random.choice(list(calls)))
    return Case(name, calls[name])
