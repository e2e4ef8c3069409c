"""Cases for `generate` in its three modes: rows alone and in batches, options and inputs that make little sense."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from transformers import DynamicCache, GenerationConfig

from modeling_pisces.placeholders_pisces import CACHE_NAME
from tests.fuzz import rows as r
from tests.fuzz.forward import MAKERS
from tests.fuzz.outcomes import Case, Wrong


SURFACE = "generate"
MODES = ("text", "image", "interleaved")
PLACED = {r.IMAGE, r.GEN, r.START, r.END}
TOKENS = 7


def cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng([seed, 2])
    makers = [
        right_batch,
        right_batch,
        followed_up,
        odd_option,
        odd_option,
        odd_option,
        odd_input,
        odd_input,
        padded_right,
    ]
    yield makers[random.integers(len(makers))](random)


def _mode(random: Generator) -> str:
    return MODES[random.integers(3)]


def _lengths(mode: str) -> dict[str, Any]:
    return {} if mode == "image" else {"max_new_tokens": TOKENS, "do_sample": False}


def _noise(name: str, mode: str, seeds: list[int]) -> dict[str, Any]:
    """A generator for each row, where the head draws by chance."""
    if "flow" not in name or mode == "text":
        return {}
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def _answers(outputs: Any, mode: str, length: int) -> list[dict[str, torch.Tensor]]:
    """What each row got: ids behind its prompt, vectors of its pictures."""
    if mode == "text":
        return [{"ids": ids[length:]} for ids in outputs]
    if mode == "image":
        return [{"vectors": vectors} for vectors in outputs]
    found = []
    for row, ids in enumerate(outputs.sequences):
        own = None if outputs.image_vectors is None else outputs.image_vectors[outputs.image_rows == row]
        found.append({"ids": ids[length:]} | ({} if own is None or not len(own) else {"vectors": own}))
    return found


def _expect_answer(answer: dict[str, torch.Tensor], mode: str) -> None:
    """Nothing that no reader could take: ids of the vocabulary, no placeholder in text, whole and finite pictures."""
    for key, value in answer.items():
        r.expect_finite(value, key)
    ids = answer.get("ids", torch.zeros(0)).tolist()
    if any(not 0 <= token < r.VOCAB for token in ids):
        raise Wrong(f"ids {ids} outside the vocabulary")
    if mode == "text" and PLACED & set(ids):
        raise Wrong(f"text with placed tokens: {ids}")
    if mode == "interleaved":
        pictures = ids.count(r.GEN) / r.M
        given = len(answer.get("vectors", ()))
        if pictures != given or ids.count(r.END) != pictures or r.IMAGE in ids:
            raise Wrong(f"{given} pictures for ids {ids}")
    if mode == "image" and answer["vectors"].shape != (r.M, r.DG):
        raise Wrong(f"vectors of the shape {tuple(answer['vectors'].shape)}")


def _expect_same(found: dict, expected: dict, what: str) -> None:
    """Equal up to what follows the end of a shorter answer, and to near ties between tokens (none seen)."""
    if set(found) != set(expected):
        raise Wrong(f"{what}: {set(found)}, alone {set(expected)}")
    if "vectors" in found:
        r.expect_close(found["vectors"], expected["vectors"], what)
    if "ids" in found:
        one, other = found["ids"].tolist(), expected["ids"].tolist()
        short = min(len(one), len(other))
        rest = set(one[short:]) | set(other[short:])
        if one[:short] != other[:short] or not rest <= {r.PAD, r.EOT}:
            raise Wrong(f"{what}: {one}, alone {other}")


def right_batch(random: Generator) -> Case:
    """Each row of a batch gets what it gets alone, in every mode, form, cache and number of copies."""
    (name, model), mode = r.random_model(random), _mode(random)
    rows = [r.random_row(random, mode != "text" and bool(random.random() < 0.5)) for _ in range(random.integers(1, 4))]
    if mode != "text" and len({row.ids[-1] == r.START for row in rows}) > 1:
        rows = rows[:1]
    inputs = r.batch(rows, "left", has_mask=bool(random.random() < 0.6))
    length = inputs["input_ids"].shape[1]
    copies = int(random.integers(2, 4)) if random.random() < 0.2 and mode != "text" else 1
    options: dict[str, Any] = {"num_return_sequences": copies} if copies > 1 else {}
    if copies > 1 and mode == "interleaved":
        options |= {"do_sample": True, "top_k": 1}
    options |= [{}, {}, {"use_cache": False}, {"cache_implementation": "static"}, {CACHE_NAME: DynamicCache()}][
        random.integers(5)
    ]
    if mode == "image" and random.random() < 0.3:
        options["guidance_scale"] = float(random.choice([0.0, 1.0, 2.5]))
        options.pop(CACHE_NAME, None)
    seeds = random.integers(0, 99, len(rows) * copies).tolist()
    before = r.copies(inputs)

    def check():
        outputs = model.generate(
            **inputs, generation_mode=mode, **(_lengths(mode) | options), **_noise(name, mode, seeds)
        )
        r.expect_untouched(inputs, before)
        answers = _answers(outputs, mode, length)
        if len(answers) != len(rows) * copies:
            raise Wrong(f"{len(answers)} answers for {len(rows)} rows, {copies} of each")
        guidance = {key: options[key] for key in ("guidance_scale",) if key in options}
        for index, answer in enumerate(answers):
            _expect_answer(answer, mode)
            alone = r.batch([rows[index // copies]], has_mask=False)
            single = model.generate(**alone, generation_mode=mode, **_lengths(mode), **guidance, **_noise(name, mode, seeds[index : index + 1]))  # fmt: skip
            _expect_same(answer, _answers(single, mode, alone["input_ids"].shape[1])[0], f"row {index}, {mode}, {name}, {sorted(options)}")  # fmt: skip

    return Case(f"batch {mode} {name}", check, must=False)


def followed_up(random: Generator) -> Case:
    """A second turn behind the first, with its cache or without, gives the same answer."""
    (name, model), mode = r.random_model(random), str(random.choice(["text", "interleaved"]))
    row = r.random_row(random)
    inputs = r.batch([row], has_mask=bool(random.random() < 0.5))
    more = torch.from_numpy(random.integers(0, 250, (1, int(random.integers(1, 5)))))

    def check():
        seeds = [3]
        first = model.generate(**inputs, generation_mode="text", return_dict_in_generate=True, **_lengths("text"))
        whole = {**inputs, "input_ids": torch.cat([first.sequences, more], 1)}
        if (
            "attention_mask" in whole or r.PAD in first.sequences
        ):  # without a mask a <|pad|> that was written is padding
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        alone = model.generate(**whole, generation_mode=mode, **_lengths(mode), **_noise(name, mode, seeds))
        cache = {CACHE_NAME: getattr(first, CACHE_NAME)}
        after = model.generate(**whole, generation_mode=mode, **cache, **_lengths(mode), **_noise(name, mode, seeds))
        length = whole["input_ids"].shape[1]
        _expect_same(
            _answers(after, mode, length)[0], _answers(alone, mode, length)[0], f"after a cache, {mode}, {name}"
        )

    return Case(f"second turn {mode}", check, must=False)


def padded_right(random: Generator) -> Case:
    """Padding on the right, in the middle, or everywhere is refused, or changes nothing."""
    (name, model), mode = r.random_model(random), _mode(random)
    rows = [r.random_row(random) for _ in range(2)]
    kind = str(random.choice(["right", "zero", "mixed"]))
    inputs = r.batch(rows, "left" if kind == "zero" else "right")
    if kind == "zero":
        inputs["attention_mask"][random.integers(2)] = 0
    if kind == "mixed":
        inputs["attention_mask"] = inputs["attention_mask"].flip(0)
    is_padded = not bool(inputs["attention_mask"].all())

    def check():
        outputs = model.generate(**inputs, generation_mode=mode, **_lengths(mode), **_noise(name, mode, [1, 2]))
        answers = _answers(outputs, mode, inputs["input_ids"].shape[1])
        for index, answer in enumerate(answers if kind != "mixed" or not is_padded else ()):
            alone = r.batch([rows[index]], has_mask=False)
            single = model.generate(**alone, generation_mode=mode, **_lengths(mode), **_noise(name, mode, [index + 1]))
            _expect_same(
                answer, _answers(single, mode, alone["input_ids"].shape[1])[0], f"row {index}, {kind}, {mode}"
            )

    return Case(f"padded {kind} {mode}", check, must=True if kind == "zero" else None)


VALUES: tuple[Any, ...] = (-1, 0, 1, 2, 3, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e30, float("nan"), float("inf"), -float("inf"), True, False, "x", "", b"x", [], [1], [[1]],
          (), {}, {"a": 1}, object(), torch.tensor(1), torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), np.float32(0.5), np.int64(2), lambda *a: None)  # fmt: skip
OPTIONS = (
    "max_new_tokens max_length min_new_tokens min_length temperature top_k top_p min_p typical_p repetition_penalty no_repeat_ngram_size do_sample num_return_sequences num_beams "
    "eos_token_id pad_token_id bos_token_id bad_words_ids suppress_tokens begin_suppress_tokens forced_eos_token_id sequence_bias stopping_criteria logits_processor max_time "
    "use_cache cache_implementation cache_config generation_config generator image_temperature num_flow_steps guidance_scale negative_prompt_ids negative_prompt_attention_mask "
    "streamer output_scores output_logits return_dict_in_generate generation_mode attention_mask inputs_embeds pixel_values gen_image_vectors mm_encoder_outputs position_ids "
    "past_key_values cache renormalize_logits exponential_decay_length_penalty length_penalty early_stopping prefill_chunk_size stop_strings tokenizer assistant_model "
    "prompt_lookup_num_tokens custom_generate prefix_allowed_tokens_fn watermarking_config epsilon_cutoff eta_cutoff encoder_repetition_penalty remove_invalid_values token_healing "
    "labels logits_to_keep an_unknown_option output_hidden_states output_attentions compile_config disable_compile synced_gpus max_cache_len trust_remote_code"
).split()  # fmt: skip


def odd_option(random: Generator) -> Case:
    """A prompt of text with an option whose value makes little sense; an answer has to be one, at least."""
    (_name, model), mode = r.random_model(random), _mode(random)
    ids = torch.from_numpy(random.integers(0, 250, (int(random.integers(1, 3)), 4)))
    key, value = OPTIONS[random.integers(len(OPTIONS))], VALUES[random.integers(len(VALUES))]
    options = {"input_ids": ids, "generation_mode": mode, **_lengths(mode)}
    if random.random() < 0.3:
        options["do_sample"] = True
    if random.random() < 0.15 and key not in ("generation_config", "streamer", "generation_mode"):
        config = GenerationConfig()
        setattr(config, key, value)
        options |= {"generation_config": config}
    else:
        options[key] = value
    is_long = key.startswith(("max_", "min_")) and isinstance(value, int) and value > 100

    def check():
        if is_long and key in ("max_new_tokens", "max_length", "num_return_sequences"):
            return  # means what it says: for ever
        outputs = model.generate(**options)
        if isinstance(outputs, torch.Tensor):
            r.expect_finite(outputs, f"{key}={value!r:.40}, {mode}")
            if not outputs.is_floating_point() and not torch.equal(outputs[: len(ids), :4][0], ids[0]):
                raise Wrong("the prompt is not at the start of the answer")

    return Case(f"option {key}", check)


def odd_input(random: Generator) -> Case:
    """One input of a right batch exchanged for something else."""
    (name, model), mode = r.random_model(random), _mode(random)
    inputs: dict[str, Any] = r.batch([r.random_row(random) for _ in range(random.integers(1, 3))])
    if random.random() < 0.2:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if random.random() < 0.2 and mode != "image":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "gen_pixel_values" in inputs and random.random() < 0.5:
        inputs["gen_image_vectors"] = model.encode_gen_images(inputs.pop("gen_pixel_values"))
    key = list(inputs)[random.integers(len(inputs))]
    odd = r.spoil(random, *MAKERS[key], value=inputs[key])
    spoiled = {**inputs, key: odd.value}
    before = r.copies(spoiled)
    is_other_batch = (
        key in ("input_ids", "inputs_embeds") and odd.name[-6:] in ("axis 0", "axis 1") and odd.name[0] in "ls"
    )
    must = None if is_other_batch else odd.must
    is_tie = odd.name in ("half", "bfloat16", "float64")

    def check():
        def ask(given):
            outputs = model.generate(**given, generation_mode=mode, **_lengths(mode), **_noise(name, mode, [1, 2][: len(inputs["attention_mask"])]))  # fmt: skip
            return _answers(outputs, mode, given["input_ids"].shape[1] if "input_ids" in given else 0)

        found = ask(spoiled)
        r.expect_untouched(spoiled, before)
        for answer in found:
            for what, value in answer.items():
                r.expect_finite(value, what)
        if odd.is_same and not is_tie:
            for index, (one, other) in enumerate(zip(found, ask(inputs), strict=True)):
                _expect_same(one, other, f"row {index}: {key} {odd.name}, {mode}")

    return Case(f"{key} {odd.name.split()[0]} {mode}", check, must=must)
