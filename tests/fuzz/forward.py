"""Cases for `forward` of the model and its methods that encode: right batches, caches, packed rows, spoiled tensors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers import DynamicCache

from modeling_pisces.placeholders_pisces import CACHE_NAME
from tests.fuzz import rows as r
from tests.fuzz.outcomes import Case, Wrong


SURFACE = "forward"


def cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng([seed, 1])
    makers = [
        right_batch,
        right_batch,
        cached,
        packed,
        spoiled_input,
        spoiled_input,
        spoiled_input,
        spoiled_setting,
        method,
    ]
    yield makers[random.integers(len(makers))](random)


def _rows(random: Generator) -> list[r.Row]:
    return [r.random_row(random) for _ in range(random.integers(1, 4))]


def _labels(random: Generator, inputs: dict) -> torch.Tensor:
    """Some positions of each kind; padding has none, and no row's first token, which padding would predict."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    keep = torch.from_numpy(random.random(ids.shape) < 0.7) & real & torch.nn.functional.pad(real[:, :-1], (1, 0))
    return ids.masked_fill(~keep, -100)


def _with_other_forms(random: Generator, model, inputs: dict) -> dict:
    """The same inputs, given in another of the ways that `forward` takes."""
    inputs = dict(inputs)
    with torch.no_grad():
        if "pixel_values" in inputs and random.random() < 0.5:
            pixels = inputs.pop("pixel_values")
            if random.random() < 0.5:
                inputs["image_features"] = model.encode_images(pixels)
            else:
                inputs["mm_encoder_outputs"] = {"image": model.get_image_features(pixels)}
        if "gen_pixel_values" in inputs and random.random() < 0.5:
            inputs["gen_image_vectors"] = model.encode_gen_images(inputs.pop("gen_pixel_values"))
        if random.random() < 0.3:
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        if random.random() < 0.3:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        kinds = [torch.long, torch.bool, torch.int32, torch.float32]
        inputs["attention_mask"] = mask.to(kinds[random.integers(len(kinds))])
    if random.random() < 0.3:
        inputs["use_cache"] = bool(random.random() < 0.5)
    return inputs


def _real(rows: list[r.Row], side: str, length: int) -> list[slice]:
    return [slice(length - len(row.ids), length) if side == "left" else slice(len(row.ids)) for row in rows]


def right_batch(random: Generator) -> Case:
    """A batch gives each row's logits, and the sum of the rows' losses, in whatever form its inputs came."""
    name, model = r.random_model(random)
    rows, side = _rows(random), str(random.choice(["left", "right"]))
    plain = r.batch(rows, side, has_mask=bool(random.random() < 0.6))
    labels = _labels(random, plain) if random.random() < 0.5 else None
    inputs = _with_other_forms(random, model, plain)
    if labels is not None:
        inputs["labels"] = labels.int() if random.random() < 0.2 else labels
    keep = int(random.integers(0, 5)) if random.random() < 0.2 else 0
    before = r.copies(inputs)

    @torch.no_grad()
    def check():
        together = model(**inputs, logits_to_keep=keep)
        r.expect_untouched(inputs, before)
        length = plain["input_ids"].shape[1]
        sums = {"text_loss_sum": 0.0, "image_loss_sum": 0.0}
        for index, place in enumerate(_real(rows, side, length)):
            own = {"labels": labels[index : index + 1, place]} if labels is not None else {}
            alone = model(**r.batch([rows[index]], has_mask=False), **own)
            if not keep:
                r.expect_close(together.logits[index, place], alone.logits[0], f"row {index}, {name}")
            elif side == "left":
                few = min(keep, len(rows[index].ids))
                r.expect_close(together.logits[index, -few:], alone.logits[0, -few:], f"row {index}, {name}, kept")
            for loss in sums if labels is not None else ():
                value = getattr(alone, loss)
                sums[loss] += 0.0 if value is None else float(value)
        if labels is not None and "flow" not in name:  # whose noise depends on the place in the batch
            found = [float(getattr(together, loss) or 0.0) for loss in sums]
            if not np.allclose(found, list(sums.values()), rtol=1e-3, atol=1e-2):
                raise Wrong(f"losses {found}, the rows' own {list(sums.values())}")

    return Case(f"batch {side} {name}", check, must=False)


