"""A Pisces checkpoint as a judge and a writer: agreement of words and picture, yes or no, captions, vectors.

Loaded once per process, on one thread: a worker process each, and the same sums whatever their number.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from modeling_pisces.checkpoint.loading import load_model, quiet_libraries


REQUEST = "describe the picture in detail."
GREY = (128, 128, 128)
OTHERS = (1, 3, 7)  # places from a picture to those that it is compared with


class PiscesJudge:
    """Scores and words of one checkpoint. B rows, T tokens, V vocabulary."""

    def __init__(self, checkpoint: str):
        torch.set_num_threads(1)
        with quiet_libraries():
            self.model, self.processor = load_model(Path(checkpoint))

    @torch.no_grad()
    def agreement(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """How much more likely each text is beside its picture than beside a grey one and three others of the list.

        Style and length are as likely beside any picture, so that only what the picture decides is left.

        Returns:
            per pair, the mean difference of log-probability over the tokens of the text, nats; about 0 for a text that
            has nothing to do with its picture.
        """
        seen, is_text = self._log_probabilities(images, texts)
        others = [[Image.new("RGB", image.size, GREY) for image in images]]
        others += [[*images[shift:], *images[:shift]] for shift in OTHERS if shift < len(images)]
        blind = torch.stack([self._log_probabilities(other, texts)[0] for other in others])
        # the grey picture weighs as much as all the others: one of those may happen to fit
        reference = (blind[0] + blind[1:].mean(0)) / 2 if len(blind) > 1 else blind[0]
        difference = (seen - reference).masked_fill(~is_text, 0.0).sum(1) / is_text.sum(1).clamp(min=1)
        return [round(float(value), 4) for value in difference]

    def _log_probabilities(self, images, texts) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T - 1) log-probability of each next token, and whether it belongs to the text."""
        rows = [_conversation(image, REQUEST, text) for image, text in zip(images, texts, strict=True)]
        inputs = self._inputs(rows, return_assistant_tokens_mask=True)
        labels = inputs.pop("assistant_masks").bool()[:, 1:]
        logits = self.model(**inputs).logits[:, :-1].float()
        chosen = inputs["input_ids"][:, 1:, None]
        return logits.log_softmax(-1).gather(-1, chosen)[..., 0], labels

    def _inputs(self, rows: list, **options: Any) -> dict[str, Any]:
        inputs = self.processor.apply_chat_template(
            rows,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **options,
        )
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    @torch.no_grad()
    def answer(self, images: Sequence[Image.Image], request: str, max_new_tokens: int) -> list[tuple[str, bool]]:
        """The model's own words about each picture, greedy, and whether they were cut at the limit of tokens."""
        rows = [_conversation(image, request) for image in images]
        inputs = self._inputs(rows, add_generation_prompt=True)
        found = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = found[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=new.device)
        has_ended = torch.isin(new, ends).any(1).tolist()
        return [(text.strip(), not ended) for text, ended in zip(texts, has_ended, strict=True)]

    @torch.no_grad()
    def yes(self, images: Sequence[Image.Image], question: str) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer."""
        inputs = self._inputs([_conversation(image, question) for image in images], add_generation_prompt=True)
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        tokenizer = self.processor.tokenizer
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
        return [round(float(value), 4) for value in logits[:, ids].softmax(-1)[:, 0]]

    @torch.no_grad()
    def vectors(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, D): means of the understanding tower's patches."""
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        hidden = self.model.model.vision_tower(pixels.to(self.model.device, self.model.dtype)).last_hidden_state
        return hidden.float().mean(1).cpu()


def _conversation(image: Image.Image, request: str, answer: str | None = None) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": request}]
    asked = [{"role": "user", "content": parts}]
    told = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return asked + told


@lru_cache(maxsize=1)
def load_judge(checkpoint: str) -> PiscesJudge:
    return PiscesJudge(checkpoint)


@lru_cache(maxsize=4)
def digest_of(checkpoint: str) -> str:
    """A digest of the files of a checkpoint folder that decide what it says."""
    found = hashlib.sha256()
    for path in sorted(Path(checkpoint).rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model"):
            found.update(path.relative_to(checkpoint).as_posix().encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
    return found.hexdigest()[:16]
