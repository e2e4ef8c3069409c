"""Scores a Pisces on emoji: drawings by the judge, answers exactly, reconstructions in dB; trained beside held-out.

    python -m examples.emoji.evaluate --model runs/pisces-emoji --data data/emoji --judge data/judge \\
        --other data/twemoji --output results/pisces-emoji.json

Writes the results file and, beside it, a sheet of drawings (what was wanted, what was drawn). With `--other`, another
vendor's drawings of the trained concepts are shown and asked about. A run that was stopped goes on where it was.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from examples.emoji.contact_sheet import read_truth
from examples.emoji.judge_network import Judge, load_judge, shift_and_scale, to_image, to_tensor
from examples.emoji.kept import Kept
from examples.emoji.scores import mean, normalize_answer, psnr, share, shares_by, ssim
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint
from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SEED, LineParser, finite_number
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import current_command, current_commit, describe_hardware, hash_files
from pisces_commands.writing import write_json, write_whole


PROTOCOL = (
    "One drawing of each prompt, seed {seed} + its number, {steps} steps, guidance {guidance}. Prompts are titles. "
    "The judge is a classifier of real emoji that never saw a drawing; its accuracy is in 'judge'. 'real' and "
    "'reconstruction' are the judge on the real held-out pictures and on the decoder's reconstructions of them: the "
    "most that a drawing can reach. Answers are greedy and right when they equal the expected one but for case and a "
    "full stop; trained pictures are moved, scaled and turned a little before they are shown. Intervals are 95 %, "
    "Wilson's for shares."
)
CHANGE = 0.5  # of the judge's moves, for pictures that are asked about
SHOWN = 24  # drawings of each part on the sheet


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m examples.emoji.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of examples.emoji.make_data")
    parser.add_argument("--judge", type=Path, required=True, help="folder of examples.emoji.judge")
    parser.add_argument("--other", type=Path, help="folder of another vendor, to ask about")
    parser.add_argument("--decoder_adapter", help="folder or Hub id of a LoRA adapter of the decoder")
    parser.add_argument("--output", type=Path, required=True, help="results file to write, .json")
    parser.add_argument("--num_pictures", type=COUNT, default=200, help="pictures of each part at most")
    parser.add_argument("--batch_size", type=COUNT, default=25, help="pictures at once")
    parser.add_argument("--steps", type=COUNT, help="instead of the checkpoint's own")
    parser.add_argument("--guidance_scale", type=finite_number(0, 1000), help="instead of the checkpoint's own")
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of pictures and of the drawings")
    return parser


def choose(
    rows: Sequence[dict[str, Any]], number: int, seed: int, each_name_once: bool = True
) -> list[dict[str, Any]]:
    """At most `number` rows in the seed's order; one per name, so that people in six tones do not outvote the rest."""
    order = sorted(rows, key=lambda row: row["code"])
    random.Random(f"emoji-evaluation-{seed}").shuffle(order)
    if each_name_once:
        order = list({row["name"]: row for row in reversed(order)}.values())[::-1]
    return order[:number]


