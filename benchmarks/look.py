"""How near the decoder of pisces-tiny comes to pictures of another look, before and after `finetune.lora_decoder`.

    python -m benchmarks.look --model pisces-tiny --work runs/look --output results/look.json

The look is drawn here from other scenes: shapes with a dark pen line, pale inside, on cream paper. `--pictures` takes
a folder of your own instead. Measured are reconstructions of held-out pictures of the look, and of scenes: with the
adapter, and with it switched off, which has to be the base to the last bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result
from pisces_commands.writing import whole_folder, write_json, write_whole


ROOT = Path(__file__).parents[1]
BAR = "held-out reconstructions of the look >= 4 dB nearer, of scenes <= 0.5 dB farther, 0 with the adapter off"
PAPER = (250, 240, 215)


def ink(picture: Image.Image) -> Image.Image:
    """A scene as if inked: what differs from the background made pale, with a dark line around it, on cream paper."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    shape = np.clip(np.abs(pixels - np.median(border, 0)).max(-1) / 60, 0, 1)
    mask = Image.fromarray((shape * 255).astype(np.uint8))
    line = ImageChops.difference(mask.filter(ImageFilter.MaxFilter(3)), mask.filter(ImageFilter.MinFilter(3)))
    shape, dark = shape[..., None], np.asarray(line)[..., None] / 255
    painted = shape * (pixels * 0.6 + 102) + (1 - shape) * np.array(PAPER)
    return Image.fromarray(((1 - dark) * painted).round().astype(np.uint8))


def write_look(scenes: Path, folder: Path, first: int, number: int) -> None:
    """Pictures of the look with their captions, from some of the scenes."""
    if folder.is_dir():
        return
    lines = (scenes / "scenes.jsonl").read_text(encoding="utf-8").splitlines()[first : first + number]
    with whole_folder(folder, sync=False) as partial:
        for record in map(json.loads, lines):
            name = Path(record["image"]).stem
            ink(load_image(scenes / record["image"])).save(partial / f"{name}.png")
            write_whole(partial / f"{name}.txt", record["captions"][-1])


def run(words: list[str], done: Path) -> float:
    """One command, unless its result is there; returns its processor seconds."""
    record = done.parent / f"{done.name}.seconds.json"
    if not record.is_file():
        print("== python " + " ".join(words), flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise ValueError(f"the command failed: python {' '.join(words)}")
        write_json(record, {"processor_seconds": round(usage.ru_utime + usage.ru_stime, 1)})
    return json.loads(record.read_text())["processor_seconds"]


def measure(model: str, folder: Path, number: int) -> dict[str, Any]:
    """PSNR in dB of reconstructions, base and adapter, and how far the base is from the adapter switched off."""
    import torch

    from finetune.parts.captioned import load_pictures
    from finetune.scratch.decoder_lora import DecoderLora

    decoder = DecoderLora(model)
    look, scenes = load_pictures(folder / "pictures" / "heldout"), load_pictures(folder / "pictures" / "keep")
    before = decoder.measure(look, scenes, number)
    decoder.pipe.load_lora_weights(folder, adapter_name="look")
    after = decoder.measure(look, scenes, number)
    decoder.pipe.disable_lora()
    off = decoder.measure(look, scenes, number)
    gaps = [before[name].pictures[1].int() - off[name].pictures[1].int() for name in before]
    found = {"autoencoder_of_the_look_db": round(decoder.ceiling(look.pictures[:number]), 2), "pictures_each": number}
    for name, title in (("heldout", "look"), ("kept", "scenes")):
        found[f"{title}_db"] = {"base": round(before[name].psnr, 2), "adapter": round(after[name].psnr, 2)}
        found[f"{title}_db"]["difference"] = round(after[name].psnr - before[name].psnr, 2)
    return found | {"largest_difference_with_the_adapter_off": int(torch.stack([g.abs().max() for g in gaps]).max())}


def main(arguments: list[str] | None = None) -> None:
    parser = LineParser(prog="python -m benchmarks.look", description="Another look for the decoder.")
    parser.add_argument("--model", default="pisces-tiny", help="checkpoint whose decoder learns it")
    parser.add_argument("--pictures", type=Path, help="captioned pictures of another look; default: inked scenes")
    parser.add_argument("--num_pictures", type=COUNT, default=300, help="of the look, drawn here (default: 300)")
    parser.add_argument("--num_measured", type=COUNT, default=32, help="of each kind (default: 32)")
    parser.add_argument("--flags", default="", help="more flags of finetune.lora_decoder")
    parser.add_argument("--work", required=True, type=Path, help="folder of all results; a second run goes on there")
    parser.add_argument("--output", required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    scenes, look = work / "scenes", options.pictures
    # as many scenes to keep as are drawn anew, none of them the same
    more = ["--num_scenes", str(2 * options.num_pictures), "--seed", "7"]
    run(["-m", "finetune.scenes", "--output", str(scenes), *more], work / "scenes")
    if look is None:
        look = work / "look"
        write_look(scenes, look, 0, options.num_pictures)
    kept = work / "kept.jsonl"
    lines = (scenes / "scenes.jsonl").read_text(encoding="utf-8").splitlines()[options.num_pictures :]
    rows = [{"image": f"scenes/{r['image']}", "caption": r["captions"][-1]} for r in map(json.loads, lines)]
    write_whole(kept, "".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", "finetune.lora_decoder", "--model_name_or_path", options.model, "--data", str(look)]
    words += ["--keep", str(kept), "--output_dir", str(work / "adapter"), *options.flags.split()]
    seconds = run(words, work / "adapter")
    measured = measure(options.model, work / "adapter", options.num_measured)
    write_result(options.output, "look", BAR, {**measured, "training_processor_seconds": seconds})


if __name__ == "__main__":
    run_command(main)
