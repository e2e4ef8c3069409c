"""How `verify` runs each kind of part alone and inside a checkpoint, on one input.

One function per role takes the opened part and the whole model and yields what was compared and the largest relative
difference. Parts are loaded with stock classes of transformers and diffusers, in the checkpoint's dtype, and run in
fp32. The verdict is `verify`'s.
"""

# N understanding vectors per image, M generated vectors per image, Dg width of a generated vector
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from conversion.assembly.parts import Part
from conversion.checks.probe import NUM_WORDS, largest_difference, make_probe, random_pixels, random_words, text_logits
from modeling_pisces import PiscesForConditionalGeneration, PiscesGenVisionModel, PiscesProcessor
from modeling_pisces.checkpoint.files import read_json
from modeling_pisces.checkpoint.loading import load_model
from modeling_pisces.configuration_pisces import num_patches


Compared = Iterator[tuple[str, float]]
TEXTS = (
    "Two dogs play in the snow.",
    "  def f(x):\n\treturn x ** 2  # ünïcödé ✓",
    "数字 1234567890, and a URL: https://example.org/?a=b&c=d",
)


@dataclass(frozen=True)
class WholeModel:
    """The checkpoint that is verified: its folder, the model in fp32 with weights as stored, and the processor."""

    folder: Path
    model: PiscesForConditionalGeneration
    processor: PiscesProcessor
    dtype: torch.dtype

    @classmethod
    def load(cls, folder: Path) -> "WholeModel":
        model, processor = load_model(folder, device="cpu")
        return cls(folder, model.float(), processor, model.config.dtype or torch.float32)


def _load_alone(auto_class: Any, part: Part, whole: WholeModel) -> Any:
    """The part through a stock class, rounded as the checkpoint is, with every weight accounted for."""
    model, report = auto_class.from_pretrained(part.path, dtype=whole.dtype, output_loading_info=True)
    if missing := sorted(map(str, report["missing_keys"])):
        raise ValueError(f"{part.role} {part.name}: {missing[0]} is missing; alone it would start at random.")
    return model.eval().float()


@torch.no_grad()
def compare_language_model(part: Part, whole: WholeModel) -> Compared:
    """Logits of the tokens that the language model knew, and what the two tokenizers make of some texts."""
    alone = _load_alone(AutoModelForCausalLM, part, whole)
    tokenizer = AutoTokenizer.from_pretrained(part.path, trust_remote_code=False)
    count = min(max(tokenizer.get_vocab().values()) + 1, alone.config.vocab_size)  # rows behind it may be new
    words = random_words(whole.model.config, 4 * NUM_WORDS, torch.Generator().manual_seed(0), last=count)[None]
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    yield "text logits", largest_difference(_logits(whole.model, inputs, count), _logits(alone, inputs, count))
    yield "tokens", _token_difference(whole.processor.tokenizer, tokenizer)


def _logits(model: Any, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    return text_logits(model, inputs)[..., :count]


def _token_difference(found: Any, expected: Any) -> float:
    """Share of the texts that the two tokenizers cut differently."""
    pairs = [(found(text)["input_ids"], expected(text)["input_ids"]) for text in TEXTS]
    return sum(ours != theirs for ours, theirs in pairs) / len(pairs)


@torch.no_grad()
def compare_vision_tower(part: Part, whole: WholeModel) -> Compared:
    """The tower's output for one picture, through `get_image_features`."""
    pixels = random_pixels(whole.model.config.vision_config, torch.Generator().manual_seed(0))
    expected = _tower(part, whole)(pixels).last_hidden_state
    found = whole.model.get_image_features(pixels, return_dict=True).last_hidden_state
    yield "patches of one picture", largest_difference(found, expected)


@torch.no_grad()
def compare_gen_vision_tower(part: Part, whole: WholeModel) -> Compared:
    """The vectors of one picture, through `encode_gen_images`; the part's patches are averaged here."""
    config = whole.model.config
    pixels = random_pixels(config.gen_vision_config, torch.Generator().manual_seed(0))
    patches = _tower(part, whole)(pixels).last_hidden_state[:, -num_patches(config.gen_vision_config) :]
    side = isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, Dg, side, side)
    expected = torch.nn.functional.avg_pool2d(grid, config.gen_pool_stride).flatten(2).transpose(1, 2)
    yield "vectors of one picture", largest_difference(whole.model.encode_gen_images(pixels), expected)


def _tower(part: Part, whole: WholeModel) -> Any:
    if part.pisces is not None:
        origin, _ = load_model(part.path, device="cpu")
        return getattr(origin.to(whole.dtype).float().model, part.role)
    is_own = part.config.model_type == PiscesGenVisionModel.config_class.model_type
    model = _load_alone(PiscesGenVisionModel if is_own else AutoModel, part, whole)
    return getattr(model, "vision_model", model)  # of a SigLIP or CLIP pair


@torch.no_grad()
def compare_llava(part: Part, whole: WholeModel) -> Compared:
    """Logits of a prompt with a picture, and tokens."""
    alone = _load_alone(LlavaForConditionalGeneration, part, whole)
    probe = make_probe(whole.model.config)
    found = text_logits(whole.model, probe)
    yield "logits with a picture", largest_difference(found, text_logits(alone, probe)[..., : found.shape[-1]])
    tokenizer = AutoTokenizer.from_pretrained(part.path, trust_remote_code=False)
    yield "tokens", _token_difference(whole.processor.tokenizer, tokenizer)


@torch.no_grad()
def compare_decoder(part: Part, whole: WholeModel) -> Compared:
    """One step of the pipeline on random vectors: what its U-Net and its VAE returned, against the part's own."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from modeling_pisces.pipeline_pisces import PiscesPipeline

    config = whole.model.config
    pipe = PiscesPipeline.from_pretrained(whole.folder, load_language_model=False, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, config.num_gen_image_tokens, config.gen_vector_size, generator=generator)
    components = {"unet": ("forward", UNet2DConditionModel, "noise predicted by the U-Net")}
    if read_json(part.path / "model_index.json").get("vae", [None])[0] is not None:
        components["vae"] = ("decode", AutoencoderKL, "picture decoded by the VAE")
    calls = {name: _record(getattr(pipe, name), method) for name, (method, _, _) in components.items()}
    pipe(image_vectors=vectors, num_inference_steps=1, guidance_scale=1.0, generator=generator, output_type="pt")
    for name, (method, component_class, compared) in components.items():
        alone = component_class.from_pretrained(part.path / name, torch_dtype=torch.float32).eval()
        arguments, options, found = calls[name][0]
        expected = getattr(alone, method)(*arguments, **options)
        yield compared, largest_difference(_first(found), _first(expected))


def _record(module: Any, method: str) -> list[tuple[tuple, dict, Any]]:
    """Note arguments and result of every call of a method from now on."""
    original, calls = getattr(module, method), []

    def recorded(*arguments, **options):
        result = original(*arguments, **options)
        calls.append((arguments, options, result))
        return result

    setattr(module, method, recorded)
    return calls


def _first(output: Any) -> torch.Tensor:
    return output[0]  # a tuple or diffusers' output object


COMPARISONS: dict[str, Callable[[Part, WholeModel], Compared]] = {
    "language_model": compare_language_model,
    "vision_tower": compare_vision_tower,
    "gen_vision_tower": compare_gen_vision_tower,
    "decoder": compare_decoder,
    "llava": compare_llava,
}

__all__ = ["COMPARISONS", "WholeModel"]
