"""Best of n: draw every prompt n times, let a scorer of yours judge, keep the best picture.

    python -m finetune.best_of_n --checkpoint pisces-tiny --prompts prompts.txt --scorer my_scorer:score --n 8 \
        --output drawings

Prompts are lines of a text file, or JSON objects with "prompt" and whatever the scorer needs. The folder that comes
out (`finetune.preferences.candidates`) is a training set for `lora_generation`, and with `--pairs True` also one for
`dpo_generation`. Each picture has a seed of its own, so that it does not depend on the batch, and a command that was
interrupted goes on where it stopped. `rejection_sampling` repeats this and trains in between.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from tqdm import tqdm

from finetune.flags.parsing import parse_classes, run_command
from finetune.flags.ranges import check_ranges
from finetune.preferences.candidates import DrawingFolder, Prompt, picture_seed, read_prompts
from finetune.preferences.rewards import check_scores, load_function
from pisces_commands.writing import held_output


Scorer = Callable[[list[Image.Image], Prompt], Sequence[float]]
# What may change between two runs into one folder; everything else would change pictures or scores.
FREE = ("output", "batch_size", "device")


@dataclass(kw_only=True)
class BestOfNArguments:
    """Flags of this command."""

    checkpoint: str = field(metadata={"help": "checkpoint folder or Hub id, with its decoder"})
    prompts: str = field(metadata={"help": "text file, a prompt per line; or JSONL with prompt (and id)"})
    scorer: str = field(
        metadata={"help": "module:function, f(images, prompt) -> a number per image, higher is better"}
    )
    output: str = field(metadata={"help": "folder for pictures, metadata.jsonl and run.yaml"})
    n: int = field(default=8, metadata={"help": "pictures per prompt"})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter folder or Hub id to draw with"})
    pairs: bool = field(default=False, metadata={"help": "keep the worst too; write pairs.jsonl for dpo_generation"})
    batch_size: int = field(default=16, metadata={"help": "pictures that are drawn at a time"})
    num_inference_steps: int | None = field(default=None, metadata={"help": "decoder's steps; default: its own"})
    guidance_scale: float | None = field(default=None, metadata={"help": "decoder's guidance; default: its own"})
    seed: int = field(default=0, metadata={"help": "of the whole set; with id and number it makes a picture's seed"})
    device: str | None = field(default=None, metadata={"help": "default: the accelerator if there is one, else cpu"})

    def __post_init__(self):
        for name, least in (("n", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}.")
        if self.pairs and self.n < 2:
            raise ValueError("--pairs True needs --n of at least 2: a chosen and a rejected picture.")
        check_ranges(self)


def main(arguments: Sequence[str] | None = None) -> Path:
    (options,) = parse_classes([BestOfNArguments], arguments)
    scorer: Scorer = load_function(options.scorer, "--scorer")
    prompts = read_prompts(options.prompts)
    settings = {name: value for name, value in asdict(options).items() if name not in FREE}
    with held_output(options.output):
        folder = DrawingFolder(options.output, settings)
        if left := folder.prompts_left(prompts):
            pipe = load_pipeline(options.checkpoint, options.adapter, options.device)
            num_prompts = max(1, options.batch_size // options.n)
            with tqdm(total=len(prompts), initial=len(prompts) - len(left), desc="drawing", unit="prompt") as bar:
                for start in range(0, len(left), num_prompts):
                    group = left[start : start + num_prompts]
                    pictures_of = draw(pipe, [prompt for _, prompt in group], options)
                    for (index, prompt), pictures in zip(group, pictures_of, strict=True):
                        scores = check_scores(scorer(pictures, prompt), options.n, options.scorer)
                        folder.keep(index, prompt, pictures, scores)
                    bar.update(len(group))
        print(folder.finish())
        return folder.path


def load_pipeline(checkpoint: str, adapter: str | None, device: str | None) -> Any:
    """The drawing pipeline, with the adapter merged into its language model if one is given."""
    from modeling_pisces import PiscesPipeline  # diffusers: of the recipes only this one needs it

    pipe = PiscesPipeline.from_pretrained(checkpoint)
    if adapter is not None:
        model = PeftModel.from_pretrained(pipe.vision_language_model, adapter)
        pipe.register_modules(vision_language_model=model.merge_and_unload())
    pipe.set_progress_bar_config(disable=True)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return pipe.to(device or accelerator)


def draw(pipe: Any, prompts: Sequence[Prompt], options: BestOfNArguments) -> Iterator[list[Image.Image]]:
    """`n` pictures for each prompt, at most `batch_size` at a time."""
    jobs = [(prompt, number) for prompt in prompts for number in range(options.n)]
    pictures: list[Image.Image] = []
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        seeds = [picture_seed(options.seed, prompt["id"], number) for prompt, number in batch]
        pictures += pipe(
            [prompt["prompt"] for prompt, _ in batch],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        ).images
    return (pictures[start : start + options.n] for start in range(0, len(pictures), options.n))


if __name__ == "__main__":
    run_command(main)
