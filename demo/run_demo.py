"""The main job on one sheet: questions about pictures, drawings from prompts, reconstructions.

`make demo` runs it on pisces-tiny and the pictures of `examples/`, which come with the true answers, so that a reader
sees at once where the model is wrong. For work of your own there is the console command `pisces`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image

from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from modeling_pisces.checkpoint.files import check_checkpoint
from modeling_pisces.checkpoint.loading import load_pipeline, quiet_libraries
from modeling_pisces.console.commands import DEFAULT_QUESTION, answer_question
from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet
from modeling_pisces.console.pictures import find_pictures
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SEED, LineParser, add_adapter_flag
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import write_whole


DEFAULT_PROMPTS = (
    "a red circle",
    "a blue star on a dark background",
    "three green triangles",
    "a yellow heart left of a purple square",
    "two pink crosses",
    "an orange circle above a cyan square",
)


def main() -> None:
    show(parse_arguments())


def show(args: argparse.Namespace) -> None:
    """Ask, draw and reconstruct, and write the sheet."""
    start = time.perf_counter()
    folder, adapters = find_model(args.model, args.adapter)
    check_checkpoint(folder, with_decoder=True)
    pictures = [(path, load_image(path)) for path in find_pictures(args.image)]
    pipeline = load_pipeline(folder)
    attach_adapters(adapters, pipeline.vision_language_model, pipeline)
    print(f"loaded {folder} in {time.perf_counter() - start:.1f} s")

    sections = [Section("Questions about your pictures", answer_about_pictures(pipeline, pictures, args.question))]
    examples = read_examples(Path(args.examples), args.num_examples)
    sections.append(Section("Questions about held-out pictures", answer_about_examples(pipeline, examples)))
    sections.append(Section("Drawings", draw(pipeline, args.prompt or DEFAULT_PROMPTS, args.seed)))
    sections.append(Section("Reconstructions by encoder and decoder", reconstruct(pipeline, examples, args.seed)))

    path = Path(args.output) / "contact_sheet.png"
    write_whole(path, make_contact_sheet(sections).save)
    print(f"done in {time.perf_counter() - start:.1f} s; look at {path.resolve()}")


def parse_arguments() -> argparse.Namespace:
    parser = LineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pisces-tiny", help="checkpoint folder or Hub id")
    add_adapter_flag(parser)
    parser.add_argument("--examples", default="examples", help="data folder with pictures, questions and true answers")
    parser.add_argument("--num_examples", type=COUNT, default=6, help="how many pictures of it")
    parser.add_argument("--image", action="append", default=[], help="a picture or a folder of your own")
    parser.add_argument("--question", default=DEFAULT_QUESTION, help="what to ask about your pictures")
    parser.add_argument("--prompt", action="append", help="what to draw, instead of the default set")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--output", default="outputs", help="folder for contact_sheet.png")
    return parser.parse_args()


def read_examples(folder: Path, limit: int) -> list[dict]:
    """The first rows of a data folder, each with its opened picture and one question of each of three types."""
    path = folder / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: not found. Write the folder with `make examples`, or give another --examples.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    for row in rows:
        row["picture"] = load_image(folder / row["image"])
        first_of_type = {question["type"]: question for question in reversed(row["questions"])}
        row["asked"] = list(first_of_type.values())[-3:]
    return rows


def answer_about_pictures(pipeline, pictures: list[tuple[str, Image.Image]], question: str) -> list[Tile]:
    tiles = []
    for path, picture in pictures:
        answer = answer_question(pipeline.vision_language_model, pipeline.processor, picture, question)
        print(f"{path}: {question} -> {answer}")
        tiles.append(Tile(picture, f"{Path(path).name}\n{question}\n> {answer}"))
    return tiles


def answer_about_examples(pipeline, examples: list[dict]) -> list[Tile]:
    tiles, num_right, num_asked = [], 0, 0
    for row in examples:
        lines = [row["image"]]
        for asked in row["asked"]:
            answer = answer_question(
                pipeline.vision_language_model, pipeline.processor, row["picture"], asked["question"]
            )
            is_right = answer.strip().lower() == asked["answer"]
            num_right, num_asked = num_right + is_right, num_asked + 1
            verdict = "" if is_right else f" (truth: {asked['answer']})"
            print(f"{row['image']}: {asked['question']} -> {answer}{verdict}")
            lines += [asked["question"], f"> {answer}{verdict}"]
        tiles.append(Tile(row["picture"], "\n".join(lines)))
    print(f"{num_right} of {num_asked} answers right")
    return tiles


def draw(pipeline, prompts: tuple[str, ...] | list[str], seed: int) -> list[Tile]:
    """Two drawings of each prompt, with seeds of their own."""
    start = time.perf_counter()
    seeds = [seed, seed + 1] * len(prompts)
    generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
    images = pipeline(list(prompts), num_images_per_prompt=2, generator=generators).images
    print(f"drew {len(images)} pictures in {time.perf_counter() - start:.1f} s")
    captions = [prompt for prompt in prompts for _ in range(2)]
    return [Tile(image, f"{caption}\nseed {one}") for image, caption, one in zip(images, captions, seeds, strict=True)]


def reconstruct(pipeline, examples: list[dict], seed: int) -> list[Tile]:
    generators = [torch.Generator("cpu").manual_seed(seed) for _ in examples]
    images = pipeline.reconstruct([row["picture"] for row in examples], generator=generators).images
    pairs = zip(examples, images, strict=True)
    return [
        tile for row, image in pairs for tile in (Tile(row["picture"], row["image"]), Tile(image, "reconstruction"))
    ]


if __name__ == "__main__":
    with one_line_ending("demo: error: "), quiet_libraries():
        main()
