"""Chat templates with images for language models that were trained on other headers than Llama-3.1's.

`assemble` asks `make_chat_template` for the template of a tokenizer. A model's own template cannot simply be kept: it
takes a content to be one string and does not mark what the assistant says, so that neither images nor exact assistant
masks are possible. The few formats that published models use are a table here; each gives the text of the model's own
template for conversations without images.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from modeling_pisces.conversations_pisces import default_chat_template


@dataclass(frozen=True)
class ChatFormat:
    """How one family of language models writes turns. ROLE and EOS in a text stand for the role and the eos token.

    Args:
        marker: the special token by which the family is told.
        header: opens a turn of the user or the system.
        end: closes it.
        assistant_header: opens the assistant's turn.
        assistant_lead: stands before the assistant's words; the model writes it, so it is in the assistant mask.
        end_token: closes the assistant's turn and ends generation; in the mask too.
        after: follows it.
        has_system: whether there are system turns; otherwise the system's text opens the first user turn.
    """

    marker: str
    header: str
    end: str
    assistant_header: str
    end_token: str
    after: str
    assistant_lead: str = ""
    has_system: bool = True


# the published templates of Qwen2 and SmolLM2, Gemma 2, Mistral-Instruct v0.3 and Phi-3, without their tools
FORMATS = {
    "chatml": ChatFormat(
        marker="<|im_start|>",
        header="<|im_start|>ROLE\n",
        end="<|im_end|>\n",
        assistant_header="<|im_start|>assistant\n",
        end_token="<|im_end|>",
        after="\n",
    ),
    "gemma": ChatFormat(
        marker="<start_of_turn>",
        header="<start_of_turn>ROLE\n",
        end="<end_of_turn>\n",
        assistant_header="<start_of_turn>model\n",
        end_token="<end_of_turn>",
        after="\n",
        has_system=False,
    ),
    "mistral": ChatFormat(
        marker="[INST]",
        header="[INST] ",
        end="[/INST]",
        assistant_header="",
        assistant_lead=" ",
        end_token="EOS",
        after="",
        has_system=False,
    ),
    "phi": ChatFormat(
        marker="<|assistant|>",
        header="<|ROLE|>\n",
        end="<|end|>\n",
        assistant_header="<|assistant|>\n",
        end_token="<|end|>",
        after="\n",
    ),
}
# for language models that know no chat tokens
PLAIN = ChatFormat(marker="", header="ROLE: ", end="\n", assistant_header="assistant: ", end_token="EOS", after="\n")

# the loops over parts are written out, because servers look for them to learn that contents may be lists
_SKELETON = """\
BOS{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- ASSISTANT_HEADER }}
        {%- generation %}
            {{- ASSISTANT_LEAD }}
            {%- if message['content'] is string %}
                {{- message['content'] }}
            {%- else %}
                {%- for part in message['content'] %}
                    {{- GEN_IMAGE_TOKEN if part['type'] == 'image' else part['text'] }}
                {%- endfor %}
            {%- endif %}
            {{- END_TOKEN }}
        {%- endgeneration %}
        {{- AFTER }}
    {%- else %}
        HEADER_OF_TURN
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {{- IMAGE_TOKEN if part['type'] == 'image' else part['text'] }}
            {%- endfor %}
        {%- endif %}
        END_OF_TURN
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ASSISTANT_HEADER }}
{%- endif %}
"""
_DEFAULT_SYSTEM = """\
{%- if messages and messages[0]['role'] != 'system' %}
    {{- SYSTEM_TURN }}
{%- endif %}
"""
# a system turn and the user turn after it share one header and one end
_FOLDED_HEADER = "{%- if loop.first or loop.previtem['role'] != 'system' %}{{- HEADER }}{%- endif %}"
_FOLDED_END = "{{- '\\n\\n' if message['role'] == 'system' else END }}"
_PROBE = [
    {"role": "user", "content": "What is on the table?"},
    {"role": "assistant", "content": "Two red cups."},
    {"role": "user", "content": "And under it?"},
]


class ChatTemplate(NamedTuple):
    """A template and what is known about it.

    Args:
        template: Jinja.
        name: "llama3", one of `FORMATS`, "plain", or the file that the user gave.
        end_token: ends the assistant's turn.
        matches_own: whether a conversation without images reads as in the language model's own template; None: it has
            none.
    """

    template: str
    name: str
    end_token: str
    matches_own: bool | None


def make_chat_template(
    tokenizer: Any, image_token: str, gen_image_token: str, file: str | None = None
) -> ChatTemplate:
    """The template for a language model's tokenizer, which still has its own.

    Args:
        file: a template to take instead.
    """
    name = _format_name(tokenizer)
    form = FORMATS.get(name, PLAIN)
    end_token = "<|eot_id|>" if name == "llama3" else form.end_token.replace("EOS", tokenizer.eos_token)
    if file is not None:
        template, name = Path(file).read_text(encoding="utf-8"), Path(file).name
    elif name == "llama3":
        template = default_chat_template(image_token, gen_image_token)
    else:
        template = _fill_skeleton(form, tokenizer, image_token, gen_image_token)
    own = _render(tokenizer, _PROBE)
    matches_own = None if own is None else own == _render(tokenizer, _PROBE, template)
    return ChatTemplate(template, name, end_token, matches_own)


def _fill_skeleton(form: ChatFormat, tokenizer: Any, image_token: str, gen_image_token: str) -> str:
    header, end = ("{{- HEADER }}", "{{- END }}") if form.has_system else (_FOLDED_HEADER, _FOLDED_END)
    skeleton = _SKELETON.replace("HEADER_OF_TURN", header).replace("END_OF_TURN", end)
    system = _default_system(tokenizer, form)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = ("{{- bos_token }}\n" if adds_bos else "") + (_DEFAULT_SYSTEM if system else "")
    texts = {
        "GEN_IMAGE_TOKEN": gen_image_token,
        "IMAGE_TOKEN": image_token,
        "ASSISTANT_HEADER": form.assistant_header,
        "ASSISTANT_LEAD": form.assistant_lead,
        "SYSTEM_TURN": f"{form.header.replace('ROLE', 'system')}{system}{form.end}",
        "END_TOKEN": form.end_token,
        "AFTER": form.after,
        "HEADER": form.header,
        "END": form.end,
    }
    pattern = re.compile(rf"\b({'|'.join(texts)})\b")
    return pattern.sub(
        lambda match: _literal(texts[match.group()], tokenizer.eos_token), skeleton.replace("BOS", start, 1)
    )


def _literal(text: str, eos_token: str) -> str:
    """Text as a Jinja expression; the role is filled in while rendering."""
    parts = [json.dumps(part, ensure_ascii=False) for part in text.replace("EOS", eos_token).split("ROLE")]
    return " + message['role'] + ".join(parts)


def _format_name(tokenizer: Any) -> str:
    markers = {"llama3": "<|start_header_id|>", **{name: form.marker for name, form in FORMATS.items()}}
    own, added = str(tokenizer.chat_template or ""), tokenizer.get_added_vocab()
    for name, marker in markers.items():  # what it was trained on counts more than what it could write
        if marker in own:
            return name
    return next((name for name, marker in markers.items() if marker in added), "plain")


def _render(tokenizer: Any, messages: list[dict[str, str]], template: str | None = None) -> str | None:
    """Text of a conversation; without a template in the tokenizer's own, None where that has none or refuses."""
    if template is None and not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # templates refuse roles and orders as they like
        return None


def _default_system(tokenizer: Any, form: ChatFormat) -> str:
    """What the model's own template says to it when the user gives no system turn."""
    if not form.has_system:
        return ""
    header, end = form.header.replace("ROLE", "system"), form.end
    text = _render(tokenizer, _PROBE[:1]) or ""
    found = re.match(
        rf"(?:{re.escape(tokenizer.bos_token or '')})?{re.escape(header)}(.*?){re.escape(end)}", text, re.S
    )
    return found.group(1) if found else ""


__all__ = ["FORMATS", "ChatTemplate", "make_chat_template"]
