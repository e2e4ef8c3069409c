"""The one thread that owns the model: loads it, takes batches, runs them with the functions that the commands use.

Nobody else touches the model, its tokenizer or torch's random numbers. An error of one request is told to its sender
alone: a batch that fails is run again row by row.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_pisces.checkpoint.adapters import Adapter, attach_choices
from modeling_pisces.checkpoint.loading import load_model, load_pipeline
from modeling_pisces.console.answers import DEFAULT_ANSWER_LENGTH

from .answers import Chat, write_answer
from .batcher import Batcher, Job
from .errors import ApiError
from .metrics import Metrics
from .pictures import decode
from .settings import Settings


@dataclass
class Drawing:
    """One request for pictures; what its batch shares is in the job's key, as `shape`.

    Args:
        seeds: one per picture.
        pictures: of an edit, as they came in.
    """

    prompt: str
    seeds: list[int]
    negative_prompt: str | None = None
    pictures: list[Any] | None = None


@dataclass(frozen=True)
class DrawingShape:
    """What drawings of one batch share."""

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    has_negative: bool = False
    num_pictures: int = 0  # that each prompt of an edit shows


@dataclass
class Embedding:
    """One request for vectors: texts, and pictures as they came in, in the order of the request."""

    items: list[Any]


class Worker(threading.Thread):
    """Runs batches until the batcher is closed.

    Args:
        folder: the checkpoint.
        adapters: name -> adapter.
        on_end: called from this thread when it ends by an error.
    """

    def __init__(
        self,
        folder: Any,
        adapters: dict[str, Adapter],
        settings: Settings,
        batcher: Batcher,
        on_end: Callable[[], Any] = lambda: None,
        on_ready: Callable[[], Any] = lambda: None,
    ):
        super().__init__(name="pisces-worker", daemon=True)
        self.folder, self.adapters, self.settings, self.batcher = folder, adapters, settings, batcher
        self.on_end, self.on_ready = on_end, on_ready
        self.is_ready = threading.Event()
        self.error: BaseException | None = None
        self.decoder_since: float | None = None  # of the drawing that is going on: when its vectors were finished
        self.metrics = Metrics(lambda: len(batcher), lambda: float(self.is_ready.is_set()))
        self.can_draw = (folder / "model_index.json").is_file()

    def run(self) -> None:
        try:
            self.load()
            self.warm_up()
            self.is_ready.set()
            self.on_ready()
            while jobs := self.batcher.take():
                self.run_batch(jobs)
        except BaseException as error:
            self.error = error
            self.on_end()

    @property
    def is_stuck(self) -> bool:
        """Whether a batch runs for so long that nobody can be waiting for it."""
        return self.batcher.busy_s() > 2 * self.settings.deadline_s + 60

    def load(self) -> None:
        settings = self.settings
        how = (self.folder, settings.device, settings.dtype, settings.trust_remote_code)
        self.pipeline: Any = None
        if self.can_draw:
            self.pipeline = load_pipeline(*how)
            self.pipeline.set_progress_bar_config(disable=True)
            self.pipeline.unet.register_forward_pre_hook(self._note_decoder)
            self.model, self.processor = self.pipeline.vision_language_model, self.pipeline.processor
        else:
            self.model, self.processor = load_model(*how)
        self.choices = attach_choices(self.adapters, self.model, self.pipeline)

    def warm_up(self) -> None:
        """One short answer and one picture of a single step: the first call of a process pays for much."""
        chat = Chat([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], max_tokens=2)
        with self.choices.use(None):
            self._write(chat, lambda piece: None, lambda: False)
            if self.pipeline is not None:
                generator = torch.Generator("cpu").manual_seed(0)
                self.pipeline([""], generator=[generator], num_inference_steps=2)

    def _note_decoder(self, *_: Any) -> None:
        if self.decoder_since is None:
            self.decoder_since = time.monotonic()

    # ---- batches

    def run_batch(self, jobs: list[Job]) -> None:
        """Run jobs of one key and tell each its result or its error."""
        endpoint, start = jobs[0].key.endpoint, time.monotonic()
        self.metrics.batch_rows.labels(endpoint).observe(sum(job.num_rows for job in jobs))
        for job in jobs:
            self.metrics.queue_s.labels(endpoint).observe(start - job.since)
        try:
            results = self._results(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:  # one of them is to blame, and the others shall not pay for it
                    if not job.is_cancelled:
                        self.run_batch([job])
                return
            jobs[0].tell("error", as_api_error(error))
        else:
            for job, result in zip(jobs, results, strict=True):
                job.tell("done", result)
        self.metrics.run_s.labels(endpoint).observe(time.monotonic() - start)

    def _results(self, jobs: list[Job]) -> Sequence[Any]:
        run = {"chat": self._chats, "draw": self._draw, "edit": self._draw, "embed": self._embed}
        with self.choices.use(jobs[0].key.adapter):
            return run[jobs[0].key.endpoint](jobs)

    def _chats(self, jobs: list[Job]) -> list[Any]:
        return [self._chat(job) for job in jobs]

    def _chat(self, job: Job) -> Any:
        start = time.monotonic()
        answer = self._write(job.work, lambda piece: job.tell("piece", piece), lambda: job.is_cancelled)
        self.metrics.phase_s.labels("text").observe(time.monotonic() - start)
        self.metrics.tokens.labels("prompt").inc(answer.num_prompt_tokens)
        self.metrics.tokens.labels("answer").inc(answer.num_new_tokens)
        return answer

    def _write(self, chat: Chat, say: Callable[[str], Any], is_gone: Callable[[], bool]) -> Any:
        limits = self.settings
        return write_answer(
            self.model,
            self.processor,
            chat,
            say,
            is_gone,
            self._draw_vectors if self.pipeline is not None else None,
            limits.max_pixels,
            limits.max_prompt_tokens,
            DEFAULT_ANSWER_LENGTH,
        )

    def _draw_vectors(self, vectors: torch.Tensor, seed: int) -> list[Any]:
        """Pictures of an answer; the k-th starts from the noise of seed + k."""
        generators = [torch.Generator("cpu").manual_seed(seed + k) for k in range(len(vectors))]
        self.metrics.pictures.inc(len(vectors))
        return self.pipeline(image_vectors=vectors, generator=generators).images

    def _draw(self, jobs: list[Job]) -> list[list[Any]]:
        """Pictures for each job, all its seeds; at most `max_batch` rows at once."""
        self._check_negative(jobs[0].key.shape)
        rows = [(job.work, seed) for job in jobs for seed in job.work.seeds]
        images: list[Any] = []
        for start in range(0, len(rows), self.settings.max_batch):
            images += self._draw_rows(rows[start : start + self.settings.max_batch], jobs)
        self.metrics.pictures.inc(len(images))
        results, place = [], 0
        for job in jobs:
            results.append(images[place : place + len(job.work.seeds)])
            place += len(job.work.seeds)
        return results

    def _check_negative(self, shape: Any) -> None:
        guidance = shape.guidance_scale
        if guidance is None:
            guidance = self.pipeline.config.default_guidance_scale
        if shape.has_negative and guidance <= 1:
            raise ApiError(
                f"negative_prompt means nothing at guidance_scale {guidance:g}. Send a guidance_scale above 1, or "
                "leave it out.",
                param="negative_prompt",
            )

    def _draw_rows(self, rows: list[tuple[Drawing, int]], jobs: list[Job]) -> list[Any]:
        shape: Any = jobs[0].key.shape
        works = [work for work, _ in rows]
        shown = {id(work): [decode(one, self.settings.max_pixels) for one in work.pictures or []] for work in works}

        def stop_if_nobody_waits(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if all(job.is_cancelled for job in jobs):
                pipeline._interrupt = True
            return tensors

        options = {
            "num_inference_steps": shape.num_inference_steps,
            "guidance_scale": shape.guidance_scale,
            "height": shape.height,
            "width": shape.width,
        }
        start, self.decoder_since = time.monotonic(), None
        images = self.pipeline(
            [work.prompt for work in works],
            negative_prompt=[work.negative_prompt for work in works] if shape.has_negative else None,
            image=[shown[id(work)] for work in works] if shape.num_pictures else None,
            strength=shape.strength,
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in rows],  # equal on every device
            callback_on_step_end=stop_if_nobody_waits,
            **options,
        ).images
        middle = self.decoder_since or start
        self.metrics.phase_s.labels("vectors").observe(middle - start)
        self.metrics.phase_s.labels("decoder").observe(time.monotonic() - middle)
        return images

    def _embed(self, jobs: list[Job]) -> list[tuple[list[Any], int]]:
        """For each job its vectors in the order of its items, and how many tokens its texts have."""
        from modeling_pisces.console.embedding import embed_images, embed_texts

        items = [item for job in jobs for item in job.work.items]
        texts = [item for item in items if isinstance(item, str)]
        pictures = [item for item in items if not isinstance(item, str)]
        size = self.settings.max_batch  # at once: a small file may be a large picture
        of_texts = (vector for part in _parts(texts, size) for vector in embed_texts(self.model, self.processor, part))
        of_pictures = (
            vector
            for part in _parts(pictures, size)
            for vector in embed_images(
                self.model, self.processor, [decode(one, self.settings.max_pixels) for one in part]
            )
        )
        vectors = iter([next(of_texts if isinstance(item, str) else of_pictures) for item in items])
        return [([next(vectors) for _ in job.work.items], self._num_tokens(job.work.items)) for job in jobs]

    def _num_tokens(self, items: list[Any]) -> int:
        return sum(len(self.processor.tokenizer(item)["input_ids"]) for item in items if isinstance(item, str))


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    yield from (items[start : start + size] for start in range(0, len(items), size))


def as_api_error(error: Exception) -> ApiError:
    """What a sender is told: the library's own sentence where the request is at fault, and no more than that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return ApiError(
            "not enough memory for this request. Ask for smaller or fewer pictures.", 503, code="out_of_memory"
        )
    if isinstance(error, ValueError):
        return ApiError(" ".join(str(error).split())[:600] or "the model refuses this request.")
    traceback.print_exception(error, file=sys.stderr)
    return ApiError("the server failed at this request; its log says where.", 500, code="internal_error")


__all__ = ["Drawing", "DrawingShape", "Embedding", "Worker", "as_api_error"]
