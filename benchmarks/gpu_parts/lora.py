"""LoRA on both sides at the size of Llama-3.1-8B on one GPU: tokens per second, utilisation, memory, by setting.

`benchmarks.gpu` calls it. Weights are random and made on the device. Rows are a mix of drawings, short and long
answers about a picture; towers are not run (their outputs come from a cache, see `finetune.precompute`), every weight
of the language model has an adapter.

Model FLOP utilisation = 4 N tokens/s / peak, where N counts the language model's parameters and tokens are real ones,
no padding: LoRA needs the forward pass (2 N) and the gradients of activations (2 N), not those of weights. The same
formula gives the public mark: 12,473 tokens/s are 402 TFLOP/s, 0.41 of one H100's 989. `mfu_without_embeddings` counts
the layers alone. Recomputation by gradient checkpointing is not counted as useful.
"""

import importlib.util
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetune.data.packing import pack_batch
from finetune.training import packed_attention
from finetune.training.adapters import AdapterConfig, add_adapter
from finetune.training.sft_trainer import peak_memory_gib
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration


PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}  # dense bf16, NVIDIA's data sheets of the SXM boards
IMAGE, GEN, GEN_START, GEN_END, PAD = range(1, 6)
FIRST_WORD = 10


@dataclass
class Preset:
    """Sizes of a model, and the settings it is measured with."""

    text: dict[str, Any]
    vision: dict[str, Any]
    gen_vision: dict[str, Any]
    tokens: tuple[int, ...]  # of one step
    dtype: torch.dtype


@dataclass
class Setting:
    """One line of the table."""

    tokens: int  # at most so many in one step, padding included
    packed: bool = True
    attention: str = packed_attention.NAME
    gradient_checkpointing: bool = False
    compiled: bool = False
    quantized: bool = False


