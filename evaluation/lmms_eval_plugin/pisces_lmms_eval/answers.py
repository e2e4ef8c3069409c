"""Asks a checkpoint the questions of a benchmark in batches, and keeps every answer so that a killed run goes on.

`harness_model` calls it with lmms-eval's requests. It needs a model and a processor and nothing of lmms-eval.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from pisces_commands.writing import append_line


# Where a task names no length; the usual one of lmms-eval's own models. Answers end earlier, at the end token.
DEFAULT_MAX_NEW_TOKENS = 1024
# lmms-eval puts this stop into every task that names none. It separates few-shot examples, and would cut an answer
# that reasons in paragraphs after its first one.
HARNESS_STOP = "\n\n"
# How the progress bar begins; `evaluation.understanding` shows lines of this beginning and keeps the rest in a log.
PROGRESS = "answering"
# What a task may say about how to generate; the rest is about the pictures of other models.
SAMPLING = ("temperature", "top_p", "top_k")

Messages = list[dict[str, Any]]


class Question(NamedTuple):
    """One request of a benchmark."""

    name: str  # "pope test 17", for errors
    text: str  # its words, to put questions of similar length together
    settings: dict[str, Any]  # the task's generation_kwargs
    read: Callable[[], Messages]  # the conversation with its pictures; called when its turn comes


def batch_questions(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices of questions in batches of one kind of settings, longest first, so that a lack of memory shows at once.

    All questions are divided, answered or not: a batch holds the same questions after a restart.
    """
    kinds: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        kinds.setdefault(json.dumps(question.settings, sort_keys=True, default=str), []).append(index)
    batches = []
    for kind, indices in sorted(kinds.items()):
        # sampled answers have a seed each, and torch one for a whole batch
        width = 1 if samples(json.loads(kind)) else size
        indices.sort(key=lambda index: (-len(questions[index].text), index))
        batches += [indices[start : start + width] for start in range(0, len(indices), width)]
    return batches


def samples(settings: dict[str, Any]) -> bool:
    """Whether a task asks for sampling: by `do_sample`, and where it says nothing by a temperature above zero."""
    return bool(settings.get("do_sample", (settings.get("temperature") or 0) > 0))


def generation_options(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` in the words of `generate`, without the length."""
    options: dict[str, Any] = {"do_sample": samples(settings), "num_beams": settings.get("num_beams") or 1}
    if options["do_sample"]:
        options |= {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    return options


def cut_at_stops(text: str, settings: dict[str, Any]) -> str:
    """The answer up to the first of the task's stop words."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop and stop != HARNESS_STOP:
            text = text.split(stop, 1)[0]
    return text.strip()


def hash_question(messages: Messages, settings: dict[str, Any]) -> str:
    """What an answer is kept under: a sha256 of words, pixels and settings."""
    digest = hashlib.sha256()

    def spell(item: Any) -> Any:
        if isinstance(item, Image.Image):
            digest.update(item.tobytes())
            return [item.mode, item.size]
        return str(item)

    digest.update(json.dumps([messages, settings], sort_keys=True, default=spell).encode())
    return digest.hexdigest()


class AnswerFile:
    """Answers by the hash of their question: one JSON line each, in a file per shard, all read at the start."""

    def __init__(self, folder: Path | None, shard: str) -> None:
        """`folder` is made if it is not there; None keeps nothing."""
        self.answers: dict[str, str] = {}
        self.path = None if folder is None else folder / f"answers_{shard}.jsonl"
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("answers_*.jsonl")):
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1  # a killed process may have left half a line
            if path == self.path:
                os.truncate(path, whole)
            rows = (json.loads(line) for line in content[:whole].splitlines())
            self.answers |= {row["question"]: row["answer"] for row in rows}

    def add(self, key: str, name: str, answer: str) -> None:
        """Keep one answer; on disk when this returns."""
        self.answers[key] = answer
        if self.path is not None:
            append_line(self.path, json.dumps({"question": key, "name": name, "answer": answer}))


class Answerer:
    """A checkpoint, loaded when its first answer is missing, and its answers so far."""

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        batch_size: int = 1,
        folder: Path | None = None,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        """Ask with `batch_size` questions at a time and keep the answers in `folder`.

        Args:
            load: gives the model and its processor.
            folder: has to belong to this model: an answer is found again by its question alone. None keeps nothing.
            shard: (i, n) asks the i-th of n parts of the batches only. Batches are the same for any n.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected a number from 1.")
        self.load, self.batch_size, self.shard = load, batch_size, shard
        self.file = AnswerFile(folder, "_of_".join(map(str, shard)))
        self.loaded: tuple[Any, Any] | None = None

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions, empty for those of other shards.

        A batch is asked again, in full, if any of its answers is missing.

        Raises:
            ValueError: a question that the processor refuses, by the question's name.
        """
        answers = [""] * len(questions)
        asked: Counter[str] = Counter()
        batches = batch_questions(questions, self.batch_size)[self.shard[0] - 1 :: self.shard[1]]
        with tqdm(total=sum(map(len, batches)), desc=PROGRESS, unit="question") as bar:
            for indices in batches:
                batch = [questions[index] for index in indices]
                conversations = [question.read() for question in batch]
                keys = [self._key(*pair, asked) for pair in zip(batch, conversations, strict=True)]
                if not all(key in self.file.answers for key in keys):
                    for key, question, text in zip(keys, batch, self._ask(batch, conversations, keys), strict=True):
                        self.file.add(key, question.name, text)
                for index, key in zip(indices, keys, strict=True):
                    answers[index] = self.file.answers[key]
                bar.update(len(batch))
        return answers

    def _key(self, question: Question, messages: Messages, asked: Counter[str]) -> str:
        key = hash_question(messages, question.settings)
        if samples(question.settings):  # asked twice, a sampled question has two answers
            asked[key] += 1
            key += f"-{asked[key]}"
        return key

    def _ask(self, batch: list[Question], conversations: list[Messages], keys: list[str]) -> list[str]:
        """Generate the answers of one batch, which has one kind of settings."""
        model, processor = self.loaded = self.loaded or self.load()
        processor.tokenizer.padding_side = "left"  # new words follow the prompt of every row
        settings = batch[0].settings
        try:
            inputs = processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            )
        except ValueError as error:
            raise ValueError(f"{', '.join(question.name for question in batch)}: {error}") from error
        inputs = inputs.to(model.device, dtype=model.dtype)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        # beyond its positions a language model answers nonsense without a word
        room = processor.tokenizer.model_max_length - num_prompt_tokens
        if room < 1:
            raise ValueError(
                f"{batch[0].name}: its prompt of {num_prompt_tokens} tokens fills the whole context of "
                f"{processor.tokenizer.model_max_length}, with no room to answer. Leave this task out."
            )
        length = min(int(settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS), room)
        seed = hashlib.sha256(keys[0].encode()).digest()[:4]
        torch.manual_seed(int.from_bytes(seed, "big"))
        output = model.generate(**inputs, max_new_tokens=length, **generation_options(settings))
        texts = processor.batch_decode(output[:, num_prompt_tokens:], skip_special_tokens=True)
        return [cut_at_stops(text, settings) for text in texts]
