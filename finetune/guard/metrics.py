"""What the two-sided guard measures: how well a model answers one set of rows, and how well it draws another.

`finetune.guard` calls `measure_understanding`, `measure_drawing` and `measure_editing` before, during and after
training. Nothing is random: losses of a "flow" head have fixed noise in evaluation, answers are greedy, drawings are
made without noise, so that two measurements differ because the weights do. Called in evaluation mode and without
gradients.
"""

# B rows, M generated vectors per image, Dg width of a generated vector
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune.data.collator import PiscesDataCollator
from finetune.data.schema import Row, is_trained, iter_pictures
from finetune.guard.loss_totals import LossTotals


Metrics = dict[str, float]

MAX_TEXT_TOKENS = 24  # of an answer to a question without pictures: a chat model says a sentence

MAX_ANSWER_TOKENS = 16  # longer answers have no single right wording, so that their loss says more than a comparison


def measure_understanding(model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 8) -> Metrics:
    """Text loss of all rows, and how often a greedy answer is exactly the expected one, where answers are short.

    Args:
        model: a `PiscesForConditionalGeneration`, possibly with an adapter inside.
        processor: its `PiscesProcessor`.
        rows: with texts in assistant turns.

    Returns:
        "text_loss", nats per token; "exact_match", a share, over one short answer per row, lower case and without
        spaces and a full stop around it; absent if no answer is short.
    """
    metrics = {"text_loss": _losses(model, processor, rows, batch_size)["text_loss"]}
    asked = [found for index, row in enumerate(rows) if (found := _short_exchange(row, index, processor.tokenizer))]
    if asked:
        answers = _answer(model, processor, [prompt for prompt, _ in asked], [text for _, text in asked], batch_size)
        right = [_plain(said) == _plain(text) for said, (_, text) in zip(answers, asked, strict=True)]
        metrics["exact_match"] = sum(right) / len(right)
    return metrics


def answer_texts(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    batch_size: int = 8,
    max_new_tokens: int = MAX_TEXT_TOKENS,
    whole: bool = True,
) -> list[str | None]:
    """Greedy answers to the first question of each row, as a user without pictures reads them.

    Returns:
        one answer per row; with `whole`, None where the model did not end it within `max_new_tokens`.
    """
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends or [processor.tokenizer.eos_token_id])
    answers: list[str | None] = []
    for chunk in _batches([row["messages"][: next(_spoken_turns(row))] for row in rows], batch_size):
        inputs = _prepare(model, processor, chunk)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        said = output[:, inputs["input_ids"].shape[1] :].cpu()
        texts = processor.batch_decode(said, skip_special_tokens=True)
        ended = torch.isin(said, ends).any(-1).tolist()
        answers += [text if is_ended or not whole else None for text, is_ended in zip(texts, ended, strict=True)]
    return answers


def right_texts(model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 8) -> list[bool]:
    """Which questions without pictures are answered right: an expected answer stands in the greedy one as a word.

    A row's expected answer may hold several, with "|" between them. Upper and lower case count as equal, except where
    the expected answer is written in capitals.
    """
    answers = answer_texts(model, processor, rows, batch_size, whole=False)
    expected = [_text_of(row["messages"][next(_spoken_turns(row))]) for row in rows]
    return [holds_answer(said or "", text) for said, text in zip(answers, expected, strict=True)]


def holds_answer(said: str, expected: str) -> bool:
    """Whether one of the answers that "|" separates stands in what was said, as words of its own."""
    for answer in (part.strip() for part in expected.split("|")):
        pattern = rf"(?<!\w){re.escape(answer.rstrip('.'))}(?!\w)"
        is_capitals = len(answer) > 1 and answer.isupper() and answer.isalpha()
        if answer and re.search(pattern, said, 0 if is_capitals else re.IGNORECASE):
            return True
    return False


