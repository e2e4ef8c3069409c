"""Questions about pictures, asked of a loaded model in batches."""

from typing import Any

import torch
from PIL import Image


DEFAULT_ANSWER_LENGTH = 128  # tokens
DEFAULT_QUESTION = "Describe the picture."


@torch.no_grad()
def answer_questions(
    model: Any, processor: Any, pairs: list[tuple[Image.Image, str]], max_new_tokens: int | None = None
) -> list[str]:
    """Ask one question about each picture, greedily and in one batch; return the words of the answers.

    Without `max_new_tokens` the checkpoint's own longest answer holds, or 128 tokens where it names none.
    """
    if max_new_tokens is None:
        max_new_tokens = model.generation_config.max_new_tokens or DEFAULT_ANSWER_LENGTH
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in pairs
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding_side="left",
    ).to(model.device, dtype=model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
