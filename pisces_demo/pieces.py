"""Pieces that the tabs of the page share: fields, errors in one line, and what is shown of a conversation.

`pisces_demo/page.py` builds its tabs from them. gradio comes in as an argument, or is imported when it is needed.
"""

import hashlib
import html
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pisces_commands.arguments import one_line
from pisces_commands.writing import write_whole

from .chat import Message
from .checks import MAX_PICTURES, MAX_SEED, MAX_STEPS
from .examples import PROMPTS, example_pictures
from .model import DemoModel


# one user at a time: gradio's queue waits in line where the model's lock would only wait
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def seed_field(gr: Any, name: str) -> Any:
    seed = gr.Number(0, label="Seed", precision=0, elem_id=name, info="the same seed draws the same picture")
    dice = gr.Button("Another seed", elem_id=f"{name}-dice", size="sm")
    dice.click(lambda: random.randrange(MAX_SEED - MAX_PICTURES), None, seed, api_visibility="private", queue=False)
    return seed


def decoder_settings(gr: Any, model: DemoModel) -> tuple[Any, Any]:
    with gr.Accordion("Decoder", open=False):
        steps = gr.Slider(1, MAX_STEPS, model.default_steps, step=1, label="Denoising steps")
        guidance = gr.Slider(
            1,
            30,
            max(model.default_guidance, 1),
            step=0.1,
            label="Guidance",
            info="how strongly it follows the vectors; 1 is off",
        )
    return steps, guidance


def prompt_field(gr: Any, name: str) -> Any:
    return gr.Textbox(PROMPTS[0], label="Prompt", elem_id=name, max_lines=3, placeholder="What shall be drawn?")


def gallery_files(pictures: Sequence[tuple[Image.Image, str]], cache: str) -> list[tuple[str, str]]:
    return [(picture_file(picture, cache), caption) for picture, caption in pictures]