def _spoken_turns(row: Row) -> Iterator[int]:
    return (turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant" and turn)


def measure_drawing(
    model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 8
) -> tuple[Metrics, torch.Tensor]:
    """Image loss of all rows, and how close the vectors of a free drawing come to those of the row's picture.

    Args:
        model, processor: as for `measure_understanding`.
        rows: with a picture in an assistant turn; the first such picture is drawn.

    Returns:
        "image_loss" per vector; "vector_r2" = 1 - squared error / variance about the per-channel mean of the wanted
        vectors; "vector_cosine", mean over vectors. And the drawn vectors (B, M, Dg) in fp32 on the CPU.
    """
    metrics = {"image_loss": _losses(model, processor, rows, batch_size)["image_loss"]}
    exchanges = [drawing_exchange(row) for row in rows]
    drawn = draw_vectors(model, processor, [prompt for prompt, _ in exchanges], batch_size)
    wanted = encode_pictures(model, processor, [picture for _, picture in exchanges], batch_size)
    spread = (wanted - wanted.mean((0, 1))).square().mean()
    metrics["vector_r2"] = float(1 - (drawn - wanted).square().mean() / spread)
    metrics["vector_cosine"] = float(torch.nn.functional.cosine_similarity(drawn, wanted, dim=-1).mean())
    return metrics, drawn


def measure_editing(
    model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 8
) -> tuple[Metrics, torch.Tensor]:
    """As `measure_drawing`, for rows that show a picture before they draw one; and whether the edit was made at all.

    Returns:
        the metrics of `measure_drawing` and "nearer_result": the share of drawings whose vectors lie nearer to the
        wanted picture's than to those of the picture shown last, over rows whose two pictures differ; absent without
        any. And the drawn vectors.
    """
    metrics, drawn = measure_drawing(model, processor, rows, batch_size)
    exchanges = [drawing_exchange(row) for row in rows]
    shown = [[part for role, part in iter_pictures({"messages": prompt})][-1]["image"] for prompt, _ in exchanges]
    before = encode_pictures(model, processor, shown, batch_size)
    after = encode_pictures(model, processor, [picture for _, picture in exchanges], batch_size)
    far, near = ((drawn - vectors).square().sum((1, 2)) for vectors in (before, after))
    differs = (before - after).abs().amax((1, 2)) > 1e-3
    if differs.any():
        metrics["nearer_result"] = float((near < far)[differs].float().mean())
    return metrics, drawn


def measure_losses(
    model: Any, processor: Any, rows: Sequence[Row], side: str, batch_size: int = 8, config: Any = None
) -> Metrics:
    """The loss alone, for a model in shards, which can run `forward` but not `generate`.

    Args:
        model: as the trainer wraps it.
        config: the model's, where the wrapper does not have it under that name.
    """
    name = "image_loss" if side in ("drawing", "editing") else "text_loss"
    return {name: _losses(model, processor, rows, batch_size, config)[name]}


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _losses(model: Any, processor: Any, rows: Sequence[Row], batch_size: int, config: Any = None) -> dict[str, float]:
    collator, totals = PiscesDataCollator(processor), LossTotals(config or model.config, _device(model))
    for chunk in _batches(rows, batch_size):
        batch = {name: value.to(_device(model)) for name, value in collator(list(chunk)).items()}
        totals.add(model(**batch, use_cache=False, skip_logits=True), int(batch["attention_mask"].sum()))
    return totals.read()


def _text_of(message: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _short_exchange(row: Row, index: int, tokenizer: Any) -> tuple[list[dict], str] | None:
    """One question of a row with all that came before it, and the short answer; rows take turns in which one."""
    found = []
    for turn, message in enumerate(row["messages"]):
        is_text = all(part["type"] == "text" for part in message["content"])
        if is_trained(message) and turn and is_text:
            text = _text_of(message)
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= MAX_ANSWER_TOKENS:
                found.append((row["messages"][:turn], text))
    return found[index % len(found)] if found else None


def _prepare(model: Any, processor: Any, prompts: Sequence[list[dict]], **options) -> Any:
    inputs = processor.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding_side": "left"}},
        **options,
    )
    return inputs.to(_device(model))


def _answer(model: Any, processor: Any, prompts: list, expected: list[str], batch_size: int) -> list[str]:
    """Greedy answers, one token longer than the longest expected one: whoever has not ended by then is wrong."""
    lengths = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    answers: list[str] = []
    for chunk in _batches(prompts, batch_size):
        inputs = _prepare(model, processor, chunk)
        output = model.generate(**inputs, max_new_tokens=max(lengths) + 1, do_sample=False, use_cache=True)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _plain(answer: str) -> str:
    return answer.strip().lower().rstrip(".").strip()


def drawing_exchange(row: Row) -> tuple[list[dict], Any]:
    """What comes before the first picture that a row draws, and that picture."""
    for turn, message in enumerate(row["messages"]):
        for part in message["content"]:
            if message["role"] == "assistant" and part["type"] == "image":
                return row["messages"][:turn], part["image"]
    raise ValueError(f"row {row.get('id')!r} draws nothing: expected a picture in an assistant turn.")


def draw_vectors(model: Any, processor: Any, prompts: Sequence[list[dict]], batch_size: int = 8) -> torch.Tensor:
    """Draw each prompt without noise: (B, M, Dg), fp32 on the CPU."""
    options = {"image_temperature": 0.0} if model.model.gen_head.is_stochastic else {}
    drawn = []
    for chunk in _batches(prompts, batch_size):
        inputs = _prepare(model, processor, chunk, generation_mode="image")
        vectors = model.generate(**inputs, generation_mode="image", use_cache=True, **options)
        drawn.append(vectors.float().cpu())
    return torch.cat(drawn)


def encode_pictures(model: Any, processor: Any, pictures: list, batch_size: int = 32) -> torch.Tensor:
    """The generation vectors of pictures: (B, M, Dg), fp32 on the CPU."""
    encoded = []
    for chunk in _batches(pictures, batch_size):
        pixels = processor(gen_images=list(chunk), return_tensors="pt")["gen_pixel_values"].to(_device(model))
        encoded.append(model.encode_gen_images(pixels).float().cpu())
    return torch.cat(encoded)
