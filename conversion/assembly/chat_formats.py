"""Chat templates with images for any language model: its own way of writing turns, with places for pictures.

`assemble` asks `make_chat_template` for the template of a tokenizer. A model's own template cannot simply be kept: it
takes a content to be one string and does not mark what the assistant says, so that neither images nor exact assistant
masks are possible. So its texts are read off it (`chat_probe`) and put into a template of ours, which must render the
same; where it cannot, assembling stops and asks. For language models without a template there is a table.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from conversion.assembly.chat_probe import ChatFormat, UnreadableFormat, differing_probe, read_own_format
from modeling_pisces.conversations_pisces import default_chat_template


# by the special token that tells the family; of Qwen2 and SmolLM2, Gemma, Mistral-Instruct v0.3, Phi-3 and Zephyr
FAMILIES: dict[str, tuple[str, ChatFormat]] = {
    "chatml": (
        "<|im_start|>",
        ChatFormat(
            start="",
            system_start="<|im_start|>system\n",
            system_header="<|im_start|>system\n",
            system_end="<|im_end|>\n",
            user_header="<|im_start|>ROLE\n",
            user_end="<|im_end|>\n",
            assistant_header="<|im_start|>assistant\n",
            end="<|im_end|>",
            end_token="<|im_end|>",
            after="\n",
        ),
    ),
    "gemma": (
        "<start_of_turn>",
        ChatFormat(
            start="",
            system_start="<start_of_turn>user\n",
            system_header="<start_of_turn>user\n",
            system_end="\n\n",
            user_header="<start_of_turn>user\n",
            user_end="<end_of_turn>\n",
            assistant_header="<start_of_turn>model\n",
            end="<end_of_turn>",
            end_token="<end_of_turn>",
            after="\n",
            folds=True,
        ),
    ),
    "mistral": (
        "[INST]",
        ChatFormat(
            start="",
            system_start="[INST] ",
            system_header="[INST] ",
            system_end="\n\n",
            user_header="[INST] ",
            user_end="[/INST]",
            assistant_header="",
            lead=" ",
            final_lead=" ",
            end="EOS",
            end_token="EOS",
            after="",
            folds=True,
        ),
    ),
    "phi": (
        "<|end|>",
        ChatFormat(
            start="",
            system_start="<|system|>\n",
            system_header="<|system|>\n",
            system_end="<|end|>\n",
            user_header="<|ROLE|>\n",
            user_end="<|end|>\n",
            assistant_header="<|assistant|>\n",
            end="<|end|>",
            end_token="<|end|>",
            after="\n",
        ),
    ),
    "zephyr": (
        "<|assistant|>",
        ChatFormat(
            start="",
            system_start="<|system|>\n",
            system_header="<|system|>\n",
            system_end="EOS\n",
            user_header="<|ROLE|>\n",
            user_end="EOS\n",
            assistant_header="<|assistant|>\n",
            end="EOS",
            end_token="EOS",
            after="\n",
        ),
    ),
}
# For language models that know no chat tokens. The space before an answer is the assistant's: byte-level tokenizers
# join it with the word behind it, and a prompt that ended in a lone space would end otherwise than any training row.
PLAIN = ChatFormat(
    start="",
    system_start="system: ",
    system_header="system: ",
    system_end="\n",
    user_header="ROLE: ",
    user_end="\n",
    assistant_header="assistant:",
    lead=" ",
    final_lead=" ",
    end="EOS",
    end_token="EOS",
    after="\n",
)
FORMATS = {name: form for name, (_, form) in FAMILIES.items()} | {"plain": PLAIN}
FORMAT_NAMES = ("llama3", *FORMATS)

# the loops over parts are written out, because servers look for them to learn that contents may be lists
_SKELETON = """\
{%- if messages and messages[0]['role'] == 'system' %}
    {{- SYSTEM_START }}
{%- else %}
    {{- CONVERSATION_START }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- ASSISTANT_HEADER }}
        {%- generation %}
            {%- set first = none if message['content'] is string else message['content'] | first %}
            {%- if not first or first['type'] != 'image' %}{{- ANSWER_LEAD }}{%- endif %}
            {%- if message['content'] is string %}
                {{- message['content']TRIM_ANSWER }}
            {%- else %}
                {%- for part in message['content'] %}
                    {{- GEN_IMAGE_TOKEN if part['type'] == 'image' else (part['text']TRIM_PART_OF_ANSWER) }}
                {%- endfor %}
            {%- endif %}
            {{- ANSWER_END }}
        {%- endgeneration %}
        {{- AFTER_ANSWER }}
    {%- else %}
        {%- if message['role'] == 'system' %}
            {%- if not loop.first %}{{- SYSTEM_HEADER }}{%- endif %}
        USER_HEADER_OF_TURN
        {%- endif %}
        {%- if message['content'] is string %}
            {{- message['content']TRIM_ASKED }}
        {%- else %}
            {%- for part in message['content'] %}
                {{- IMAGE_TOKEN if part['type'] == 'image' else (part['text']TRIM_PART_OF_ASKED) }}
            {%- endfor %}
        {%- endif %}
        {{- SYSTEM_END if message['role'] == 'system' else USER_END }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ASSISTANT_HEADER }}
{%- endif %}
"""
_USER_HEADER = "{%- else %}{{- USER_HEADER }}"
# a system turn and the user turn after it share one header and one end
_FOLDED_HEADER = "{%- elif loop.first or loop.previtem['role'] != 'system' %}{{- USER_HEADER }}"


class ChatTemplate(NamedTuple):
    """A template and what is known about it.

    Args:
        template: Jinja.
        name: a word of `FORMAT_NAMES`, "own" (read off the language model's template), or the user's file.
        end_token: ends the assistant's turn.
        matches_own: whether conversations without images read as in the language model's own template; None: it has
            none.
    """

    template: str
    name: str
    end_token: str
    matches_own: bool | None


def make_chat_template(
    tokenizer: Any,
    image_token: str,
    gen_image_token: str,
    file: str | None = None,
    chat_format: str | None = None,
) -> ChatTemplate:
    """The template for a language model's tokenizer, which still has its own.

    Args:
        file: a template to take instead.
        chat_format: a word of `FORMAT_NAMES` to take instead of what the tokenizer shows.

    Raises:
        ValueError: the model's own template cannot be followed, or its turns would end in no token.
    """
    name, form, problem = _choose_format(tokenizer, chat_format)
    end_token = "<|eot_id|>" if form is None else form.end_token
    if file is not None:
        template, name = Path(file).read_text(encoding="utf-8"), Path(file).name
    elif problem is not None:
        raise ValueError(
            f"the language model's own chat template cannot be followed with pictures: {problem}. Choose how turns "
            f"are written with --chat_format ({', '.join(FORMAT_NAMES)}), or give a template: --chat_template FILE."
        )
    elif form is None:
        template = default_chat_template(image_token, gen_image_token)
    else:
        template = fill_skeleton(form, image_token, gen_image_token)
    _check_end_token(tokenizer, end_token, name)
    matches_own = None if not tokenizer.chat_template else differing_probe(tokenizer, template) is None
    return ChatTemplate(template, name, end_token, matches_own)


def _choose_format(tokenizer: Any, chosen: str | None) -> tuple[str, ChatFormat | None, str | None]:
    """Name, format (None: Llama-3's, which is the package's own), and why the model's own cannot be followed."""
    if chosen is not None:
        return chosen, None if chosen == "llama3" else _of_tokenizer(FORMATS[chosen], tokenizer), None
    if tokenizer.chat_template:
        try:
            form = read_own_format(tokenizer)
        except UnreadableFormat as error:
            return "own", _of_tokenizer(PLAIN, tokenizer), str(error)
        probe = differing_probe(tokenizer, fill_skeleton(form, "<image>", "<gen>"))
        return _family_name(tokenizer.chat_template), form, f"{probe} differs" if probe else None
    added = tokenizer.get_added_vocab()
    if "<|start_header_id|>" in added:
        return "llama3", None, None
    name = next((name for name, (marker, _) in FAMILIES.items() if marker in added), "plain")
    return name, _of_tokenizer(FORMATS[name], tokenizer), None


def _family_name(template: str) -> str:
    """A word for the report: the family whose marker the template writes, where it is told by nothing else."""
    others = ("<|im_sep|>", "<<SYS>>", "<｜", "<think>")
    if any(mark in template for mark in others):
        return "own"
    markers = {"llama3": "<|start_header_id|>", **{name: marker for name, (marker, _) in FAMILIES.items()}}
    return next((name for name, marker in markers.items() if marker in template), "own")


def _of_tokenizer(form: ChatFormat, tokenizer: Any) -> ChatFormat:
    """A format of the table with this tokenizer's end token, and its begin token where it puts one."""
    eos = tokenizer.eos_token or ""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    texts: dict[str, Any] = {
        name: value.replace("EOS", eos) if isinstance(value, str) else value for name, value in vars(form).items()
    }
    begin = tokenizer.bos_token if adds_bos else ""
    texts |= {name: begin + texts[name] for name in ("start", "system_start")}
    return ChatFormat(**texts)


def _check_end_token(tokenizer: Any, end_token: str, name: str) -> None:
    known = tokenizer.convert_tokens_to_ids(end_token) if end_token else None
    if known is None or known == tokenizer.unk_token_id:
        raise ValueError(
            f"chat format {name}: the tokenizer has no token {end_token or 'eos'!r} that could end an answer. Give it "
            "an eos_token in tokenizer_config.json, or choose another --chat_format."
        )


def fill_skeleton(form: ChatFormat, image_token: str, gen_image_token: str) -> str:
    """The Jinja template of a format."""
    lead = _literal(form.lead)
    if form.final_lead != form.lead:
        lead = f"({_literal(form.final_lead)} if loop.last else {lead})"
    expressions = {
        "GEN_IMAGE_TOKEN": _literal(gen_image_token),
        "IMAGE_TOKEN": _literal(image_token),
        "SYSTEM_START": _literal(form.system_start),
        "CONVERSATION_START": _literal(form.start),
        "ASSISTANT_HEADER": _literal(form.assistant_header),
        "ANSWER_LEAD": lead,
        "ANSWER_END": _literal(form.end),
        "AFTER_ANSWER": _literal(form.after),
        "SYSTEM_HEADER": _literal(form.system_header),
        "SYSTEM_END": _literal(form.system_end),
        "USER_HEADER": " + message['role'] + ".join(map(_literal, form.user_header.split("ROLE"))),
        "USER_END": _literal(form.user_end),
    }
    for name, condition in (("ANSWER", _always(form.trims_answer)), ("ASKED", _trimmed_roles(form))):
        # a part that stands beside others keeps its spaces: they part it from them
        alone = " and message['content'] | length == 1"
        expressions[f"TRIM_{name}"] = f" | trim if {condition} else message['content']" if condition else ""
        expressions[f"TRIM_PART_OF_{name}"] = f" | trim if {condition}{alone} else part['text']" if condition else ""
    skeleton = _SKELETON.replace("USER_HEADER_OF_TURN", _FOLDED_HEADER if form.folds else _USER_HEADER)
    pattern = re.compile("|".join(sorted(expressions, key=len, reverse=True)))
    return pattern.sub(lambda match: expressions[match.group()], skeleton)


def _always(flag: bool) -> str:
    return "true" if flag else ""


def _trimmed_roles(form: ChatFormat) -> str:
    """A Jinja condition for a turn that is not the assistant's; empty where none loses its spaces."""
    if form.trims_user and form.trims_system:
        return "true"
    if form.trims_user:
        return "message['role'] != 'system'"
    return "message['role'] == 'system'" if form.trims_system else ""


def _literal(text: str) -> str:
    """Text as a Jinja expression."""
    return json.dumps(text, ensure_ascii=False)


__all__ = ["FORMATS", "FORMAT_NAMES", "ChatTemplate", "fill_skeleton", "make_chat_template"]
