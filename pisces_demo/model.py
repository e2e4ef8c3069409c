"""A loaded Pisces as the page uses it: answers, drawings, edits and comparisons that come piece by piece.

Every method that runs the model is a generator: it yields all that there is to show so far, and closing it stops the
work. One lock is held by whoever uses the model, because switching an adapter off is a state of the process: two users
at once would see each other's. `pisces_demo/page.py` calls the methods; numbers and texts are judged here, in
`pisces_demo/checks.py`, before the model is asked for.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from modeling_pisces.checkpoint.adapters import (
    Adapter,
    AttachedAdapters,
    attach_adapters,
    describe_adapter,
    find_model,
)
from modeling_pisces.checkpoint.files import check_checkpoint
from modeling_pisces.checkpoint.info import describe_checkpoint
from modeling_pisces.checkpoint.loading import load_model, load_pipeline
from modeling_pisces.console.known_words import KNOWN_WORDS, unknown_words

from .chat import Message, Part, PartStreamer, ask, messages_for_model
from .checks import (
    MAX_NEW_TOKENS,
    MAX_STEPS,
    check_count,
    check_number,
    check_seed,
    check_text,
    check_whole,
    open_upload,
)
from .work import Say, run_in_steps


@dataclass
class Drawn:
    """What a drawing has come to.

    Args:
        pictures: finished ones with their captions.
        status: one line about what is going on, or what it took.
        others: of a comparison, the same drawn with the adapter.
    """

    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    status: str = ""
    others: list[tuple[Image.Image, str]] = field(default_factory=list)


class DemoModel:
    """A checkpoint with its adapters, and the lock of whoever uses it.

    Args:
        name: what the page calls it.
        folder: where the checkpoint lies.
        model, processor: `PiscesForConditionalGeneration` and `PiscesProcessor`.
        pipeline: the `PiscesPipeline` around them; None for a checkpoint without a decoder, which only answers.
        adapters, attached: the adapters that are on the model.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: Any,
        processor: Any,
        pipeline: Any = None,
        adapters: Sequence[Adapter] = (),
        attached: AttachedAdapters | None = None,
    ):
        self.name, self.folder = name, Path(folder)
        self.model, self.processor, self.pipeline = model, processor, pipeline
        self.adapters, self.attached = tuple(adapters), attached or AttachedAdapters()
        self.lock = threading.Lock()

    @classmethod
    def load(
        cls,
        name: str,
        adapters: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        label: str | None = None,
    ) -> "DemoModel":
        """Load what a user named: a checkpoint folder or Hub id, and adapters.

        Args:
            label: what the page calls it; None: its name.

        Raises:
            ValueError: one of them cannot be found or used.
        """
        folder, found = find_model(name, adapters)
        has_decoder = (folder / "model_index.json").is_file()
        check_checkpoint(folder, with_decoder=has_decoder)
        if has_decoder:
            pipeline = load_pipeline(folder, device, dtype, trust_remote_code)
            model, processor = pipeline.vision_language_model, pipeline.processor
            pipeline.set_progress_bar_config(disable=True)
        else:
            pipeline = None
            model, processor = load_model(folder, device, dtype, trust_remote_code)
        attached = attach_adapters(found, model, pipeline)
        return cls(label or Path(name).name or name, folder, model, processor, pipeline, found, attached)

    # ---- what the page says about it ----------------------------------------------------------------------------

    @property
    def can_draw(self) -> bool:
        return self.pipeline is not None and self.model.config.has_generation

    @property
    def can_start_from_pixels(self) -> bool:
        return self.can_draw and self.pipeline.vae is not None

    @property
    def is_toy(self) -> bool:
        """Whether the checkpoint lists the few words that it knows; such ones are trained on single questions."""
        return (self.folder / KNOWN_WORDS).is_file()

    @property
    def default_steps(self) -> int:
        return self.pipeline.config.default_num_inference_steps

    @property
    def default_guidance(self) -> float:
        return self.pipeline.config.default_guidance_scale

    @property
    def default_answer_length(self) -> int:
        return min(self.model.generation_config.max_new_tokens or 256, MAX_NEW_TOKENS)

    def title(self) -> str:
        """One line: the checkpoint, its size, its adapters."""
        info = describe_checkpoint(self.folder)
        count = info["num_parameters"]
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        names = ", ".join(Path(adapter.name).name or adapter.name for adapter in self.adapters)
        words = f"{self.name}, {size} parameters, on {self.model.device.type}"
        return f"{words}; adapter: {names}" if names else words

    def adapter_facts(self) -> list[dict[str, Any]]:
        return [describe_adapter(adapter) for adapter in self.adapters]

    def unknown(self, *texts: str) -> list[str]:
        """Words that a small checkpoint was never trained on; none where an adapter may have taught them."""
        return [] if self.adapters else unknown_words(self.folder, texts)

    def _check_words(self, text: str) -> str:
        if found := self.processor.find_control_tokens(text):
            raise ValueError(
                f"The text contains {found[0]}, which the model reads as a command. Write it differently."
            )
        return text

    # ---- chat ---------------------------------------------------------------------------------------------------

    def answer(
        self, history: Sequence[Message], text: Any, files: Any, max_new_tokens: Any, seed: Any, remembers: bool = True
    ) -> Iterator[list[Message]]:
        """The conversation with the question, then with the answer as it grows; the model may draw in it.

        Args:
            remembers: the model reads what was said before; else the new question alone.

        Raises:
            ValueError: the question cannot be asked. The conversation is then as it was before.
        """
        length = check_whole(max_new_tokens, "The longest answer", 1, MAX_NEW_TOKENS)
        seed = check_seed(seed)
        asked = ask(history, text, files)
        self._check_words(asked[-1].parts[-1].text or "")
        read = asked if remembers else asked[-1:]
        yield asked
        try:
            for parts in run_in_steps(self.lock, lambda say, stop: self._answer(read, length, seed, say, stop)):
                yield [*asked, Message("assistant", parts)]
        except Exception:
            yield list(history)
            raise

    @torch.no_grad()
    def _answer(self, read: list[Message], length: int, seed: int, say: Say, stop: threading.Event) -> None:
        mode = "interleaved" if self.can_draw else "text"
        config = self.model.config
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(messages_for_model(read), generation_mode=mode, **options)
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        room = self._room(inputs["input_ids"].shape[1])
        start_id, end_id = (config.gen_start_token_id, config.gen_end_token_id) if self.can_draw else (None, None)
        streamer = PartStreamer(self.processor.tokenizer, start_id, end_id, say)
        generator = _generator(seed)  # one for the answer: of the vectors' noise, if the head has any, then of pixels
        is_random = self.can_draw and self.model.model.gen_head.is_stochastic
        output = self.model.generate(
            **inputs,
            generation_mode=mode,
            max_new_tokens=min(length, room),
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopWhenSet(stop)]),
            **({"generator": generator} if is_random else {}),
        )
        parts = streamer.parts
        drawn = getattr(output, "image_vectors", None)
        marks = [part for part in parts if part.text is None]
        for part, vectors in zip(marks, () if drawn is None else drawn, strict=False):  # a stop may leave a mark
            picture = self._draw(generator, stop, None, image_vectors=vectors.unsqueeze(0))
            if picture is None:
                return
            part.picture, part.vectors = picture, vectors.cpu()
            say(list(parts))
        if not any(part.text or part.picture for part in parts) and not stop.is_set():
            say([Part("(nothing)")])

    def _room(self, length: int) -> int:
        """Tokens that still fit behind a prompt."""
        longest = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or length + MAX_NEW_TOKENS
        )
        if length >= longest:
            raise ValueError(
                f"The conversation has {length} tokens, and the model reads {longest}. Start a new one, or send fewer "
                "pictures."
            )
        return longest - length

    # ---- draw, edit, compare ------------------------------------------------------------------------------------

    def draw(self, prompt: Any, count: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[Drawn]:
        """Pictures of one prompt, one after the other: picture k has seed + k, whatever else is drawn with it.

        Raises:
            ValueError: a value cannot be used.
        """
        prompt = self._check_words(check_text(prompt, "prompt", "Say what to draw."))
        options = self._drawing_options(steps, guidance)
        seeds = _seeds(seed, check_count(count))
        yield from run_in_steps(
            self.lock, lambda say, stop: self._draw_all(prompt, seeds, options, say, stop, compare=False)
        )

    def compare(self, prompt: Any, count: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[Drawn]:
        """The same prompt and seeds without the adapters and with them, in turns.

        Raises:
            ValueError: a value cannot be used, or there is no adapter.
        """
        if not self.adapters:
            raise ValueError("There is no adapter to compare. Start the page with --adapter FOLDER_OR_ID.")
        prompt = self._check_words(check_text(prompt, "prompt", "Say what to draw."))
        options = self._drawing_options(steps, guidance)
        seeds = _seeds(seed, check_count(count))
        yield from run_in_steps(
            self.lock, lambda say, stop: self._draw_all(prompt, seeds, options, say, stop, compare=True)
        )

    def _draw_all(
        self, prompt: str, seeds: list[int], options: dict, say: Say, stop: threading.Event, compare: bool
    ) -> None:
        drawn, start = Drawn(), time.perf_counter()
        total = len(seeds) * (2 if compare else 1)
        for seed in seeds:
            for is_base in (True, False) if compare else (False,):
                number = len(drawn.pictures) + len(drawn.others) + 1
                what = ("without the adapter, " if is_base else "with the adapter, ") if compare else ""
                say(_snapshot(drawn, f"picture {number} of {total}, {what}seed {seed}: the model writes its vectors"))
                tell = _step_teller(drawn, f"picture {number} of {total}, {what}seed {seed}", say)
                with self.attached.off() if is_base else nullcontext():
                    picture = self._draw(_generator(seed), stop, tell, prompt=[prompt], **options)
                if picture is None:
                    return
                (drawn.pictures if is_base or not compare else drawn.others).append((picture, f"seed {seed}"))
        seconds = time.perf_counter() - start
        say(_snapshot(drawn, f"{_counted(total, seeds)}, in {seconds:.1f} s"))

    def edit(
        self, path: Any, instruction: Any, seed: Any, strength: Any, steps: Any, guidance: Any
    ) -> Iterator[Drawn]:
        """One picture changed as an instruction says: the source as it is shown to the model, and the result.

        Args:
            strength: 0 starts from noise; up to 1 it is the pipeline's `strength`.

        Raises:
            ValueError: a value cannot be used.
        """
        instruction = self._check_words(check_text(instruction, "instruction", "Say what to change."))
        options = self._drawing_options(steps, guidance)
        strength = check_number(strength, "The strength", 0, 1)
        if strength and not self.can_start_from_pixels:
            raise ValueError(f"{self.name} has no VAE to start from the picture's pixels. Set the strength to 0.")
        seeds, source = _seeds(seed, 1), open_upload(path)
        options |= {"prompt": [instruction], "image": [source], "strength": strength or None}
        yield from run_in_steps(self.lock, lambda say, stop: self._edit(source, seeds[0], options, say, stop))

    def _edit(self, source: Image.Image, seed: int, options: dict, say: Say, stop: threading.Event) -> None:
        start = time.perf_counter()
        say(Drawn(status="the model looks at the picture"))
        edited = self._draw(_generator(seed), stop, _step_teller(Drawn(), f"seed {seed}", say), **options)
        if edited is None:
            return
        # a slider lays one over the other; the model, too, sees a picture stretched to its own size
        shown = source.resize(edited.size, Image.Resampling.LANCZOS)
        seconds = time.perf_counter() - start
        say(Drawn([(shown, "before"), (edited, "after")], f"seed {seed}, in {seconds:.1f} s"))

    def _drawing_options(self, steps: Any, guidance: Any) -> dict[str, Any]:
        if not self.can_draw:
            raise ValueError(f"{self.name} has no decoder, so it cannot draw. Start the page with another --model.")
        return {
            "num_inference_steps": check_whole(steps, "The number of steps", 1, MAX_STEPS),
            "guidance_scale": check_number(guidance, "The guidance", 1, 30),
        }

    def _draw(
        self,
        generator: torch.Generator,
        stop: threading.Event,
        tell: Callable[[int, int], None] | None,
        **options: Any,
    ) -> Image.Image | None:
        """One picture; None if it was stopped."""

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if stop.is_set():
                pipeline._interrupt = True
            elif tell is not None:
                tell(step + 1, pipeline.num_timesteps)
            return tensors

        if stop.is_set():
            return None
        images = self.pipeline(generator=[generator], callback_on_step_end=after_step, **options).images
        return None if stop.is_set() else images[0]


class StopWhenSet(StoppingCriteria):
    """Ends a text after the token at which `stop` is set; a picture that is begun is finished first."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.stop.is_set(), device=input_ids.device)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)  # on the CPU: equal numbers on every device


def _seeds(first: Any, count: int) -> list[int]:
    first = check_seed(first)
    return [check_seed(first + index) for index in range(count)]


def _counted(total: int, seeds: list[int]) -> str:
    if len(seeds) > 1:
        return f"{total} pictures, seeds {seeds[0]} to {seeds[-1]}"
    return f"{total} picture{'s' if total > 1 else ''}, seed {seeds[0]}"


def _snapshot(drawn: Drawn, status: str) -> Drawn:
    """What is there now; the lists go on growing."""
    return Drawn(list(drawn.pictures), status, list(drawn.others))


def _step_teller(drawn: Drawn, what: str, say: Say) -> Callable[[int, int], None]:
    return lambda step, total: say(_snapshot(drawn, f"{what}: step {step} of {total}"))
