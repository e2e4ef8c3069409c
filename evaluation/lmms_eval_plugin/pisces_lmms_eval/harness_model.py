"""The class that lmms-eval builds for `--model pisces`: it turns requests into questions and hands back the answers.

Written against lmms-eval 0.7.3. Loading is left to `modeling_pisces`, asking and keeping to `answers`.
"""

import os
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from modeling_pisces.checkpoint.files import check_checkpoint
from modeling_pisces.checkpoint.loading import choose_device, load_model

from .answers import Answerer, Messages, Question


class Pisces(lmms):
    """Any Pisces checkpoint, answering in words about any number of pictures."""

    is_simple = False  # requests bring conversations, not a text and pictures apart

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        answers: str | None = None,
        adapters: str = "",
        shard: str = "1/1",
        trust_remote_code: bool = False,
    ) -> None:
        """Check a checkpoint; it is loaded with its first question.

        Args:
            pretrained: checkpoint folder or Hub id.
            device: "cpu", "cuda", "mps"; default: the best there is.
            dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
            batch_size: questions at a time.
            max_batch_size: lmms-eval passes it to every model; not used.
            answers: folder of answers, of this checkpoint alone; what is in it is not asked again.
            adapters: folders or Hub ids of trained adapters, with the system's path separator between them.
            shard: "i/n" fills that folder with the i-th of n parts of the answers and ends the process without a
                score. A run without a shard, over the same folder, then scores.

        Raises:
            ValueError: the checkpoint cannot be used, the batch size is not a number, several processes under
                torchrun, or a shard without a folder.
        """
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size {batch_size!r}: expected a number from 1.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("pisces does not run under torchrun. Start one process for each shard=i/n instead.")
        self.is_part = shard != "1/1"
        if self.is_part and not answers:
            raise ValueError(f"shard={shard} without answers=FOLDER: the parts meet in that folder. Name one.")
        folder, found = find_model(pretrained, [name for name in adapters.split(os.pathsep) if name], revision)
        check_checkpoint(folder)
        self.device = choose_device(device or "auto")
        number, total = map(int, shard.split("/"))
        if not 1 <= number <= total:
            raise ValueError(f"shard={shard}: expected i/n with i from 1 to n.")

        def load() -> tuple[Any, Any]:
            model, processor = load_model(folder, self.device.type, dtype, trust_remote_code)
            attach_adapters(found, model)
            return model, processor

        self.answerer = Answerer(
            load,
            int(batch_size),
            Path(answers) if answers else None,
            (number, total),
        )

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to lmms-eval's requests, in their order; of a shard, the end of the process."""
        answers = self.answerer.answer([self._read_request(request) for request in requests])
        if self.is_part:
            raise SystemExit(0)  # lmms-eval passes it through; it would score the missing answers as wrong
        return answers

    def _read_request(self, request: Any) -> Question:
        text, doc_to_messages, settings, doc_id, task, split = request.args
        name = f"{task} {split} {doc_id}"
        return Question(
            name, text, settings, lambda: to_pisces(doc_to_messages(self.task_dict[task][split][doc_id]), name)
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{requests[0].task_name} compares likelihoods, and pisces answers in words. Choose the form of the task "
            "that generates, for example seedbench instead of seedbench_ppl."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            f"{requests[0].task_name} asks in several rounds, which pisces does not support here. Leave the task out."
        )

    def clean(self) -> None:
        """Free the model; lmms-eval calls it before a local judge starts."""
        self.answerer.loaded = None
        super().clean()


def to_pisces(messages: list[dict[str, Any]], name: str) -> Messages:
    """Conversation of lmms-eval as one of `PiscesProcessor`.

    Raises:
        ValueError: sound or video in it.
    """
    return [{"role": turn["role"], "content": [_to_part(part, name) for part in turn["content"]]} for turn in messages]


def _to_part(part: dict[str, Any], name: str) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    if part["type"] != "image":
        raise ValueError(f"{name}: it shows a {part['type']}, and Pisces sees pictures only. Leave the task out.")
    return {"type": "image", "path" if isinstance(part["url"], str) else "image": part["url"]}
