"""`conversion.assemble` on random bf16 language models of several sizes: peak memory, and speed against `cp`.

`python -m benchmarks.assemble --output results/assemble.json`. Each run of assemble is a fresh process. It first
assembles something tiny, so that everything is imported, and then reports its peak memory before and after the run to
measure. `cp` copies the files of the same parts on the same disk, in turn with assemble; both end when their bytes are
on the disk. Both start alike, after the same imports: right after large files were removed, memory is at hand that a
virtual machine otherwise has to get from its host, page by page.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pisces_commands.arguments import COUNT, LineParser, finite_number
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


BAR = "excess memory <= largest shard + 1 GB at every size, slope about 0; speed >= 0.7 of cp"
REPOSITORY = Path(__file__).parents[1]
GB = 10**9
# a layer of Llama-3.1-8B with everything halved: 109 MB in bf16, its largest tensor 29 MB
SIZES = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
CHILD = """
import json, sys, time
from benchmarks.assemble import copy
from conversion.assemble import main

def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

what, warm_up, measured = json.loads(sys.argv[1])
main(warm_up)
imported, start = peak_bytes(), time.perf_counter()
{"assemble": main, "copy": copy}[what](measured)
print(json.dumps({"imported": imported, "peak": peak_bytes(), "seconds": time.perf_counter() - start}))
"""


def write_parts(folder: Path, num_bytes: float, shard_bytes: int, sizes: dict[str, int]) -> None:
    """A Llama of about `num_bytes` in shards with a tokenizer, and a small SigLIP tower; random bf16 weights."""
    tokens = ["<|begin_of_text|>", "<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(8))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokens[0], eos_token=tokens[1])
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        layer_bytes = 2 * sum(p.numel() for p in LlamaForCausalLM(config).model.layers.parameters())
    config.num_hidden_layers = max(1, round(num_bytes / layer_bytes))
    config.architectures = ["LlamaForCausalLM"]
    tokenizer.save_pretrained(folder / "language_model")
    config.save_pretrained(folder / "language_model")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    _write_random(folder / "language_model", shapes, shard_bytes)
    vision = SiglipVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    SiglipVisionModel(vision).to(torch.bfloat16).save_pretrained(folder / "vision_tower")
    SiglipImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size}).save_pretrained(
        folder / "vision_tower"
    )


def _write_random(folder: Path, shapes: dict[str, torch.Size], shard_bytes: int) -> None:
    """Random bits of moderate exponents, a shard at a time; compressible bytes would flatter whoever copies them."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        bits = {name: torch.randint(0, 0x3F80, shapes[name], generator=generator, dtype=torch.int16) for name in names}
        save_file({name: value.view(torch.bfloat16) for name, value in bits.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def run(what: str, parts: Path, output: Path, shard_bytes: int) -> dict[str, float]:
    """One run in a fresh process, of "assemble" or "copy"; seconds without the imports."""
    shutil.rmtree(output, ignore_errors=True)
    tiny = parts.with_name("tiny")
    warm_up = _arguments(tiny, tiny / "pisces", shard_bytes)
    measured = _arguments(parts, output, shard_bytes) if what == "assemble" else [str(parts), str(output)]
    command = [sys.executable, "-c", CHILD, json.dumps([what, warm_up, measured])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments(parts: Path, output: Path, shard_bytes: int) -> list[str]:
    arguments = ["--output", str(output), "--overwrite", "--max_shard_size", str(shard_bytes)]
    for role in ("language_model", "vision_tower"):
        arguments += [f"--{role}", str(parts / role)]
    return arguments


def copy(folders: list[str]) -> None:
    """The same files by cp and fsync; a reflink would copy no bytes."""
    parts, output = folders
    subprocess.run(["cp", "-r", "--reflink=never", parts, output], check=True)
    for path in Path(output).rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(folder: Path, size: float, shard_bytes: int, pairs: int) -> dict[str, float]:
    parts = folder / "parts"
    write_parts(parts, size * GB, shard_bytes, SIZES)
    num_bytes = sum(path.stat().st_size for path in parts.rglob("*.safetensors"))
    run("copy", parts, folder / "copy", shard_bytes)  # both find the parts in the page cache from here on
    runs = []
    for number in range(pairs):
        order = ("assemble", "copy") if number % 2 else ("copy", "assemble")
        pair = {what: run(what, parts, folder / what, shard_bytes) for what in order}
        runs.append((pair["assemble"], pair["copy"]))
    written = sorted((folder / "assemble").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    speeds = [copied["seconds"] / assembled["seconds"] for assembled, copied in runs]
    result = {
        "gb": round(num_bytes / GB, 3),
        "num_shards": len(written),
        "largest_shard_gb": round(written[-1].stat().st_size / GB, 3),
        "import_gb": round(statistics.median(assembled["imported"] for assembled, _ in runs) / GB, 3),
        "excess_memory_gb": round(max(assembled["peak"] - assembled["imported"] for assembled, _ in runs) / GB, 4),
        "assemble_s": round(statistics.median(assembled["seconds"] for assembled, _ in runs), 2),
        "cp_s": round(statistics.median(copied["seconds"] for _, copied in runs), 2),
        "speed_of_cp_median": round(statistics.median(speeds), 3),
        "speed_of_cp_min": round(min(speeds), 3),
        "pairs": pairs,
    }
    for name in ("parts", "assemble", "copy"):
        shutil.rmtree(folder / name)
    return result


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument(
        "--sizes_gb",
        type=finite_number(above=0, most=100_000),
        nargs="+",
        default=[0.5, 1.0, 2.0],
        help="at least two",
    )
    parser.add_argument("--max_shard_size_gb", type=finite_number(above=0, most=100_000), default=0.5)
    parser.add_argument("--pairs", type=COUNT, default=3)
    parser.add_argument("--folder", help="where to work, on the disk to measure (default: the system's)")
    arguments = parser.parse_args()
    if len(set(arguments.sizes_gb)) < 2:
        parser.error(f"--sizes_gb {arguments.sizes_gb}: expected two sizes or more; a slope needs them.")
    if arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: expected at least one.")
    shard_bytes = int(arguments.max_shard_size_gb * GB)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_parts(
            Path(folder) / "tiny", 0, shard_bytes, {name: value // 32 for name, value in SIZES.items()} | HEADS
        )
        sizes = [measure(Path(folder), size, shard_bytes, arguments.pairs) for size in arguments.sizes_gb]
    first, last = sizes[0], sizes[-1]
    slope = (last["excess_memory_gb"] - first["excess_memory_gb"]) / (last["gb"] - first["gb"])
    measured = {
        "memory_gb_per_model_gb": round(slope, 5),
        "speed_of_cp": last["speed_of_cp_median"],
        "sizes": sizes,
        # hashing takes a core of its own: beside other work on every core the speed says little
        "load_average_15min": round(os.getloadavg()[2], 1),
    }
    write_result(arguments.output, "assemble", BAR, measured)


if __name__ == "__main__":
    run_command(main)
