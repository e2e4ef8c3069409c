"""LLaVA -> Pisces -> LLaVA with the two commands: how many tensors, settings, logits and tokens are the same.

`python -m benchmarks.llava_round_trip --output results/llava_round_trip.json`. The LLaVA is random and tiny, once with
a SigLIP and once with a CLIP tower, in bf16 as published ones are; its weights lie on disk under the Hub's names.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from modeling_pisces import PiscesForConditionalGeneration
from pisces_commands.arguments import LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


VOCABULARY, IMAGE, NEW_TOKENS = 320, 256, 24
TEXT = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
TEXT |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER |= {"image_size": 28, "patch_size": 7}
TOWERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "siglip": (TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}, "full", 16),
    "clip": (TOWER | {"model_type": "clip_vision_model"}, "default", 16),
}
HUB_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def write_llava(folder: Path, kind: str) -> None:
    """A random LLaVA in bf16, with its processor."""
    tower, strategy, _ = TOWERS[kind]
    config = LlavaConfig(
        text_config=TEXT, vision_config=tower, image_token_index=IMAGE, vision_feature_select_strategy=strategy
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        old, new = next((old, new) for old, new in HUB_NAMES if name.startswith(old))
        state[new + name.removeprefix(old)] = tensor.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<image>", "<pad>", "</s>"])
    size = {"height": tower["image_size"], "width": tower["image_size"]}
    is_clip = kind == "clip"
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size)
        if is_clip
        else SiglipImageProcessorPil(size=size),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"),
        patch_size=tower["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(is_clip),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def run(command: str, *arguments: str) -> None:
    """Run one command of the conversion room, as a user does."""
    subprocess.run([sys.executable, "-m", f"conversion.{command}", *arguments], check=True)


def compute(model_class: Any, folder: Path, num_vectors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens for one picture between words."""
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():  # fresh memory: alignment in the file would show in the last bits
        parameter.data = parameter.data.clone()
    torch.manual_seed(1)
    words = torch.randint(0, 250, (2, 12))
    ids = torch.cat([words[:, :5], torch.full((2, num_vectors), IMAGE), words[:, 5:]], dim=1)
    pixels = torch.randn(2, 3, TOWER["image_size"], TOWER["image_size"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    tokens = model.generate(**inputs, **options, suppress_tokens=[IMAGE], pad_token_id=257)
    return logits, tokens[:, ids.shape[1] :]


def measure(kind: str, work: Path) -> dict[str, Any]:
    """Go there and back, and count what is the same."""
    source, pisces, back = (work / f"{kind}-{name}" for name in ("llava", "pisces", "back"))
    write_llava(source, kind)
    run("from_llava", "--llava", str(source), "--output", str(pisces))
    run("to_llava", "--checkpoint", str(pisces), "--output", str(back))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    same = [name for name in before if name in after and torch.equal(before[name], after[name])]
    num_vectors = TOWERS[kind][2]
    logits, tokens = compute(LlavaForConditionalGeneration, source, num_vectors)
    result: dict[str, Any] = {
        "tensors": len(before),
        "identical_tensors": len(same),
        "new_tensors": len(after.keys() - before.keys()),
    }
    result["config_equal"] = (source / "config.json").read_text() == (back / "config.json").read_text()
    for name, model_class, folder in (
        ("pisces", PiscesForConditionalGeneration, pisces),
        ("llava_again", LlavaForConditionalGeneration, back),
    ):
        found, written = compute(model_class, folder, num_vectors)
        result[f"{name}_logits_difference"] = float((found - logits).abs().max())
        result[f"{name}_equal_greedy_tokens"] = f"{int((written == tokens).sum())} of {tokens.numel()}"
    with safe_open(pisces / "model.safetensors", "pt") as file:
        result["pisces_tensors"] = len(file.keys())
    return result


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    arguments = parser.parse_args()
    with TemporaryDirectory() as work:
        measured = {kind: measure(kind, Path(work)) for kind in TOWERS}
    write_result(arguments.output, "llava_round_trip", "every tensor, config and greedy token equal", measured)


if __name__ == "__main__":
    run_command(main)