class Evaluation:
    """One model, one judge, one data folder; each method is a part of the results."""

    def __init__(self, options: argparse.Namespace, pipeline: Any, judge: Judge, kept: Kept):
        self.options, self.pipeline, self.judge, self.kept = options, pipeline, judge, kept
        given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        self.drawing_options = {name: value for name, value in given.items() if value is not None}

    def draw(self, part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw the title of each row once; what the judge saw beside what was wanted, and the picture's name."""

        def work(chunk: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
            generators = [torch.Generator().manual_seed(self.options.seed + number) for number, _ in chunk]
            titles = [row["title"] for _, row in chunk]
            images = self.pipeline(titles, generator=generators, **self.drawing_options).images
            names = [
                self.kept.keep_picture(image, f"{part}_{number:05d}")
                for image, (number, _) in zip(images, chunk, strict=True)
            ]
            return [{**seen, "picture": name} for seen, name in zip(self.judge.judge(images), names, strict=True)]

        jobs = list(enumerate(rows))
        return [compare(row, seen) for (_, row), seen in self.kept.run(part, jobs, self.options.batch_size, work)]

    def reconstruct(self, part: str, data: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Encode and decode each picture; PSNR, SSIM, and what the judge still sees."""

        def work(chunk: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
            wanted = [load_image(data / row["image"]) for _, row in chunk]
            generators = [torch.Generator().manual_seed(self.options.seed + number) for number, _ in chunk]
            images = self.pipeline.reconstruct(wanted, generator=generators, **self.drawing_options).images
            images = [image.convert("RGB").resize(like.size) for image, like in zip(images, wanted, strict=True)]
            pairs = [(_pixels(image), _pixels(like)) for image, like in zip(images, wanted, strict=True)]
            names = [
                self.kept.keep_picture(image, f"{part}_{number:05d}")
                for image, (number, _) in zip(images, chunk, strict=True)
            ]
            seen = self.judge.judge(images)
            return [
                {**found, "picture": name, "psnr": psnr(*pair), "ssim": ssim(*pair)}
                for found, name, pair in zip(seen, names, pairs, strict=True)
            ]

        jobs = list(enumerate(rows))
        done = self.kept.run(part, jobs, self.options.batch_size, work)
        return [{**compare(row, seen), "psnr": seen["psnr"], "ssim": seen["ssim"]} for (_, row), seen in done]

    def answer(
        self, part: str, data: Path, rows: list[dict[str, Any]], is_changed: bool = False
    ) -> list[dict[str, Any]]:
        """Ask every question of each row about its picture alone, greedily."""
        model, processor = self.pipeline.vision_language_model, self.pipeline.processor

        def work(chunk: list[tuple[int, dict[str, Any], dict[str, str]]]) -> list[dict[str, Any]]:
            images = [_shown(data / row["image"], is_changed, self.options.seed + number) for number, row, _ in chunk]
            parts = [
                [{"type": "image", "image": image}, {"type": "text", "text": q["question"]}]
                for image, (_, _, q) in zip(images, chunk, strict=True)
            ]
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in parts],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding_side="left",
            ).to(model.device)
            with torch.no_grad():
                output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return [{"answer": text} for text in texts]

        jobs = [(number, row, asked) for number, row in enumerate(rows) for asked in row["questions"]]
        return [
            {"type": asked["type"], "question": asked["question"], "title": row["title"], "expected": asked["answer"]}
            | {**said, "right": normalize_answer(said["answer"]) == normalize_answer(asked["answer"])}
            for (_, row, asked), said in self.kept.run(part, jobs, 2 * self.options.batch_size, work)
        ]


def compare(row: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """What the judge saw beside what was wanted: the name, the concept, and the attribute where there is one."""
    kind = row["attribute_kind"]
    concept = seen["concept"] == row["concept"]
    attribute = seen[kind] == row["attribute"] if kind else None
    return {
        "row": row,
        "picture": seen.get("picture"),
        "seen": seen["names"][0],
        "style": seen["style"],
        "group": "job x tone" if kind == "tone" and row["is_job"] else f"{kind}" if kind else "none",
        "top1": seen["names"][0] == row["name"],
        "top5": row["name"] in seen["names"],
        "concept": concept,
        "attribute": attribute,
        "both": concept and bool(attribute),
    }


def _pixels(image: Image.Image) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
        / 255
    )


def _shown(path: Path, is_changed: bool, seed: int) -> Image.Image:
    image = load_image(path)
    if not is_changed:
        return image
    generator = torch.Generator().manual_seed(seed)
    return to_image(shift_and_scale(to_tensor(image)[None], generator, CHANGE)[0])


def names_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Top-1 and top-5 of the name."""
    return {name: share(row[name] for row in rows) for name in ("top1", "top5")}


def style_summary(rows: Sequence[dict[str, Any]], styles: Sequence[str]) -> dict[str, Any]:
    """In whose style the drawings are: the share of each vendor that the judge knows."""
    return {"style": {style: share(row["style"] == style for row in rows) for style in styles}}


def composition_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concept, attribute, and both, over all compositions and by kind."""
    return {name: shares_by(rows, "group", name) for name in ("concept", "attribute", "both")}


def reconstruction_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "psnr": mean([row["psnr"] for row in rows]),
        "ssim": mean([row["ssim"] for row in rows]),
        "top1": share(row["top1"] for row in rows),
    }


def load_pipeline(options: argparse.Namespace) -> Any:
    """The checkpoint's pipeline, with the decoder's adapter if one is given.

    Raises:
        ValueError: the checkpoint is not whole or cannot draw.
    """
    from modeling_pisces import PiscesPipeline

    folder = find_checkpoint(options.model)
    check_checkpoint(folder, with_decoder=True)
    pipeline = PiscesPipeline.from_pretrained(folder)
    if options.decoder_adapter:
        pipeline.load_lora_weights(options.decoder_adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def identify(options: argparse.Namespace) -> dict[str, Any]:
    """What has to be equal for a stopped run to go on."""
    folder = find_checkpoint(options.model)
    weights = sorted(folder.rglob("*.safetensors"))
    adapter = sorted(Path(options.decoder_adapter).rglob("*.safetensors")) if options.decoder_adapter else []
    flags = ("model", "decoder_adapter", "num_pictures", "batch_size", "steps", "guidance_scale", "seed")
    data = [options.data, *([options.other] if options.other else [])]
    return {
        **{name: getattr(options, name) for name in flags},
        "weights": hash_files([*weights, *adapter]),
        "data": hash_files([path / "truth" / "pictures.jsonl" for path in data]),
        "judge": hash_files([options.judge / "judge.safetensors"]),
    }


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts and write the results file and the sheet.

    Raises:
        ValueError: a folder is not what it should be, or an unfinished run had other settings.
    """
    start = time.monotonic()
    facts = read_truth(options.data)
    others = read_truth(options.other) if options.other else []
    judge, about = load_judge(options.judge)
    if unknown := {row["name"] for row in facts} - set(judge.labels.names):
        raise ValueError(
            f"{options.judge}: the judge does not know {len(unknown)} names of {options.data}, such as "
            f"{sorted(unknown)[0]!r}. Train it on this data."
        )
    pipeline = load_pipeline(options)
    kept = Kept(options.output.with_name(options.output.stem + "_unfinished"), identify(options))
    run = Evaluation(options, pipeline, judge, kept)
    pick = {split: [row for row in facts if row["split"] == split] for split in ("train", "heldout", "concepts")}
    trained = choose(pick["train"], options.num_pictures, options.seed)
    heldout = choose(pick["heldout"], options.num_pictures, options.seed, each_name_once=False)
    unseen = choose(pick["concepts"], options.num_pictures, options.seed)

    drawn, composed = run.draw("drawing_trained", trained), run.draw("drawing_heldout", heldout)
    again = {
        part: run.reconstruct(f"reconstruction_{part}", options.data, rows)
        for part, rows in (("trained", trained), ("heldout", heldout), ("unseen", unseen))
    }
    answered = {
        "trained": run.answer("answers_trained", options.data, trained, is_changed=True),
        "heldout": run.answer("answers_heldout", options.data, heldout),
    }
    if options.other:
        codes = {row["code"] for row in pick["train"]}
        known = choose([row for row in others if row["code"] in codes], options.num_pictures, options.seed)
        answered["transfer"] = run.answer("answers_transfer", options.other, known)
    real = (
        [
            compare(row, seen)
            for row, seen in zip(
                heldout, judge.judge([load_image(options.data / row["image"]) for row in heldout]), strict=True
            )
        ]
        if heldout
        else []
    )
    results = {
        "benchmark": "emoji",
        "model": options.model,
        "drawing_trained": names_summary(drawn) | style_summary(drawn, judge.labels.styles),
        "drawing_heldout": composition_summary(composed) | style_summary(composed, judge.labels.styles),
        "drawing_heldout_at_most": {
            "real": composition_summary(real),
            "reconstruction": composition_summary(again["heldout"]),
        },
        "answers": {part: shares_by(rows, "type", "right") for part, rows in answered.items()},
        "reconstruction": {part: reconstruction_summary(rows) for part, rows in again.items()},
        "judge": about,
        "run": _describe_run(options, pipeline, time.monotonic() - start),
    }
    sections = [_section("Trained names", run, drawn), _section("Held-out compositions", run, composed)]
    sections += [_section("Reconstructions of unseen concepts", run, again["unseen"])]
    sheet = make_contact_sheet(sections, tile_side=128, columns=8)
    write_whole(options.output.with_name(options.output.stem + "_drawings.png"), sheet.save)
    wrong = [row for rows in answered.values() for row in rows[:: max(len(rows) // 40, 1)]]
    write_json(options.output.with_name(options.output.stem + "_answers.json"), wrong)
    write_json(options.output, results)  # last: where it is, the run is finished
    kept.remove()
    return results


def _section(title: str, run: Evaluation, rows: Sequence[dict[str, Any]]) -> Section:
    """Pairs of what was wanted and what was drawn; a cross and what the judge saw where that is another thing."""
    tiles = []
    for row in rows[:SHOWN]:
        wanted = load_image(run.options.data / row["row"]["image"])
        drawn = run.kept.open_picture(row["picture"]).resize(wanted.size)
        pair = Image.new("RGB", (2 * wanted.width, wanted.height), "white")
        pair.paste(wanted, (0, 0))
        pair.paste(drawn, (wanted.width, 0))
        is_right = row["both"] if row["row"]["attribute_kind"] else row["top1"]
        tiles.append(Tile(pair, row["row"]["title"] if is_right else f"x {row['row']['title']}\n({row['seen']})"))
    return Section(f"{title}: wanted, drawn", tiles)


def _describe_run(options: argparse.Namespace, pipeline: Any, seconds: float) -> dict[str, Any]:
    config = pipeline.config
    steps, guidance = options.steps, options.guidance_scale
    return {
        "command": current_command(),
        "commit": current_commit(),
        "hardware": describe_hardware(),
        "seconds": round(seconds, 1),
        "protocol": PROTOCOL.format(
            seed=options.seed,
            steps=config.default_num_inference_steps if steps is None else steps,
            guidance=config.default_guidance_scale if guidance is None else guidance,
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command: evaluate, and print the shares that matter."""
    options = build_parser().parse_args(arguments)
    with one_line_ending(interrupted="interrupted; the same command goes on from what is finished"):
        results = evaluate(options)
        for name in ("top1", "top5"):
            print(f"trained names, {name}:", results["drawing_trained"][name])
        for name in ("concept", "attribute", "both"):
            print(f"held-out compositions, {name}:", results["drawing_heldout"][name]["all"])
        for part, shares in results["answers"].items():
            print(f"answers, {part}:", shares["all"])
        for part, found in results["reconstruction"].items():
            print(f"reconstruction, {part}: PSNR", found["psnr"])


if __name__ == "__main__":
    main()
