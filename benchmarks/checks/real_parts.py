"""Measures of a language model under Pisces: what it writes, whether it opens images, and how near two models are.

`benchmarks.real_parts` calls them; each takes a loaded model and its processor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

import modeling_pisces  # noqa: F401  registers the Auto classes


BATCH_SIZE = 10
MAX_TOKENS = 24


def open_checkpoint(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """A checkpoint as it is stored, with or without an adapter inside, and its processor."""
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto").eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval().get_base_model()
    return model, AutoProcessor.from_pretrained(folder)


def open_gguf(name: str) -> tuple[Any, Any]:
    """The language model alone, in fp32, with its own tokenizer and chat template."""
    path = Path(name)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**source)


def _prompts(processor: Any, texts: Sequence[str], **options: Any) -> Any:
    conversations = [[{"role": "user", "content": text}] for text in texts]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding_side": "left"}},
        **options,
    )


@torch.no_grad()
def compare_text(model: Any, processor: Any, other: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """Greedy answers of two models to the same questions, one by one: share of equal answers and of equal tokens."""
    same, equal, total = 0, 0, 0
    for text in texts:
        ours = _prompts(processor, [text])["input_ids"]
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": text}]
            theirs = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )["input_ids"]
        else:
            theirs = ours
        options = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
        found = model.generate(input_ids=ours, **options)[0, ours.shape[1] :].tolist()
        expected = other.generate(input_ids=theirs, **options)[0, theirs.shape[1] :].tolist()
        same += found == expected
        equal += sum(a == b for a, b in zip(found, expected, strict=False))
        total += max(len(found), len(expected))
    return {"equal_answers": round(same / len(texts), 4), "equal_tokens": round(equal / total, 4), "n": len(texts)}


@torch.no_grad()
def text_right(model: Any, processor: Any, questions: Sequence[tuple[str, str]]) -> list[bool]:
    """Which plain questions are answered right, as the guard of the recipes judges it."""
    from finetune.guard.metrics import right_texts

    rows = [
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}
        for turns in ((("user", question), ("assistant", answer)) for question, answer in questions)
    ]
    return right_texts(model, processor, rows, BATCH_SIZE)


@torch.no_grad()
def new_token_loss(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean cross entropy, nats, of `<|gen_start|>` and of `<|gen_end|>` in rows that draw, as a trainer sees them."""
    from finetune.data.collator import PiscesDataCollator

    ids = {"gen_start": model.config.gen_start_token_id, "gen_end": model.config.gen_end_token_id}
    losses: dict[str, list[float]] = {name: [] for name in ids}
    for row in rows:
        batch = PiscesDataCollator(processor)([row])
        labels = batch.pop("labels")[0]
        scores = model(**batch).logits[0].float().log_softmax(-1)
        for name, token in ids.items():
            losses[name] += [-float(scores[place - 1, token]) for place in (labels == token).nonzero().flatten()]
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return {name: round(value, 5) for name, value in means.items()} | {"mean": round(sum(means.values()) / 2, 5)}


@torch.no_grad()
def ranks_of_start(model: Any, processor: Any, texts: Sequence[str]) -> dict[str, float]:
    """How many tokens are more likely than `<|gen_start|>` to open the answer: median, smallest and largest."""
    ranks: list[int] = []
    for start in range(0, len(texts), BATCH_SIZE):
        logits = model(**_prompts(processor, texts[start : start + BATCH_SIZE]), logits_to_keep=1).logits[:, -1]
        own = logits[:, model.config.gen_start_token_id, None]
        ranks += (logits > own).sum(-1).tolist()
    ranks.sort()
    return {"median": ranks[len(ranks) // 2], "least": ranks[0], "most": ranks[-1], "n": len(ranks)}


@torch.no_grad()
def image_openings(model: Any, processor: Any, texts: Sequence[str]) -> dict[str, int]:
    """In how many interleaved greedy answers the model opens an image by itself."""
    opened, length = 0, model.config.num_gen_image_tokens + MAX_TOKENS
    for start in range(0, len(texts), BATCH_SIZE):
        inputs = _prompts(processor, texts[start : start + BATCH_SIZE])
        found = model.generate(
            **inputs,
            generation_mode="interleaved",
            max_new_tokens=length,
            do_sample=False,
            return_dict_in_generate=True,
        )
        said = found.sequences[:, inputs["input_ids"].shape[1] :]
        opened += int((said == model.config.gen_start_token_id).any(-1).sum())
    return {"opened": opened, "n": len(texts)}


@torch.no_grad()
def gap_of_logits(first: Any, second: Any) -> float:
    """Largest difference of the logits of one random text, over rows of tokens, relative to the largest."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (1, 24), generator=generator)
    count = first.config.num_token_rows or first.config.text_config.vocab_size
    found, expected = (model(input_ids=ids).logits[..., :count].double() for model in (first, second))
    return float((found - expected).abs().max() / expected.abs().max())