PRESETS = {
    "8b": Preset(  # Llama-3.1-8B; the towers' widths are the paper's, their depth is one layer because they do not run
        text={
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        vision={"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384},
        gen_vision={"hidden_size": 1792, "intermediate_size": 15360, "num_attention_heads": 16, "image_size": 448},
        tokens=(4096, 8192, 16384),
        dtype=torch.bfloat16,
    ),
    "tiny": Preset(
        text={
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 56},
        gen_vision={"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 112},
        tokens=(512,),
        dtype=torch.float32,
    ),
}


def settings_of(preset: Preset, device: str) -> list[Setting]:
    """In the order of their value: packed at the middle size, padded, what else may be switched; 4 bits last.

    The quantized ones come together because they need a model of their own.
    """
    middle = Setting(sorted(preset.tokens)[len(preset.tokens) // 2])
    padded = replace(middle, packed=False, attention="sdpa")
    settings = [middle, padded, replace(middle, gradient_checkpointing=True), replace(middle, attention="sdpa")]
    if device == "cuda":
        settings.append(replace(middle, compiled=True))
    settings += [replace(middle, tokens=tokens) for tokens in preset.tokens if tokens != middle.tokens]
    if importlib.util.find_spec("bitsandbytes") is not None:
        smallest = Setting(min(preset.tokens) // 2, quantized=True)  # as finetune/configs/lora_joint_24gb.yaml
        settings += [replace(smallest, gradient_checkpointing=True), smallest]
    return settings


# ---- the model


def make_config(preset: Preset) -> PiscesConfig:
    tower = {"num_hidden_layers": 1, "patch_size": 14}
    return PiscesConfig(
        text_config={"model_type": "llama", "pad_token_id": PAD, **preset.text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower, **preset.vision},
        gen_vision_config={**tower, **preset.gen_vision},
        image_token_id=IMAGE,
        gen_image_token_id=GEN,
        gen_start_token_id=GEN_START,
        gen_end_token_id=GEN_END,
    )


def make_adapted(preset: Preset, device: str, quantized: bool) -> Any:
    """A random model, made where it will run, with an adapter on the whole language model; projectors and head too."""
    torch.manual_seed(0)
    with torch.device(device):
        model = PiscesForConditionalGeneration._from_config(make_config(preset), dtype=preset.dtype)
    if quantized:
        quantize(model.model.language_model, preset.dtype)
        model.is_loaded_in_4bit = True  # what from_pretrained would leave, and PEFT looks for
    settings = AdapterConfig(lora_r=16, lora_alpha=32, flavour="full")
    adapted = add_adapter(model, settings, sides=("understanding", "generation")).train()
    adapted.enable_input_require_grads()  # checkpointed layers need an input with a gradient
    return adapted


def quantize(language_model: nn.Module, dtype: torch.dtype) -> None:
    """Every linear layer of `language_model` to bitsandbytes' NF4, in place, as QLoRA loads it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear:
                continue
            sizes = (child.in_features, child.out_features)
            small = Linear4bit(*sizes, bias=child.bias is not None, compute_dtype=dtype, quant_type="nf4")
            device = child.weight.device
            small.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            setattr(module, name, small.to(device))


# ---- a batch


def make_sample(config: Any, rng: random.Random) -> tuple[list[int], list[int]]:
    """Ids and labels of a drawing (half of all samples), a short answer or a long one."""

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, config.text_config.vocab_size) for _ in range(count)]

    kind = rng.choice(("draw", "draw", "short", "long"))
    if kind == "draw":
        prompt, answer = words(40), [GEN_START, *[GEN] * config.num_gen_image_tokens, GEN_END]
    else:
        prompt = [*words(4), *[IMAGE] * config.num_image_tokens, *words(20)]
        answer = words(20 if kind == "short" else 400)
    return prompt + answer, [-100] * len(prompt) + answer


def make_batch(config: PiscesConfig, tokens: int, packed: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """As many samples as fit into `tokens`, in one packed row or in padded rows, with their cached vectors."""
    rng = random.Random(0)
    samples: list[tuple[list[int], list[int]]] = []
    while True:
        sample = make_sample(config, rng)
        lengths = [len(ids) for ids, _ in [*samples, sample]]
        if (sum(lengths) if packed else max(lengths) * len(lengths)) > tokens:
            break
        samples.append(sample)
    ids, labels = ([torch.tensor(sample[part]) for sample in samples] for part in (0, 1))
    batch: dict[str, Any] = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    num_tokens = int(batch["attention_mask"].sum())
    shown = int((batch["input_ids"] == IMAGE).sum()) // config.num_image_tokens
    drawn = int((batch["input_ids"] == GEN).sum()) // config.num_gen_image_tokens
    if packed:
        batch = pack_batch(batch, [len(samples)], pad_token_id=PAD)
    if shown:
        batch["image_features"] = torch.randn(shown, config.num_image_tokens, config.image_feature_size, dtype=dtype)
    if drawn:
        vectors = torch.randn(drawn, config.num_gen_image_tokens, config.gen_vector_size, dtype=dtype)
        batch["gen_image_vectors"] = vectors
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return {"batch": batch, "num_tokens": num_tokens, "num_samples": len(samples)}


# ---- a setting


def measure(model: Any, setting: Setting, preset: Preset, device: str, steps: int) -> dict[str, Any]:
    """Train `steps` steps after two that are not counted."""
    pisces = model.get_base_model()
    pisces.set_attn_implementation({"text_config": setting.attention})
    if setting.gradient_checkpointing:
        pisces.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        pisces.gradient_checkpointing_disable()
    if setting.compiled:
        for layer in pisces.model.language_model.layers:
            layer.compile()
    made = make_batch(pisces.config, setting.tokens, setting.packed, preset.dtype, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=preset.dtype == torch.bfloat16):
            loss = model(**made["batch"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = float(step())
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    last = float(loss)  # waits for the device
    step_s = (time.perf_counter() - start) / steps
    return report(pisces, made, step_s, device) | {"first_loss": round(first, 4), "last_loss": round(last, 4)}


def report(pisces: Any, made: dict[str, Any], step_s: float, device: str) -> dict[str, Any]:
    tokens_per_s = made["num_tokens"] / step_s
    text = pisces.config.text_config
    return {
        "num_samples": made["num_samples"],
        "num_tokens": made["num_tokens"],
        "padding": round(1 - made["num_tokens"] / made["batch"]["input_ids"].numel(), 3),
        "step_s": round(step_s, 4),
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": utilisation(num_parameters(text), tokens_per_s, device),
        "mfu_without_embeddings": utilisation(num_parameters(text, with_embeddings=False), tokens_per_s, device),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def num_parameters(text: Any, with_embeddings: bool = True) -> int:
    """Weights of a Llama's matrices, counted from its config, whatever form they have in memory."""
    width, kv_width = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * text.intermediate_size
    return text.num_hidden_layers * layer + with_embeddings * 2 * text.vocab_size * width


def utilisation(num_weights: int, tokens_per_s: float, device: str) -> float | None:
    """4 N tokens/s / peak; None where the peak is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    peak = next((tflops for board, tflops in PEAK_TFLOPS.items() if board in name), None)
    return None if peak is None else round(4 * num_weights * tokens_per_s / (peak * 1e12), 4)
