"""Drawing on one device with random weights: the vectors beside their computed floor, and a picture end to end.

`benchmarks.gpu` calls it. A floor is what `benchmarks.floors` computes for the device by its data sheet; where the
device has none here, as a processor, there is no floor and no ratio.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

from benchmarks.floors.devices import DEVICES, Device
from benchmarks.floors.models import SDXL_UNET, SDXL_VAE
from benchmarks.floors.work import vectors
from benchmarks.gpu_parts.lora import FIRST_WORD, GEN_START, Preset, make_config
from modeling_pisces import PiscesForConditionalGeneration
from modeling_pisces.pipeline_pisces import PiscesPipeline


PROMPT_TOKENS, GUIDANCE = 64, 3.0
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
TINY_VAE = {
    "sample_size": 16,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# name, rows, options of `generate`
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("batch 1", 1, {}),
    ("batch 1, with guidance", 1, {"guidance_scale": GUIDANCE}),
    ("batch 1, static cache, compiled on a GPU", 1, {"cache_implementation": "static"}),
    ("batch 32", 32, {}),
)


def known_device(device: str) -> Device | None:
    """The data sheet of the device in use, if there is one here."""
    if device != "cuda":
        return None
    words = re.split(r"[ -]", torch.cuda.get_device_name())  # "NVIDIA A100-SXM4-80GB"
    return next((sheet for sheet in DEVICES if re.findall(r"\w*\d\w*", sheet.name)[0] in words), None)


def make_drawer(preset: Preset, device: str, head: str = "mlp") -> PiscesForConditionalGeneration:
    """A random model made where it will run; its towers are one layer deep, because drawing does not run them."""
    torch.manual_seed(0)
    config = make_config(preset)
    config.gen_head_type = head  # type: ignore[assignment]
    with torch.device(device):
        return PiscesForConditionalGeneration._from_config(config, dtype=preset.dtype).eval()


def timed(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds after one call that is not counted."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(repeats))


def draw_vectors(model: Any, rows: int, options: dict[str, Any]) -> torch.Tensor:
    vocabulary = model.config.text_config.vocab_size
    input_ids = torch.randint(FIRST_WORD, vocabulary, (rows, PROMPT_TOKENS), device=model.device)
    input_ids[:, -1] = GEN_START
    more = {"negative_prompt_ids": torch.tensor([[0, GEN_START]])} if "guidance_scale" in options else {}
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids=input_ids, attention_mask=mask, generation_mode="image", **options, **more)


def measure_vectors(preset: Preset, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One line for each case, with the floor of the same work."""
    model = make_drawer(preset, device)
    with torch.device("meta"):
        shape = PiscesForConditionalGeneration._from_config(make_config(preset), dtype=preset.dtype).eval()
    sheet = known_device(device)
    for name, rows, options in CASES:
        seconds = timed(partial(draw_vectors, model, rows, options), device, repeats)
        line: dict[str, Any] = {"case": name, "seconds": round(seconds, 4), "per_picture_s": round(seconds / rows, 4)}
        if sheet is not None:
            floor = vectors(shape, rows, "guidance_scale" in options).floor(sheet)
            line |= {"floor_s": round(floor, 4), "over_floor": round(seconds / floor, 3)}
        yield line


def make_pipeline(preset: Preset, device: str) -> PiscesPipeline:
    """The whole of it, without a processor: SDXL's sizes beside an 8B model, a toy's beside a toy."""
    model = make_drawer(preset, device)
    is_large, size = preset.text["hidden_size"] > 1024, model.config.gen_vector_size
    unet, vae = (SDXL_UNET, SDXL_VAE) if is_large else (TINY_UNET, TINY_VAE)
    added = size + 6 * int(str(unet["addition_time_embed_dim"]))
    torch.manual_seed(0)
    with torch.device(device):
        decoder = UNet2DConditionModel(**unet, cross_attention_dim=size, projection_class_embeddings_input_dim=added)
        pixels = AutoencoderKL(**vae)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    parts = decoder.to(preset.dtype).eval(), scheduler, pixels.to(preset.dtype).eval()
    pipeline = PiscesPipeline(*parts, vision_language_model=model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_picture(preset: Preset, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Vectors with guidance, then the decoder with guidance to pixels, by its steps."""
    pipeline = make_pipeline(preset, device)
    model = pipeline.vision_language_model

    def picture(steps: int) -> None:
        found = draw_vectors(model, 1, {"guidance_scale": GUIDANCE})
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        pipeline(image_vectors=found, negative_image_vectors=torch.zeros_like(found), **options)

    side = pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    for steps in (25, 50, 8):
        seconds = timed(partial(picture, steps), device, repeats)
        yield {"case": f"{side} px, {steps} steps, guidance on both sides", "seconds": round(seconds, 3)}
