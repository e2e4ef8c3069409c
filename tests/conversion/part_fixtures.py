"""Tiny public parts on disk: real class names, real key names, real file layouts, random weights.

What a user would download (a language model with its tokenizer, a SigLIP or CLIP pair, a generation tower, a decoder)
at a width of a few dozen. Every test of the conversion room builds its inputs here.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)

from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel


# the order and the gaps of the published tokenizer: four reserved tokens come before, between and after others
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 8)),
]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISTRAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]

# Qwen2's template without its tools: a default system prompt, and no {% generation %} markers
CHATML_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# per kind of tokenizer: special tokens, (bos, eos, pad), whether it puts bos in front, chat template
_TOKENIZERS = {
    "llama3": (LLAMA_TOKENS, ("<|begin_of_text|>", "<|eot_id|>", None), True, None),
    "chatml": (CHATML_TOKENS, (None, "<|im_end|>", "<|endoftext|>"), False, CHATML_TEMPLATE),
    "mistral": (MISTRAL_TOKENS, ("<s>", "</s>", None), True, None),
    "base": (["<|endoftext|>"], ("<|endoftext|>", "<|endoftext|>", None), False, None),
}
TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
PAIR_TEXT_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 8,
}
GEN_VISION_SIZES = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "output_size": 12,
}


def make_part_tokenizer(kind: str = "llama3") -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, with the special tokens and habits of one family of language models."""
    special, (bos, eos, pad), adds_bos, template = _TOKENIZERS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    steps = [processors.ByteLevel(trim_offsets=False)]
    if adds_bos:
        token = (bos, backend.token_to_id(bos))
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[token])
        )
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write_language_model(
    folder: Path,
    model_type: str = "llama",
    tokenizer: str | None = "llama3",
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    license: str | None = "llama3.1",
    max_shard_size: str = "50GB",
    **sizes,
) -> Path:
    """Write a causal language model as its own class saves it, with tokenizer, generation config and card.

    Args:
        model_type: "llama", "qwen2", "mistral", ... ; SmolLM is "llama" with `tie_word_embeddings=True`.
        tokenizer: "llama3", "chatml", "mistral" or "base"; None writes none.
        vocab_size: rows of the embedding; None takes exactly the tokenizer's length.
    """
    tokens = make_part_tokenizer(tokenizer or "llama3")
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size or len(tokens), **{**TEXT_SIZES, **ids, **sizes})
    torch.manual_seed(seed)
    model = _spread(AutoModelForCausalLM.from_config(config)).to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, do_sample=True, temperature=0.6, top_p=0.9
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokens.save_pretrained(folder)
    _write_card(folder, license)
    return folder


def write_siglip(folder: Path, with_text: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1, **sizes):
    """Write a SigLIP (or fixed-size SigLIP2, which is the same class): the whole pair, or its vision half alone."""
    vision = {**VISION_SIZES, **sizes}
    config = SiglipConfig(text_config=PAIR_TEXT_SIZES, vision_config=vision)
    torch.manual_seed(seed)
    model = SiglipModel(config) if with_text else SiglipVisionModel(config.vision_config)
    _spread(model).to(dtype).save_pretrained(folder)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)
    _write_card(folder, "apache-2.0")
    return folder


def write_clip(
    folder: Path, with_text: bool = True, dtype: torch.dtype = torch.float32, seed: int = 2, **sizes
) -> Path:
    """Write a CLIP: the whole pair, or its vision half alone."""
    vision = {**VISION_SIZES, **sizes}
    config = CLIPConfig(text_config=PAIR_TEXT_SIZES, vision_config=vision, projection_dim=16)
    torch.manual_seed(seed)
    model = CLIPModel(config) if with_text else CLIPVisionModel(config.vision_config)
    _spread(model).to(dtype).save_pretrained(folder)
    side = vision["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    _write_card(folder, "mit")
    return folder


def write_gen_tower(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 3, **sizes) -> Path:
    """Write a generation tower with its image processor, as `conversion.from_emu2_gen` leaves one."""
    config = PiscesGenVisionConfig(**{**GEN_VISION_SIZES, **sizes})
    torch.manual_seed(seed)
    _spread(PiscesGenVisionModel(config)).to(dtype).save_pretrained(folder)
    side = {"height": config.image_size, "width": config.image_size}
    CLIPImageProcessorPil(size=side, do_center_crop=False, crop_size=side).save_pretrained(folder)
    _write_card(folder, None)
    return folder


def write_decoder(folder: Path, gen_vector_size: int = 12, seed: int = 4) -> Path:
    """Write a diffusers folder whose U-Net reads vectors of that width: unet/, vae/, scheduler/, model_index.json."""
    from tests.modeling_pisces.pipeline.pipeline_fixtures import make_pipeline

    make_pipeline(unet={"seed": seed, "cross_attention_dim": gen_vector_size}).save_pretrained(folder)
    _write_card(folder, "openrail++")
    return folder


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than at a real start, so that outputs depend on inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def _write_card(folder: Path, license: str | None) -> None:
    if license is not None:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n# A tiny part\n", encoding="utf-8")


def change_json(path: Path, **changes) -> None:
    """Set entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
