"""What each task of the project asks of a processor, as phases of FLOP and bytes, counted on the real classes.

A phase takes at least the longer of FLOP / (FLOP per second) and bytes / (bytes per second); a task at least the sum
of its phases. Bytes are the least that must move: every weight once per call, the cache once per step. Activations
that leave the caches of a processor come on top, so the result is a floor and no forecast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from benchmarks.floors.counting import count, use_counted_attention, weight_bytes
from benchmarks.floors.devices import Device
from benchmarks.floors.models import make_unet, make_vae
from modeling_pisces.placeholders_pisces import CACHE_NAME


PROMPT_TOKENS, ANSWER_TOKENS = 64, 32


@dataclass(frozen=True)
class Phase:
    """A call that a task makes `times` times."""

    name: str
    flop: float
    bytes: float
    times: int = 1
    operators: int = 0
    made_bytes: float = 0.0  # of all intermediate tensors

    def floor(self, device: Device) -> float:
        """Seconds of all calls together."""
        return self.times * max(self.flop / device.flops, self.bytes / device.bandwidth)

    def forecast(self, device: Device) -> float:
        """Seconds where nothing is fused: every operator is called by itself and writes what it makes to memory."""
        more = self.operators * device.operator_s + self.made_bytes / device.bandwidth
        return self.floor(device) + self.times * more


@dataclass(frozen=True)
class Task:
    """What a user waits for."""

    name: str
    phases: tuple[Phase, ...] = field(default_factory=tuple)

    @property
    def flop(self) -> float:
        return sum(phase.flop * phase.times for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes * phase.times for phase in self.phases)

    def floor(self, device: Device) -> float:
        return sum(phase.floor(device) for phase in self.phases)

    def forecast(self, device: Device) -> float:
        return sum(phase.forecast(device) for phase in self.phases)


def empty(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


# ---- the language model


def run_language_model(
    model: Any, rows: int, tokens: int, past: int = 0, keeps: bool = True, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states (rows, tokens, D) after `past` tokens that are in a cache already; on the meta device."""
    text, weight = model.config.text_config, model.lm_head.weight
    cache: Any = DynamicCache() if keeps else None
    heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    for layer in range(text.num_hidden_layers if past else 0):
        cache.update(*(empty(rows, heads, past, width, like=weight) for _ in range(2)), layer)
    return model.model.language_model(
        inputs_embeds=empty(rows, tokens, text.hidden_size, like=weight) if embeds is None else embeds,
        attention_mask=empty(1, 1, 1, 1, like=weight),  # 4-D: making one would look at values
        position_ids=torch.empty(rows, tokens, dtype=torch.long, device="meta"),
        use_cache=keeps,
        **{CACHE_NAME: cache},
    ).last_hidden_state


def cache_bytes(model: Any, rows: int, tokens: float) -> float:
    text = model.config.text_config
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return 2 * text.num_hidden_layers * rows * tokens * width * model.lm_head.weight.element_size()


def layer_bytes(model: Any) -> int:
    """Weights of the language model without its embedding, of which a step reads one row."""
    language_model = model.model.language_model
    return weight_bytes(language_model) - weight_bytes(language_model.get_input_embeddings())


def counted(name: str, run: Callable[[], Any], num_bytes: float, times: int = 1) -> Phase:
    with torch.no_grad():
        found = count(run)
    return Phase(name, found.flop, num_bytes, times, found.operators, found.made_bytes)


def _prefill_and_steps(
    model: Any, rows: int, prompt: int, steps: int, after: Callable[[torch.Tensor], Any], after_bytes: int
) -> tuple[Phase, Phase]:
    """The prompt, and `steps - 1` steps; each ends in `after(hidden states of (rows, D))`."""
    use_counted_attention(model.model.language_model)
    weights, past = layer_bytes(model), prompt + steps // 2  # a step in the middle stands for all: the cost is linear

    def prefill() -> None:
        after(run_language_model(model, rows, prompt)[:, -1])

    def step() -> None:
        after(run_language_model(model, rows, 1, past)[:, -1])

    return (
        counted("prompt", prefill, weights + after_bytes + cache_bytes(model, rows, prompt)),
        counted("step", step, weights + after_bytes + cache_bytes(model, rows, past), steps - 1),
    )


def question(model: Any) -> Task:
    """One picture, a question of 64 tokens, an answer of 32."""
    tower, projector, config = model.model.vision_tower, model.model.multi_modal_projector, model.config
    side, weight = config.vision_config.image_size, model.lm_head.weight

    def look() -> None:
        projector(tower(empty(1, 3, side, side, like=weight)).last_hidden_state)

    prompt = config.num_image_tokens + PROMPT_TOKENS
    head = model.lm_head
    return Task(
        f"one question ({prompt} tokens in, {ANSWER_TOKENS} out)",
        (
            counted("picture", look, weight_bytes(tower, projector)),
            *_prefill_and_steps(model, 1, prompt, ANSWER_TOKENS, head, weight_bytes(head)),
        ),
    )


def vectors(model: Any, batch: int = 1, guided: bool = False, flow_steps: int | None = None) -> Task:
    """All vectors of `batch` pictures from prompts of 64 tokens; with guidance the empty prompts run beside them."""
    parts, rows, num_vectors = model.model, batch * (2 if guided else 1), model.config.num_gen_image_tokens
    noise = empty(batch, model.config.gen_vector_size, like=model.lm_head.weight)

    def draw(hidden: torch.Tensor) -> None:
        scale = 3.0 if guided else None
        parts.embed_gen_vectors(parts.gen_head.sample(hidden, noise, flow_steps, scale))

    calls = (flow_steps or model.config.gen_flow_num_steps) if parts.gen_head.is_stochastic else 1
    read = calls * weight_bytes(parts.gen_head) + weight_bytes(parts.gen_projector)
    words = [f"{num_vectors} vectors", f"batch {batch}" if batch > 1 else "", "with guidance" if guided else ""]
    phases = _prefill_and_steps(model, rows, PROMPT_TOKENS, num_vectors, draw, read)
    return Task(", ".join(word for word in words if word), phases)


# ---- the decoder


def decoder(steps: int, vector_size: int, num_vectors: int, dtype: torch.dtype, guided: bool = True) -> Task:
    """SDXL's U-Net, `steps` calls of it, for one picture of 1024 px."""
    unet, rows = make_unet(vector_size, dtype), 2 if guided else 1
    weight = next(unet.parameters())
    added = {"text_embeds": empty(rows, vector_size, like=weight), "time_ids": empty(rows, 6, like=weight)}

    def step() -> None:
        unet(
            empty(rows, 4, 128, 128, like=weight),
            torch.empty((), device="meta"),
            encoder_hidden_states=empty(rows, num_vectors, vector_size, like=weight),
            added_cond_kwargs=added,
        )

    name = f"{steps} decoder steps, 1024 px" + (", with guidance" if guided else "")
    return Task(name, (counted("U-Net", step, weight_bytes(unet), steps),))


def vae(dtype: torch.dtype) -> Task:
    """SDXL's VAE, latents to pixels at 1024 px."""
    model = make_vae(dtype)
    latents = empty(1, 4, 128, 128, like=next(model.parameters()))
    read = weight_bytes(model.decoder, model.post_quant_conv)
    return Task("VAE, 1024 px", (counted("decode", lambda: model.decode(latents), read),))
