"""Tiny, random, seeded stand-ins for a Pisces checkpoint, built in milliseconds and without files.

Used by the tests of every room. The shapes are small and all different, so that a mix-up of two of them fails.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesProcessor


SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
    "<|image|>",
    "<|gen_image|>",
    "<|gen_start|>",
    "<|gen_end|>",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges (one token per byte) and Llama-3.1's habits; padding on the left, to generate."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    bos = SPECIAL_TOKENS[0]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,  # as Llama-3.1
    )


def make_processor(
    image_size: int = 12, gen_image_size: int = 16, num_image_tokens: int = 9, num_gen_image_tokens: int = 4, **kwargs
) -> PiscesProcessor:
    """A processor of two stock image processors; PIL backend, because torchvision is not a dependency."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    size, gen_size = {"height": image_size, "width": image_size}, {"height": gen_image_size, "width": gen_image_size}
    return PiscesProcessor(
        image_processor=SiglipImageProcessorPil(size=size),
        gen_image_processor=CLIPImageProcessorPil(size={"shortest_edge": gen_image_size}, crop_size=gen_size),
        tokenizer=make_tokenizer(),
        num_image_tokens=num_image_tokens,
        num_gen_image_tokens=num_gen_image_tokens,
        **kwargs,
    )


def make_config(**overrides) -> PiscesConfig:
    """The config that fits `make_processor()`: N = 9, M = 4, D = 32, Dg = 12, two layers everywhere."""
    ids = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
    settings = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": ids["<|begin_of_text|>"],
            "eos_token_id": ids["<|eot_id|>"],
            "pad_token_id": ids["<|pad|>"],
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "gen_vision_config": {
            "hidden_size": 20,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "output_size": 12,
        },
        "gen_pool_stride": 2,
        "gen_flow_num_layers": 2,
        "gen_flow_num_steps": 3,
        "image_token_id": ids["<|image|>"],
        "gen_image_token_id": ids["<|gen_image|>"],
        "gen_start_token_id": ids["<|gen_start|>"],
        "gen_end_token_id": ids["<|gen_end|>"],
    }
    return PiscesConfig(**(settings | overrides))


def make_model(seed: int = 0, **overrides) -> PiscesForConditionalGeneration:
    """A random model in evaluation mode. Weights are larger than at a real start, so that outputs depend on inputs."""
    torch.manual_seed(seed)
    model = PiscesForConditionalGeneration(make_config(initializer_range=0.2, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model
