"""A Pisces from nothing, on captioned pictures of your own: one command that is stopped and repeated at will.

`python -m finetune.from_scratch --config finetune/configs/from_scratch_small.yaml --data FOLDER --output runs/mine`
brings the pictures to one size, trains both towers and the decoder, puts them together with a fresh language model,
trains the paper's three stages, scores the result on pictures it has and has not seen, and writes the model with its
card to `OUTPUT/model`. Every step is a command of its own (`finetune.parts.*`, `finetune.train_stages`); the YAML file
has a section of flags for each. A finished step is not repeated, an unfinished one goes on from its last checkpoint,
and what a step was begun with cannot be changed behind its back. `docs/from_scratch.md` is the way through it.
"""

import difflib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from finetune.data.spec import parse_specs
from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts import gen_encoder, vision
from finetune.parts.assemble import assemble, finish
from finetune.parts.captioned import PictureData, has_changed, load_pictures, prepare
from finetune.parts.trainer import check_sizes
from finetune.scratch.card import write_model_card
from finetune.scratch.plan import (
    STAGES,
    AssembleSettings,
    EvaluateSettings,
    Plan,
    check_geometry,
    flags_of,
    read_plan,
)
from finetune.scratch.steps import StepRecords
from finetune.train_stages import StageArguments, train_stage
from pisces_commands.arguments import SEED, LineParser, UsageError
from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.writing import write_json, write_whole


PRECISION_FLAG = "avx512_bf16"  # processors without it multiply bf16 far more slowly than fp32


