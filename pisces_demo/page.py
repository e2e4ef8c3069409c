"""The page: four tabs on one model, laid out with gradio.

`pisces_demo/app.py` and the `app.py` of a Space call `build_page` and `launch`. Nothing is decided here about pictures
or answers: each button calls one generator of `pisces_demo/model.py`. gradio is imported when a page is built, so that
everything else is tested without it.

No request leaves the machine: no fonts of others, no telemetry, and what people and the model write is shown as plain
text, because Markdown could name a picture on another server.
"""

import html
import os
from collections.abc import Callable, Iterator
from typing import Any

from .chat import Message
from .checks import MAX_NEW_TOKENS, MAX_PICTURES
from .examples import CHAT_PROMPTS, INSTRUCTIONS, PROMPTS, QUESTIONS
from .model import DemoModel
from .pieces import (
    ONE_AT_A_TIME,
    adapter_text,
    decoder_settings,
    drawing_seconds,
    example_files,
    gallery_field,
    gallery_files,
    prompt_field,
    seed_field,
    shown_messages,
    start_and_stop,
    warn_of_unknown_words,
)


MAX_WAITING = 32  # clicks in the queue
MAX_UPLOAD = "20mb"
KEPT_FILES = (3600, 24 * 3600)  # seconds: look each hour, and drop pictures of the day before

FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
#title h1 { margin: 0.4em 0 0 0; letter-spacing: -0.01em; }
#title p { margin: 0.2em 0 0.6em 0; opacity: 0.75; }
.status { min-height: 1.6em; font-variant-numeric: tabular-nums; opacity: 0.8; }
/* small pictures are enlarged as they are, not blurred */
.drawing img, #chat img { image-rendering: pixelated; }
#chat .message-row img { width: 200px !important; height: auto; object-fit: contain; }
/* it would send a picture to another server */
button[aria-label="Share"] { display: none !important; }
"""

STOPPED = "stopped"
NO_DECODER = (
    "This checkpoint answers questions and has no decoder, so it cannot draw. Start the page with another `--model`."
)
ABOUT_EDITS = (
    "The model looks at the picture and draws it anew, changed. The vectors between the two keep what is shown, not "
    "every pixel of it, and only a checkpoint that was trained on edits follows instructions."
)
NO_ADAPTER = """
### No adapter yet

An adapter is a small file that teaches a model something new. With one, this tab draws the same prompt with the same
seeds without it and with it, side by side. Start the page again and name it:

```
python demo/app.py --adapter FOLDER_OR_ID
```

You have none? Train one on your own pictures and captions:

```
python -m finetune.lora_generation --config finetune/configs/lora_generation.yaml \\
    --data my_pictures --output_dir runs/mine
```
"""


def build_page(model: DemoModel, on_gpu: Callable[..., Any] | None = None) -> Any:
    """The page for a loaded model, as `gradio.Blocks`.

    Args:
        on_gpu: `spaces.GPU` on a Space with ZeroGPU, which lends a GPU to one call; None runs where the model is.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by every part of gradio, some at import
    import gradio as gr

    on_gpu = on_gpu or (lambda duration: lambda function: function)
    with gr.Blocks(title="Pisces", analytics_enabled=False, delete_cache=KEPT_FILES) as page:
        gr.Markdown(f"# Pisces\n\n{html.escape(model.title())}", elem_id="title")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat-tab", elem_id="chat-tab"):
                _chat_tab(gr, model, on_gpu)
            with gr.Tab("Draw", id="draw-tab", elem_id="draw-tab"):
                _draw_tab(gr, model, on_gpu) if model.can_draw else gr.Markdown(NO_DECODER)
            with gr.Tab("Edit", id="edit-tab", elem_id="edit-tab"):
                _edit_tab(gr, model, on_gpu) if model.can_draw else gr.Markdown(NO_DECODER)
            with gr.Tab("Adapter", id="adapter-tab", elem_id="adapter-tab"):
                _adapter_tab(gr, model, on_gpu) if model.can_draw else gr.Markdown(NO_DECODER)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def launch(page: Any, **options: Any) -> Any:
    """Serve the page; on this machine alone unless `server_name` says otherwise, and under no public address.

    Args:
        options: as `gradio.Blocks.launch` takes them.
    """
    import gradio as gr

    # plain names of fonts: those of gradio's own themes are fetched from another server
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    )
    fixed = {
        "theme": theme,
        "css": CSS,
        "max_file_size": MAX_UPLOAD,
        "show_error": True,
        "ssr_mode": False,
        "footer_links": [],
    }
    return page.launch(**{"share": False, "server_name": "127.0.0.1", **fixed, **options})