def gallery_field(gr: Any, label: str, name: str, columns: int = 2) -> Any:
    return gr.Gallery(
        label=label,
        elem_id=name,
        elem_classes="drawing",
        columns=columns,
        height=600,
        format="png",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def example_files(component: Any) -> list[str]:
    """The example pictures as files of a component of gradio, which its cleaning leaves alone."""
    paths = [picture_file(picture, component.GRADIO_CACHE, name) for name, picture in example_pictures().items()]
    component.keep_in_cache.update(paths)
    return paths


def picture_file(picture: Image.Image, cache: str, name: str = "picture") -> str:
    """A picture as a PNG file in gradio's cache, written once.

    gradio itself would write it again with every piece of an answer, also while a browser reads it: half a picture.
    """
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    path = Path(cache) / digest / f"{name}.png"
    if not path.is_file():
        write_whole(path, lambda part: picture.save(part, format="PNG"), sync=False)
    return str(path)


class Stops:
    """A sign for each visitor of a tab: up, their run ends at the next piece that it has to show.

    gradio could cancel a run itself, and then leaves the tab as it happens to be, sometimes with an error of its own.
    """

    def __init__(self):
        self.signs: dict[str, threading.Event] = {}

    def announce(self, visitor: str) -> threading.Event:
        """A run was asked for: from now on it can be stopped, also while it waits in the queue."""
        return self.signs.setdefault(visitor, threading.Event())

    def stop(self, visitor: str) -> None:
        if sign := self.signs.get(visitor):
            sign.set()

    def end(self, visitor: str) -> None:
        self.signs.pop(visitor, None)


def stoppable(gr: Any, function: Callable[..., Any], stops: Stops, last: tuple) -> Callable[..., Iterator[Any]]:
    """A generator for an event of the page: it can be stopped, and its errors are shown as one line.

    Args:
        function: a generator function.
        last: what is yielded when it was stopped.
    """

    def run(request: gr.Request, *values: Any) -> Iterator[Any]:
        visitor = str(request.session_hash)
        sign = stops.announce(visitor)
        try:
            yield from until(sign, last, function(*values))
        except ValueError as error:
            raise page_error(gr, str(error)) from error
        except gr.Error:
            raise
        except Exception as error:  # a bug, or a machine without memory: the log has all of it, the page its name
            traceback.print_exc(file=sys.stderr)
            raise page_error(gr, f"{type(error).__name__}: {error}") from error
        finally:
            stops.end(visitor)

    return run


def until(sign: threading.Event, last: Any, pieces: Any) -> Iterator[Any]:
    """The pieces as long as the sign is down; then `last`. The generator of the pieces is closed in any case."""
    try:
        while not sign.is_set():
            try:
                piece = next(pieces)
            except StopIteration:
                return
            yield piece
        yield last
    finally:
        pieces.close()


def start_and_stop(
    gr: Any,
    starts: Sequence[Any],
    ends: Sequence[Any],
    function: Callable[..., Any],
    last: tuple,
    inputs: Any,
    outputs: Any,
    name: str | None,
    taken: Any = None,
) -> None:
    """Let events start a generator, one visitor at a time on the model, and others stop it.

    Args:
        starts, ends: events of gradio, such as `button.click`.
        function, last: as in `stoppable`.
        inputs, outputs: of the run.
        name: under which it can be posted to; None: only the page itself can.
        taken: (field, state): what stands in the field goes into the state when the run is asked for, and the field
            is empty for the next.
    """
    stops = Stops()

    def announce(request: gr.Request, *values: Any) -> Any:
        stops.announce(str(request.session_hash))
        return (*values, {"text": "", "files": []}) if taken else None

    def end(request: gr.Request) -> None:
        stops.stop(str(request.session_hash))

    hidden = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    first = gr.on(starts, announce, [taken[0]], [taken[1], taken[0]], **hidden) if taken else None
    first = first or gr.on(starts, announce, None, None, **hidden)
    address = {"api_name": name} if name else {"api_visibility": "private"}
    first.then(stoppable(gr, function, stops, last), inputs, outputs, **address, **ONE_AT_A_TIME)
    gr.on(ends, end, None, None, **hidden)


def page_error(gr: Any, message: str) -> Exception:
    # gradio shows it as HTML, and it may name a file that a stranger has named
    return gr.Error(html.escape(one_line(message))[:600], print_exception=False)


def warn_of_unknown_words(gr: Any, model: DemoModel, text: Any) -> None:
    if isinstance(text, str) and (words := model.unknown(text)):
        gr.Warning(html.escape(f"{model.name} was never trained on: {', '.join(words[:12])}"))


def drawing_seconds(prompt: Any, count: Any, seed: Any, steps: Any, guidance: Any) -> int:
    """What to ask a lent GPU for: a start, and for each picture its vectors and its steps at 1024 px.

    Source: an upper bound from floors. 64 vectors of an 8B model are 0.2 s of reading weights on an H200, one guided
    step of an SDXL U-Net is 13.5 TFLOP, 0.03 s at half of the nominal speed.
    """
    count, steps = (value if isinstance(value, (int, float)) and value > 0 else 1 for value in (count, steps))
    return int(15 + min(count, MAX_PICTURES) * (1 + 0.1 * min(steps, MAX_STEPS)))


def shown_messages(messages: Sequence[Message], cache: str) -> list[dict[str, Any]]:
    """A conversation in the form that `gradio.Chatbot` takes; pictures as PNG files in its cache."""
    shown = []
    for message in messages:
        content: list[Any] = []
        for part in message.parts:
            if part.picture is not None:
                content.append({"path": picture_file(part.picture, cache), "alt_text": "picture"})
            elif part.text is None:
                content.append({"type": "text", "text": "drawing ..."})
            elif part.text:
                # without Markdown gradio still reads HTML, and a picture named in it would be fetched
                content.append({"type": "text", "text": html.escape(part.text, quote=False)})
        if content:
            shown.append({"role": message.role, "content": content})
    return shown


def adapter_text(facts: Sequence[dict[str, Any]]) -> str:
    """What adapters are for, as Markdown; their names come from users."""
    lines = []
    for fact in facts:
        name = Path(fact["name"]).name or fact["name"]
        base = fact["base"] or "a base that it does not name"
        lines.append(f"**{html.escape(name)}**, trained on {html.escape(base)}\n")
        for side, numbers in fact["sides"].items():
            size = f"{numbers['num_parameters']:,} parameters, {numbers['num_bytes'] / 2**20:.2f} MiB"
            lines.append(f"- {side}: {html.escape(str(numbers['type']))}, {size}")
        lines.append("")
    return "\n".join(lines)