class FromScratch:
    """One run: what every step is called with, and the order.

    Args:
        plan: settings and sections.
        output: the run's folder.
    """

    def __init__(self, plan: Plan, output: Path):
        # the decoder's recipe needs diffusers, which an understanding-only environment may lack
        from finetune.parts import decoder
        from finetune.scratch import scores

        self.plan, self.output = plan, output
        self.decoder, self.scores = decoder, scores
        self.records = StepRecords(output)
        self.train, self.heldout = output / "data" / "train", output / "data" / "heldout"
        self.model = output / "model"
        self.bf16 = self._precision()
        folders = {"gen_encoder": output / "gen_encoder", "vae": output / "decoder" / "vae"}
        self.steps: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {}
        self._add_part("vision", vision, output / "vision_tower")
        self._add_part("gen_encoder", gen_encoder, folders["gen_encoder"], pool_stride=plan.pool_stride)
        self._add_part("vae", decoder, folders["vae"], part="vae")
        parts = {name: str(folder) for name, folder in folders.items()}
        self._add_part(
            "unet", decoder, output / "decoder" / "unet", part="unet", pool_stride=plan.pool_stride, **parts
        )

    def _precision(self) -> bool:
        """What the run was begun with; for a new one what the plan says, or what this machine is fast at."""
        if (record := self.records.read("data")) is not None and self.plan.bf16 == "auto":
            return record["settings"]["bf16"]
        return bool(self.plan.bf16) if self.plan.bf16 != "auto" else is_fast_in_bf16()

    def _add_part(self, name: str, module: Any, folder: Path, **filled: Any) -> None:
        flags = {"data": str(self.train), "heldout": str(self.heldout), "output": str(folder), **filled}
        settings = {"seed": self.plan.seed, "bf16": self.bf16, **self.plan.sections[name]}
        run = self._parse(_flags_class(module), name, {**flags, **settings})
        self._judge(name, run)
        fitting = lambda: {**settings, "batch_size": self._batch_size(name, run.batch_size)}  # noqa: E731
        self.steps[name] = (settings, lambda: module.main(flags_of({**flags, **fitting()})))

    @staticmethod
    def _parse(kind: Any, name: str, settings: dict[str, Any]) -> Any:
        """The flags of a step; a name that is not a whole one would be taken for what it begins."""
        known = [field.name for field in fields(kind)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
                raise UsageError(f"{name}: unknown flag {key!r}; {hint}")
        try:
            return parse_flags_of(kind, flags_of(settings))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error

    def _judge(self, name: str, run: Any) -> None:
        """What would fail after hours is refused now."""
        if name in ("vae", "unet"):
            channels = self.plan.sections["vae"].get("vae_channels"), self.plan.sections["unet"].get("unet_channels")
            run.vae_channels, run.unet_channels = channels[0] or run.vae_channels, channels[1] or run.unet_channels
            self.decoder.check_channels(run, self.plan.image_size)
        else:
            check_sizes(run, self.plan.image_size)
        if name == "vision":
            check_geometry(self.plan, run.patch_size)

    def _batch_size(self, name: str, asked: int) -> int:
        """Batches that the data can fill."""
        if (number := len(self.pictures.records)) < asked:
            print(f"{name}: batches of {number} instead of {asked}, which is all that the data has.")
        return min(number, asked)

    def prepare(self) -> None:
        """Read the data once; what is kept from training is chosen here unless it is named."""
        plan = self.plan
        if plan.heldout is not None:
            prepare(plan.data, plan.image_size, self.train)
            prepare(plan.heldout, plan.image_size, self.heldout)
        else:
            prepare(plan.data, plan.image_size, self.train, plan.heldout_share, self.heldout)
        print(f"{len(self.pictures.records)} pictures to train on, {len(self.unseen.records)} held out", flush=True)

    @property
    def pictures(self) -> PictureData:
        return load_pictures(self.train).with_texts

    @property
    def unseen(self) -> PictureData:
        return load_pictures(self.heldout).with_texts

    def all_steps(self) -> dict[str, tuple[dict[str, Any], Callable[[], Any]]]:
        """Every step in order: its settings, which must not change once it has begun, and what does it."""
        plan = self.plan
        data = {
            "data": [spec.label for spec in parse_specs(plan.data)],
            "heldout": plan.heldout and [spec.label for spec in parse_specs(plan.heldout)],
            "image_size": plan.image_size,
            "heldout_share": plan.heldout_share,
            "bf16": self.bf16,
        }
        steps = {"data": (data, self.prepare), **self.steps}
        settings = self._settings(AssembleSettings, "assemble")
        checkpoint = self.output / "start"
        towers = (self.output / "vision_tower", self.output / "gen_encoder", checkpoint)
        steps["assemble"] = (
            {**settings, "pool_stride": plan.pool_stride},
            lambda: assemble(self.train, *towers, gen_pool_stride=plan.pool_stride, **settings),
        )
        for name in STAGES:
            if name in plan.sections:
                steps[name] = self._stage(name, checkpoint, self.output / name)
                checkpoint = self.output / name
        steps["finish"] = ({}, lambda: finish(checkpoint, self.output / "decoder", self.model))
        steps["evaluate"] = (self._settings(EvaluateSettings, "evaluate"), self.evaluate)
        return steps

    def _settings(self, kind: Any, name: str) -> dict[str, Any]:
        found = asdict(self._parse(kind, name, self.plan.sections[name]))
        return {**found, "seed": self.plan.seed if found["seed"] is None else found["seed"]}

    def _stage(self, name: str, start: Path, folder: Path) -> tuple[dict[str, Any], Callable[[], Any]]:
        settings = {"seed": self.plan.seed, "bf16": self.bf16, **self.plan.sections[name]}
        flags = {"stage": name, "checkpoint": str(start), "data": str(self.train), "output": str(folder), **settings}
        run = self._parse(StageArguments, name, flags)
        return settings, lambda: train_stage(run)

    def evaluate(self) -> None:
        """Scores, sheet and card."""
        options = self._settings(EvaluateSettings, "evaluate")
        sheet = self.output / "samples.png"
        scores = self.scores.score_model(self.model, self.pictures, self.unseen, sheet=sheet, **options)
        verdict = self.scores.verdict(scores)
        facts = {"hardware": describe_hardware(), "commit": current_commit(), "verdict": verdict, "scores": scores}
        write_json(self.output / "results.json", {"command": current_command(), **facts})
        steps = {name: record for name in self.all_steps() if (record := self.records.read(name)) is not None}
        write_model_card(
            self.model,
            facts
            | {
                "license": self.plan.license,
                "image_size": self.plan.image_size,
                "num_trained": len(self.pictures.records),
                "num_heldout": len(self.unseen.records),
                "sources": [Path(spec.label).name for spec in parse_specs(self.plan.data)],
                "caption": next(row["captions"][0] for row in self.pictures.records if row["captions"]),
                "steps": {name: step for name, step in steps.items() if "max_steps" in step["settings"]},
            },
        )
        write_whole(self.model / "samples.png", lambda path: shutil.copyfile(sheet, path))
        write_whole(self.model / "from_scratch.yaml", self.plan_text())

    def plan_text(self) -> str:
        """All settings of the run as YAML, without where its data lies."""
        names = ("image_size", "pool_stride", "heldout_share", "seed", "license")
        settings = {name: getattr(self.plan, name) for name in names} | {"bf16": self.bf16}
        return yaml.safe_dump({**settings, **self.plan.sections}, sort_keys=False, allow_unicode=True)

    def run(self) -> Path:
        """Check every step against its record, then do what is not done.

        Raises:
            UsageError: a setting of a step that was begun differs.
        """
        steps = self.all_steps()
        for name, (settings, _) in steps.items():
            self.records.check(name, settings)
        if self.records.is_done("data") and has_changed(self.train, self.plan.data):
            raise UsageError(
                f"data: the files behind {steps['data'][0]['data']} have changed since {self.output} began with them. "
                "Put them back, or take another --output."
            )
        for name, (settings, work) in steps.items():
            self.records.run(name, settings, work)
        return self.model


def _flags_class(module: Any) -> Any:
    names = {"VisionArguments", "GenEncoderArguments", "DecoderArguments"} & vars(module).keys()
    return getattr(module, names.pop())


def is_fast_in_bf16() -> bool:
    """Whether this machine multiplies bf16 faster than fp32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    info = Path("/proc/cpuinfo")
    return info.is_file() and PRECISION_FLAG in info.read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> Path:
    """See the flags with --help."""
    parser = LineParser(prog="python -m finetune.from_scratch", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--config", required=True, help="YAML file with a section of flags for each step")
    parser.add_argument("--data", nargs="+", help="pictures with captions, as the recipes take them: see docs/data.md")
    parser.add_argument("--heldout", nargs="+", help="pictures to score on; default: a share of the data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; the same command goes on in it")
    parser.add_argument("--seed", type=SEED, help="of every step; default: the file's")
    parser.add_argument("--license", help="of the model's card, for example apache-2.0")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    plan = read_plan(options.pop("config"), **options)
    if plan.data is None:
        raise UsageError("--data is missing: name the folder or file of your pictures, or put it into the YAML file.")
    run = FromScratch(plan, output)
    model = run.run()
    print(yaml.safe_load((output / "results.json").read_text(encoding="utf-8"))["verdict"])
    print(f"the model: {model}   its pictures: {output / 'samples.png'}")
    return model


if __name__ == "__main__":
    run_command(main)