def cached(random: Generator) -> Case:
    """The second part of a batch after the first, through a cache, gives what the whole gives."""
    name, model = r.random_model(random)
    rows = _rows(random)
    whole = r.batch(rows, "left", has_mask=True)
    ids, mask = whole["input_ids"], whole["attention_mask"]
    cut = int(random.integers(1, max(ids.shape[1], 2)))
    if cut == ids.shape[1]:
        return right_batch(random)
    pictures = {"pixel_values": (r.IMAGE, r.N, [row.shown for row in rows]), "gen_pixel_values": (r.GEN, r.M, [row.drawn for row in rows])}  # fmt: skip
    parts: list[dict[str, Any]] = [{}, {}]
    is_torn = False
    for key, (token, number, images) in pictures.items():
        counts = [(ids[:, :cut] == token).sum(-1).tolist(), (ids[:, cut:] == token).sum(-1).tolist()]
        is_torn |= any(count % number for count in counts[0])
        for part, places in ((0, [slice(0, count // number) for count in counts[0]]), (1, [slice(count // number, None) for count in counts[0]])):  # fmt: skip
            given = torch.cat([image[place] for image, place in zip(images, places, strict=True)])
            if len(given):
                parts[part][key] = given

    @torch.no_grad()
    def check():
        expected = model(**whole)
        cache = DynamicCache() if random.random() < 0.5 else None
        first = model(
            input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True, **{CACHE_NAME: cache}, **parts[0]
        )
        second = model(
            input_ids=ids[:, cut:], attention_mask=mask, **{CACHE_NAME: getattr(first, CACHE_NAME)}, **parts[1]
        )
        for index, place in enumerate(_real(rows, "left", ids.shape[1])):
            start = max(cut, place.start)
            r.expect_close(
                second.logits[index, start - cut :],
                expected.logits[index, start:],
                f"row {index}, {name}, after a cache",
            )

    return Case(f"cache {name}", check, must=is_torn)


def packed(random: Generator) -> Case:
    """Samples one behind the other in a row are what they are alone, or the inputs let them meet and are refused."""
    name, model = r.random_model(random)
    rows = [r.random_row(random) for _ in range(random.integers(2, 4))]
    inputs = r.batch([r.Row([token for row in rows for token in row.ids], torch.cat([row.shown for row in rows]), torch.cat([row.drawn for row in rows]))], has_mask=False)  # fmt: skip
    inputs["position_ids"] = torch.tensor([[place for row in rows for place in range(len(row.ids))]])
    inputs["position_ids"] = inputs["position_ids"].to([torch.long, torch.int32][random.integers(2)])
    meeting: list[dict[str, Any]] = [{"attention_mask": torch.ones_like(inputs["input_ids"])}, {"use_cache": True},
               {CACHE_NAME: DynamicCache()}, {"past_key_values": DynamicCache()}, {"attention_mask": torch.ones_like(inputs["input_ids"]).bool()}]  # fmt: skip
    is_meeting = bool(random.random() < 0.4)
    inputs |= meeting[random.integers(len(meeting))] if is_meeting else {}

    @torch.no_grad()
    def check():
        logits, start = model(**inputs).logits[0], 0
        for index, row in enumerate(rows):
            alone = model(**r.batch([row], has_mask=False)).logits[0]
            r.expect_close(logits[start : start + len(row.ids)], alone, f"sample {index}, {name}")
            start += len(row.ids)

    return Case(f"packed {name}", check, must=is_meeting)


MAKERS: dict[str, tuple] = {
    "input_ids": (r.other_types, r.other_layouts, r.other_ids, r.other_shapes),
    "inputs_embeds": (r.other_types, r.other_layouts, r.other_floats, r.other_shapes),
    "attention_mask": (r.other_types, r.other_layouts, r.other_masks, r.other_shapes),
    "pixel_values": (r.other_types, r.other_layouts, r.other_floats, r.other_shapes),
    "gen_pixel_values": (r.other_types, r.other_layouts, r.other_floats, r.other_shapes),
    "image_features": (r.other_types, r.other_layouts, r.other_floats, r.other_shapes),
    "gen_image_vectors": (r.other_types, r.other_layouts, r.other_floats, r.other_shapes),
    "labels": (r.other_types, r.other_layouts, r.other_ids, r.other_shapes),
    "position_ids": (r.other_types, r.other_layouts, r.other_positions, r.other_shapes),
}


def spoiled_input(random: Generator) -> Case:
    """One input of a right batch exchanged for something else."""
    name, model = r.random_model(random)
    inputs = _with_other_forms(random, model, r.batch(_rows(random), "left"))
    if "input_ids" in inputs and random.random() < 0.5:
        inputs["labels"] = _labels(random, inputs)
    chosen = [key for key in inputs if key in MAKERS]
    key = chosen[random.integers(len(chosen))]
    odd = r.spoil(random, *MAKERS[key], value=inputs[key])
    is_fine = key == "labels" and odd.name == "id -100"
    if key in ("input_ids", "inputs_embeds") and odd.name[-6:] in ("axis 0", "axis 1") and odd.name[0] in "ls":
        is_fine = True  # without a mask, more rows or tokens are another batch
    spoiled = {**inputs, key: odd.value}
    before = r.copies(spoiled)

    @torch.no_grad()
    def check():
        found = model(**spoiled)
        r.expect_untouched(spoiled, before)
        r.expect_finite(found.logits, f"logits with {key} {odd.name}, {name}")
        if odd.is_same:
            real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
            r.expect_close(found.logits[real], model(**inputs).logits[real], f"{key} {odd.name}, {name}")

    return Case(f"{key} {odd.name.split()[0]}", check, must=None if is_fine else odd.must)


SETTINGS: list[tuple[str, Any, bool | None]] = [
    *(("logits_to_keep", value, True) for value in (-1, "x", 2.5, [0, 1], torch.tensor([99]), torch.tensor([0.5]), torch.tensor([[0]]), torch.tensor([-99]), -(10**9), b"", object())),
    *(("logits_to_keep", value, None) for value in (10**9, True, None, torch.tensor([0]), torch.tensor([True]))),
    *((CACHE_NAME, value, True) for value in ("x", 3, [1], {"a": 1}, object(), torch.ones(2, 2))),
    *((CACHE_NAME, value, None) for value in ((), [], {}, False)),
    *(("mm_encoder_outputs", value, True) for value in ("x", 3, [1], {"image": 3}, {"image": "x"}, {"image": torch.ones(1, r.N, r.D)}, object())),
    *(("mm_encoder_outputs", value, None) for value in ({}, [], {"image": None}, {"audio": 1})),
    *(("position_ids", value, True) for value in ("x", 3, [[0, 1]], {}, object())),
    *(("use_cache", value, None) for value in ("yes", 3, [], object())),
    *(("labels", value, True) for value in ("x", 3, [[1]], {}, object())),
    *(("shift_labels", value, True) for value in ("x", 3, [[1]], torch.tensor([[1]]), object())),
    *(("skip_logits", value, None) for value in ("x", 0, 1)),
    *(("gen_image_vectors", value, True) for value in ("x", [], torch.zeros(1, r.M, r.DG), 3)),
    *(("pixel_values", value, True) for value in ("x", [], torch.zeros(1, 3, r.SIDE, r.SIDE), 3, torch.zeros(3, r.SIDE, r.SIDE))),
    *(("attention_mask", value, True) for value in ("x", [], 3, torch.ones(1), torch.ones(1, 1, 1, 1, 1), torch.ones(7, 1, 3, 3), object())),
    *(("output_hidden_states", value, None) for value in (True, "x")),
    *(("output_attentions", value, None) for value in (True, "x")),
    *(("return_dict", value, None) for value in (False, None, "x")),
]  # fmt: skip


def spoiled_setting(random: Generator) -> Case:
    """A row of text with one more argument that makes little sense."""
    _, model = r.random_model(random)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(random.integers(0, 250, (2, 5)))}
    key, value, must = SETTINGS[random.integers(len(SETTINGS))]

    @torch.no_grad()
    def check():
        found = model(**inputs, **{key: value})
        logits = found[0] if isinstance(found, tuple) else found.logits
        if logits is not None:
            r.expect_finite(logits, f"logits with {key} {value!r:.40}")
            if key not in ("logits_to_keep",) and isinstance(found, dict):
                r.expect_close(logits, model(**inputs).logits, f"{key} {value!r:.40}")

    return Case(f"setting {key}", check, must=must)


def method(random: Generator) -> Case:
    """The methods that turn pictures into vectors and vectors into embeddings, with one tensor spoiled."""
    _, model = r.random_model(random)
    calls = {
        "encode_images": (model.encode_images, r.pixels(random, 2, r.SIDE)),
        "get_image_features": (lambda x: model.get_image_features(x).pooler_output, r.pixels(random, 2, r.SIDE)),
        "encode_gen_images": (model.encode_gen_images, r.pixels(random, 2, r.GEN_SIDE)),
        "embed_gen_vectors": (model.model.embed_gen_vectors, torch.from_numpy(random.standard_normal((2, r.M, r.DG), dtype=np.float32))),
    }  # fmt: skip
    key = str(random.choice(list(calls)))
    call, value = calls[key]
    odd = r.spoil(random, r.other_types, r.other_layouts, r.other_floats, r.other_shapes, value=value)
    if odd.name in ("longer axis 0", "shorter axis 0") or (key == "embed_gen_vectors" and odd.name in ("one axis more", "no axis 0", "no axis 1", "longer axis 1", "shorter axis 1")):  # fmt: skip
        odd = r.Spoiled("as it is", value, False, True)

    @torch.no_grad()
    def check():
        found = call(odd.value)
        r.expect_finite(found, f"{key} of {odd.name}")
        if odd.is_same:
            alone = torch.cat([call(value[index : index + 1]) for index in range(2)])
            r.expect_close(found, alone, f"{key} of {odd.name}")

    return Case(f"{key}", check, must=odd.must)
