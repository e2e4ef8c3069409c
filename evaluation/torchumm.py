"""Pisces as a backbone of TorchUMM (arXiv 2604.10784), without a fork: registers it and runs a command of theirs.

    python -m evaluation.torchumm eval --config mme_pisces.yaml
    python -m evaluation.torchumm TorchUMM/eval/generation/geneval/run_generation.py --config geneval_pisces.yaml

The first form is `umm`, its own command line; the second runs one of its scripts in the same process, for benchmarks
that `umm eval` starts in a process of their own, where nobody would have registered this backbone. Benchmarks,
configurations and scores are TorchUMM's; `PiscesBackbone` answers and draws.
"""

import hashlib
import runpy
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modeling_pisces.checkpoint.adapters import attach_adapters, find_model
from pisces_commands.ending import EXIT_FAILED, end_command
from pisces_commands.writing import write_whole


LOADING = ("model_path", "revision", "adapters", "torch_dtype", "seed")
DRAWING = ("num_images_per_prompt", "num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")


class PiscesBackbone:
    """What TorchUMM calls a backbone adapter: `load` once, then `understanding` and `generation` item by item.

    It has no `editing`, and TorchUMM says so where a benchmark of editing asks for it.
    """

    name = "pisces"

    def load(self, cfg: dict[str, Any]) -> None:
        """Load the model; the decoder follows with the first drawing, since understanding never needs it.

        Args:
            cfg: the configuration's `backbone_cfg`: "model_path" (folder or Hub id), and if wished "revision",
                "adapters" (a list of folders or Hub ids), "torch_dtype" ("auto") and "seed" (0).

        Raises:
            ValueError: no model_path, or a key that this backbone does not know.
        """
        from modeling_pisces import PiscesForConditionalGeneration, PiscesProcessor

        _refuse_unknown(cfg, LOADING, "backbone_cfg")
        if not cfg.get("model_path"):
            raise ValueError("backbone_cfg has no model_path. Give a checkpoint folder or a Hub id.")
        folder, self.adapters = find_model(cfg["model_path"], cfg.get("adapters") or [], cfg.get("revision"))
        self.source = {"pretrained_model_name_or_path": folder}
        self.seed = int(cfg.get("seed", 0))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = PiscesForConditionalGeneration.from_pretrained(
            **self.source, dtype=cfg.get("torch_dtype", "auto")
        )
        self.model = self.model.to(device).eval()
        attach_adapters([a for a in self.adapters if "language model" in a.sides], self.model)
        self.processor = PiscesProcessor.from_pretrained(**self.source)
        self.drawn: Counter[tuple[str, str]] = Counter()

    @cached_property
    def pipeline(self) -> Any:
        """The drawing pipeline around the loaded model."""
        from modeling_pisces import PiscesPipeline

        pipeline = PiscesPipeline.from_pretrained(
            **self.source,  # type: ignore[arg-type]
            vision_language_model=self.model,
            processor=self.processor,
            torch_dtype=self.model.dtype,
        )
        pipeline.set_progress_bar_config(disable=True)
        attach_adapters(self.adapters, None, pipeline)
        return pipeline.to(self.model.device)

    def understanding(
        self,
        prompt: str | None = None,
        images: list[str] | None = None,
        videos: list[str] | None = None,
        understanding_cfg: dict[str, Any] | None = None,
    ) -> dict[str, str]:
        """Answer a question about pictures, which stand before the text; greedy, unless the settings say otherwise.

        Args:
            prompt: the question, with the benchmark's own instructions.
            images: paths.
            videos: must be empty.
            understanding_cfg: arguments of `generate`.

        Raises:
            ValueError: videos were given.
        """
        if videos:
            raise ValueError(f"{len(videos)} videos were given; Pisces sees pictures only. Choose another benchmark.")
        content = [{"type": "image", "path": str(path)} for path in images or []]
        content += [{"type": "text", "text": prompt}] if prompt else []
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        options = {"max_new_tokens": 512, "do_sample": False, **(understanding_cfg or {})}
        output = self.model.generate(**inputs, **options)
        (text,) = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"text": text.strip()}

    def generation(
        self, prompt: str, output_path: str | None = None, generation_cfg: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Draw a prompt; the first picture goes to `output_path`, others beside it with a number.

        TorchUMM asks several times for the same prompt and names no seed. Each picture has one of its own, by the
        run's seed, the prompt, the file's name and how often that was asked for, so a resumed run draws the same.

        Raises:
            ValueError: a setting that the pipeline has no use for.
        """
        options = dict(generation_cfg or {})
        seed = int(options.pop("seed", self.seed))
        _refuse_unknown(options, DRAWING, "params")
        name = Path(output_path).name if output_path else ""
        self.drawn[prompt, name] += 1
        words = f"{seed}/{prompt}/{name}/{self.drawn[prompt, name]}"
        number = int(options.pop("num_images_per_prompt", 1))
        generators = [torch.Generator().manual_seed(_hash(f"{words}/{image}")) for image in range(number)]
        pictures = self.pipeline(prompt, num_images_per_prompt=number, generator=generators, **options).images
        paths = _paths_for(output_path, number)
        for path, picture in zip(paths, pictures, strict=False):
            write_whole(path, picture.save)
        return {"image": pictures[0], "images": pictures, "saved_paths": [str(path) for path in paths]}


def _hash(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big")


def _paths_for(output_path: str | None, number: int) -> list[Path]:
    if output_path is None:
        return []
    first = Path(output_path)
    return [first, *(first.with_name(f"{first.stem}_{image}{first.suffix}") for image in range(1, number))]


def _refuse_unknown(given: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{place} has {', '.join(unknown)}, which Pisces has no use for. It knows {', '.join(known)}."
        )


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        from umm.core import registry
        from umm.inference import pipeline
    except ImportError as error:
        end_command(
            f"TorchUMM cannot be imported ({error}). Clone github.com/AIFrontierLab/TorchUMM and put its src folder "
            "on PYTHONPATH.",
            EXIT_FAILED,
        )
    registry.register("backbone", PiscesBackbone.name, PiscesBackbone)
    # it would import every other model with packages of its own (torchvision among them), to use one
    pipeline.register_builtin_backbones = lambda: None
    if words[0].endswith(".py"):
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        return
    from umm.cli.main import main as run_umm

    sys.exit(run_umm(list(words)))


if __name__ == "__main__":
    main()