# ---- tabs -----------------------------------------------------------------------------------------------------------


def _chat_tab(gr: Any, model: DemoModel, on_gpu: Callable) -> None:
    history, asked = gr.State([]), gr.State(None)  # the conversation; what was sent last
    chat = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height=540,
        render_markdown=False,
        latex_delimiters=[],
        buttons=["copy"],
        placeholder="Ask about a picture, or ask for one.",
    )
    box = gr.MultimodalTextbox(
        elem_id="message",
        show_label=False,
        placeholder="A question, or what to draw. Drop pictures here.",
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=10**6,
        sources=["upload"],
    )
    with gr.Row():
        stop = gr.Button("Stop", elem_id="chat-stop", size="sm", min_width=80)
        clear = gr.Button("New conversation", elem_id="chat-clear", size="sm", min_width=80)
    with gr.Accordion("Settings", open=False):
        length = gr.Slider(
            1, MAX_NEW_TOKENS, model.default_answer_length, step=1, label="Longest answer, in tokens", elem_id="length"
        )
        seed = gr.Number(0, label="Seed of pictures", precision=0, elem_id="chat-seed")
        remembers = gr.Checkbox(
            not model.is_toy,
            label="Read the whole conversation",
            elem_id="remembers",
            info="off: each message on its own, for checkpoints that were trained on single questions",
        )

    # on a GPU that is lent for one call the model starts cold
    @on_gpu(duration=lambda *values: 60)
    def answer(messages: list[Message], value: Any, length: Any, seed: Any, remembers: Any) -> Iterator[tuple]:
        value = value if isinstance(value, dict) else {}
        for grown in model.answer(messages, value.get("text"), value.get("files"), length, seed, bool(remembers)):
            yield grown, shown_messages(grown, chat.GRADIO_CACHE)

    inputs, outputs = [history, asked, length, seed, remembers], [history, chat]
    nothing_more = (gr.skip(), gr.skip())
    clears = [clear.click, chat.clear]  # the second is the field's own bin, which would empty the screen alone
    ends = [stop.click, *clears]
    start_and_stop(gr, [box.submit], ends, answer, nothing_more, inputs, outputs, None, taken=(box, asked))
    # it waits in the model's queue, behind the answer that it stops
    gr.on(clears, lambda: ([], []), None, outputs, api_visibility="private", **ONE_AT_A_TIME)
    pictures = example_files(box)
    asks = [{"text": text, "files": [path]} for text, path in zip(QUESTIONS, pictures, strict=True)]
    draws = [{"text": text, "files": []} for text in CHAT_PROMPTS] if model.can_draw else []
    gr.Examples([[example] for example in (*asks, *draws)], [box], elem_id="chat-examples", api_visibility="private")


