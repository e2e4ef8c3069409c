"""Draws the prompts of GenEval, DPG-Bench, WISE or one's own file into a folder that a scorer reads.

    python -m evaluation.draw_prompts --model pisces-tiny --prompts geneval:evaluation_metadata.jsonl --output drawings

The same command goes on where a killed one stopped, and `--shard 1/2` and `--shard 2/2` in two processes fill one
folder. Every picture has a seed of its own and every batch holds pictures of one prompt only, so no picture depends on
the shard, on the order or on a restart. Scores are left to `evaluation.geneval` and to the sets' own scorers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.drawing.folder import SEED_RULE, picture_path, picture_seed, write_for_scorer, write_metadata
from evaluation.drawing.prompt_sets import Prompt, load_prompts, load_rewritten, prompt_files, split_spec
from evaluation.runs.files import (
    describe_machine,
    identify_adapters,
    identify_weights,
    keep_settings,
    parse_shard,
    take_shard,
)
from evaluation.runs.summaries import seed_generators
from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from pisces_commands.arguments import COUNT, SEED, LineParser, add_adapter_flag, finite_number
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import hash_files
from pisces_commands.writing import write_whole


def load_pipeline(arguments: argparse.Namespace) -> Any:
    """The checkpoint's pipeline, on the GPU if there is one."""
    from modeling_pisces import PiscesPipeline

    options = {} if arguments.dtype == "auto" else {"torch_dtype": getattr(torch, arguments.dtype)}
    arguments.found = folder, adapters = find_model(arguments.model, arguments.adapter, arguments.revision)
    pipeline = PiscesPipeline.from_pretrained(folder, **options)
    attach_adapters(adapters, pipeline.vision_language_model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def check_texts(pipeline: Any, texts: list[str]) -> None:
    """Stop before the first drawing at a text that the model cannot take, not hours later when its turn comes.

    Raises:
        ValueError: naming the prompt's number, for a control token or half a character in it.
    """
    processor: Any = getattr(pipeline, "processor", None)
    for index, text in enumerate(texts if processor is not None else []):
        try:
            processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error


def describe_settings(arguments: argparse.Namespace, num_prompts: int, pipeline: Any) -> dict[str, Any]:
    """Everything that decides how a picture looks, with the checkpoint's defaults written out."""
    from modeling_pisces.decoder_pisces import picture_size

    kind, path = split_spec(arguments.prompts)
    model = pipeline.vision_language_model
    folder, adapters = getattr(arguments, "found", (None, ()))
    is_hub_id = folder is None or not Path(arguments.model).expanduser().is_dir()
    height, width = picture_size(pipeline.unet, pipeline.vae, arguments.resolution, arguments.resolution)
    steps, guidance = arguments.num_inference_steps, arguments.guidance_scale
    temperature = arguments.image_temperature
    return {
        "model": arguments.model,
        "weights": identify_weights(arguments.model if is_hub_id else str(folder), folder and folder.name),
        "adapters": identify_adapters(adapters),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_set": kind,
        "prompts_sha256": hash_files(prompt_files(path)),
        "num_prompts": num_prompts,
        "wording": "rewritten" if arguments.rewritten else "raw",
        "rewritten_sha256": hash_files([arguments.rewritten]) if arguments.rewritten else None,
        "images_per_prompt": arguments.images_per_prompt,
        "batch_size": min(arguments.batch_size or arguments.images_per_prompt, arguments.images_per_prompt),
        "seed": arguments.seed,
        "seeds": SEED_RULE,
        "num_inference_steps": pipeline.config.default_num_inference_steps if steps is None else steps,
        "guidance_scale": pipeline.config.default_guidance_scale if guidance is None else guidance,
        "image_temperature": getattr(model.generation_config, "image_temperature", None)
        if temperature is None
        else temperature,
        "scheduler": type(pipeline.scheduler).__name__,
        "height": height,
        "width": width,
    }


def draw_prompt(pipeline: Any, prompt: Prompt, text: str, settings: dict[str, Any], folder: Path) -> int:
    """Draw what is missing of one prompt and return how many pictures that were.

    A batch is drawn again if any picture of it is missing, and in full: a picture's last bit may depend on its batch.
    """
    write_metadata(folder, prompt)
    number, size, drawn = settings["images_per_prompt"], settings["batch_size"], 0
    for start in range(0, number, size):
        batch = range(start, min(start + size, number))
        missing = [image for image in batch if not picture_path(folder, prompt.index, image).is_file()]
        if not missing:
            continue
        seeds = [picture_seed(settings["seed"], prompt.index, image) for image in batch]
        pictures = pipeline([text] * len(batch), generator=seed_generators(seeds), **_call_options(settings)).images
        for image in missing:
            write_whole(picture_path(folder, prompt.index, image), pictures[image - start].save)
        drawn += len(missing)
    write_for_scorer(folder, settings["prompt_set"], prompt, number)
    return drawn


def _call_options(settings: dict[str, Any]) -> dict[str, Any]:
    temperature = settings["image_temperature"]
    return {
        **{name: settings[name] for name in ("num_inference_steps", "guidance_scale", "height", "width")},
        "vector_kwargs": {} if temperature is None else {"image_temperature": temperature},
    }


def draw(arguments: argparse.Namespace) -> int:
    """Draw one shard of the prompts and return the number of new pictures.

    Raises:
        ValueError: bad flags, a prompt set that is not whole, or a folder of other settings; before any drawing.
    """
    shard = parse_shard(arguments.shard)
    prompts = load_prompts(arguments.prompts)
    texts = load_rewritten(arguments.rewritten, prompts) if arguments.rewritten else [item.text for item in prompts]
    pipeline = load_pipeline(arguments)
    check_texts(pipeline, texts)
    settings = describe_settings(arguments, len(prompts), pipeline)
    keep_settings(arguments.output / "run.json", settings, describe_machine())
    mine = take_shard(list(zip(prompts, texts, strict=True)), shard)
    return sum(
        draw_prompt(pipeline, prompt, text, settings, arguments.output)
        for prompt, text in tqdm(mine, desc=f"drawing, shard {arguments.shard}", unit="prompt")
    )


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    add_adapter_flag(parser)
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--prompts", required=True, help="geneval:FILE, dpg:FOLDER, wise:FOLDER or own:FILE")
    parser.add_argument("--rewritten", type=Path, help='JSONL of {"prompt", "rewritten"}: draw these words instead')
    parser.add_argument("--output", type=Path, required=True, help="folder to fill, or to go on with")
    parser.add_argument(
        "--images_per_prompt", type=COUNT, default=4, help="GenEval and DPG-Bench ask for 4, WISE for 1"
    )
    parser.add_argument("--batch_size", type=COUNT, help="pictures at a time, of one prompt; default: all of it")
    parser.add_argument("--seed", type=SEED, default=0, help="of the run; every picture has one of its own by it")
    parser.add_argument("--num_inference_steps", type=COUNT, help="instead of the checkpoint's own")
    parser.add_argument("--guidance_scale", type=finite_number(0, 1000), help="instead of the checkpoint's own")
    parser.add_argument("--image_temperature", type=finite_number(0, 100), help="instead of the checkpoint's own")
    parser.add_argument("--resolution", type=COUNT, help="pixels of both sides, instead of the decoder's own")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--shard", default="1/1", help="i/n: draw the i-th of n parts, into the same folder")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with one_line_ending():
        drawn = draw(options)
        print(f"{options.output}: {drawn} new pictures")


if __name__ == "__main__":
    main()