def _draw_tab(gr: Any, model: DemoModel, on_gpu: Callable) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = prompt_field(gr, "prompt")
            with gr.Row():
                draw = gr.Button("Draw", elem_id="draw", variant="primary", scale=2, min_width=80)
                stop = gr.Button("Stop", elem_id="draw-stop", scale=1, min_width=80)
            count = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures", elem_id="count")
            seed = seed_field(gr, "seed")
            steps, guidance = decoder_settings(gr, model)
        with gr.Column(scale=3, min_width=360):
            gallery = gallery_field(gr, "Drawings", "gallery")
            status = gr.Markdown(elem_id="draw-status", elem_classes="status")

    def drawing(prompt: Any, count: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[tuple]:
        for number, drawn in enumerate(model.draw(prompt, count, seed, steps, guidance)):
            if number == 0:  # nothing was refused
                warn_of_unknown_words(gr, model, prompt)
            yield gallery_files(drawn.pictures, gallery.GRADIO_CACHE), drawn.status

    inputs = [prompt, count, seed, steps, guidance]
    run, last = on_gpu(duration=drawing_seconds)(drawing), (gr.skip(), STOPPED)
    start_and_stop(gr, [draw.click, prompt.submit], [stop.click], run, last, inputs, [gallery, status], "draw")
    gr.Examples([[text] for text in PROMPTS], [prompt], elem_id="draw-examples", api_visibility="private")


def _edit_tab(gr: Any, model: DemoModel, on_gpu: Callable) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            source = gr.Image(
                label="Picture",
                elem_id="source",
                elem_classes="drawing",
                type="filepath",
                height=260,
                format="png",
                sources=["upload", "clipboard"],
                buttons=[],
            )
            # gradio would open the upload as whatever its content says; `open_upload` knows which formats are safe
            source.preprocess = lambda payload: None if payload is None else payload.path
            instruction = gr.Textbox(
                label="Instruction", elem_id="instruction", placeholder="What shall be different?"
            )
            with gr.Row():
                edit = gr.Button("Edit", elem_id="edit", variant="primary", scale=2, min_width=80)
                stop = gr.Button("Stop", elem_id="edit-stop", scale=1, min_width=80)
            seed = seed_field(gr, "edit-seed")
            strength = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Strength",
                elem_id="strength",
                visible=model.can_start_from_pixels,
                info="0 starts from noise; small values start from the picture and keep more of it",
            )
            steps, guidance = decoder_settings(gr, model)
        with gr.Column(scale=3, min_width=360):
            slider = gr.ImageSlider(
                label="Before and after",
                elem_id="slider",
                elem_classes="drawing",
                height=400,
                max_height=400,
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            status = gr.Markdown(elem_id="edit-status", elem_classes="status")
            again = gr.Button("Go on with the result", elem_id="again", interactive=False, size="sm")
            gr.Markdown(ABOUT_EDITS, elem_classes="status")
    result = gr.State(None)  # the picture to go on with

    def editing(path: Any, instruction: Any, seed: Any, strength: Any, steps: Any, guidance: Any) -> Iterator[tuple]:
        for number, drawn in enumerate(model.edit(path, instruction, seed, strength, steps, guidance)):
            if number == 0:
                warn_of_unknown_words(gr, model, instruction)
            pair = tuple(path for path, _ in gallery_files(drawn.pictures, slider.GRADIO_CACHE))
            yield (pair, pair[1], drawn.status) if pair else (gr.skip(), gr.skip(), drawn.status)

    inputs = [source, instruction, seed, strength, steps, guidance]
    run = on_gpu(duration=lambda *values: drawing_seconds(None, 1, None, values[4], None))(editing)
    events, outputs, last = [edit.click, instruction.submit], [slider, result, status], (gr.skip(), gr.skip(), STOPPED)
    start_and_stop(gr, events, [stop.click], run, last, inputs, outputs, "edit")
    result.change(lambda picture: gr.Button(interactive=picture is not None), result, again, api_visibility="private")
    again.click(lambda picture: picture, result, source, api_visibility="private")
    pairs = zip(example_files(source), INSTRUCTIONS, strict=True)
    gr.Examples(
        [list(pair) for pair in pairs], [source, instruction], elem_id="edit-examples", api_visibility="private"
    )


def _adapter_tab(gr: Any, model: DemoModel, on_gpu: Callable) -> None:
    if not model.adapters:
        gr.Markdown(NO_ADAPTER, elem_id="no-adapter")
        return
    gr.Markdown(adapter_text(model.adapter_facts()), elem_id="adapter-facts")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = prompt_field(gr, "compare-prompt")
            with gr.Row():
                compare = gr.Button("Compare", elem_id="compare", variant="primary", scale=2, min_width=80)
                stop = gr.Button("Stop", elem_id="compare-stop", scale=1, min_width=80)
            count = gr.Slider(1, MAX_PICTURES, 2, step=1, label="Pictures of each", elem_id="compare-count")
            seed = seed_field(gr, "compare-seed")
            steps, guidance = decoder_settings(gr, model)
        with gr.Column(scale=3, min_width=360):
            with gr.Row():
                without = gallery_field(gr, "Without the adapter", "without", columns=1)
                with_adapter = gallery_field(gr, "With the adapter", "with", columns=1)
            status = gr.Markdown(elem_id="compare-status", elem_classes="status")

    def comparing(prompt: Any, count: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[tuple]:
        for drawn in model.compare(prompt, count, seed, steps, guidance):
            sides = (drawn.pictures, drawn.others)
            yield *(gallery_files(side, without.GRADIO_CACHE) for side in sides), drawn.status

    inputs = [prompt, count, seed, steps, guidance]
    run = on_gpu(duration=lambda *values: 2 * drawing_seconds(*values))(comparing)
    events, outputs = [compare.click, prompt.submit], [without, with_adapter, status]
    start_and_stop(gr, events, [stop.click], run, (gr.skip(), gr.skip(), STOPPED), inputs, outputs, "compare")
    gr.Examples([[text] for text in PROMPTS], [prompt], elem_id="compare-examples", api_visibility="private")
