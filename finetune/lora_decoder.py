"""Teach the decoder a new look: LoRA on the diffusion U-Net, generation vectors in, pixels out.

`python -m finetune.lora_decoder --model_name_or_path pisces-tiny --data FOLDER --output_dir runs/look` encodes the
pictures once with the frozen generation tower and the frozen autoencoder, trains low-rank updates of the U-Net to
paint them, and saves them as diffusers does: `pipe.load_lora_weights("runs/look")` puts them on, `pipe.disable_lora()`
takes them off to the last bit. The language model has no part in it. SDXL-shaped decoders are trained by the same
command. `--keep` names pictures of what the base already draws; some of each batch are taken from there, so that it
does not forget them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed

from finetune.flags.parsing import parse_classes, run_command
from finetune.flags.ranges import check_ranges
from finetune.parts.captioned import PictureData, load_pictures, prepare
from finetune.parts.trainer import RunArguments, train
from finetune.scratch.steps import StepRecords
from pisces_commands.arguments import UsageError


PUSHING = ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "base_model_id")


@dataclass
class LoraDecoderArguments:
    """Flags of this recipe; what they reach on pisces-tiny stands in docs/from_scratch.md."""

    data: list[str] = field(metadata={"help": "pictures of the new look, as the recipes take them: see docs/data.md"})
    output_dir: str = field(metadata={"help": "folder of the adapter; the same command goes on in it"})
    model_name_or_path: str = field(default="", metadata={"help": "checkpoint folder or Hub id with a decoder"})
    heldout_share: float = field(default=0.1, metadata={"help": "of the pictures, kept from training to measure on"})
    keep: list[str] | None = field(default=None, metadata={"help": "pictures that the base draws and must not forget"})
    keep_share: float = field(default=0.4, metadata={"help": "of the rows of a batch, taken from --keep"})
    lora_r: int = field(default=16, metadata={"help": "rank; alpha is the same, as files of diffusers assume it"})
    targets: Literal["all", "attention"] = field(
        default="all", metadata={"help": "layers with an update: all that multiply, or those of attention alone"}
    )
    latent_steps: int = field(
        default=20,
        metadata={
            "help": "steps towards latents that the autoencoder paints best, where it is poor; 0: as it encodes"
        },
    )
    vector_noise: float = field(default=0.03, metadata={"help": "noise on vectors, in their standard deviations"})
    vector_dropout: float = field(default=0.1, metadata={"help": "share of rows whose vectors say nothing"})
    max_steps: int = field(default=800, metadata={"help": "optimizer steps of the run, those before a resume too"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "pictures per step"})
    learning_rate: float = field(default=3e-3, metadata={"help": "peak after the warm-up; then a cosine to 0"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    ema_decay: float = field(default=0.99, metadata={"help": "decay per step of the averaged weights that are saved"})
    num_eval_pictures: int = field(default=32, metadata={"help": "held-out pictures, and kept ones, to measure on"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and noise"})
    bf16: bool = field(default=False, metadata={"help": "bf16 products; faster with avx512_bf16 or a GPU"})
    logging_steps: int = field(default=25, metadata={"help": "steps between two points of the curve"})
    save_steps: int = field(default=200, metadata={"help": "steps between two checkpoints; the last two are kept"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the adapter when it is done"})
    hub_model_id: str | None = field(default=None, metadata={"help": "OWNER/NAME to push to"})
    hub_token: str | None = field(default=None, metadata={"help": "token of the Hub; default: of your login"})
    hub_private_repo: bool = field(default=True, metadata={"help": "make the repository private"})
    base_model_id: str | None = field(default=None, metadata={"help": "Hub id of the base, for the card"})

    def __post_init__(self):
        if not self.model_name_or_path:
            raise UsageError("--model_name_or_path is missing: a checkpoint folder or Hub id with a decoder.")
        if self.push_to_hub and not self.hub_model_id:
            raise UsageError("--push_to_hub needs --hub_model_id OWNER/NAME.")
        if self.push_to_hub and Path(self.model_name_or_path).is_dir() and not self.base_model_id:
            raise UsageError(
                f"--push_to_hub: the base {self.model_name_or_path} is a folder of this machine. Add --base_model_id "
                "OWNER/NAME, under which others find it."
            )
        check_ranges(self)

    def training(self) -> RunArguments:
        """The same for `finetune.parts.trainer`."""
        return RunArguments(
            data=self.data,
            output=self.output_dir,
            max_steps=self.max_steps,
            batch_size=self.per_device_train_batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=0.0,
            ema_decay=self.ema_decay,
            seed=self.seed,
            log_steps=self.logging_steps,
            eval_steps=self.max_steps + 1,
            save_steps=self.save_steps,
            bf16=self.bf16,
        )


def load_rows(run: LoraDecoderArguments, side: int) -> tuple[PictureData, PictureData, PictureData | None]:
    """Pictures to train on, held-out ones, and those to keep, at the decoder's size.

    Raises:
        ValueError: data that cannot be read, or too little of it.
    """
    folder = Path(run.output_dir) / "pictures"
    prepare(run.data, side, folder / "train", run.heldout_share, folder / "heldout")
    train_data, heldout = (load_pictures(folder / name).with_texts for name in ("train", "heldout"))
    kept = None if run.keep is None else load_pictures(run.keep, side, folder=folder / "keep").with_texts
    return train_data, heldout, kept


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, save; see the flags with --help."""
    (run,) = parse_classes([LoraDecoderArguments], arguments)
    settings = {name: value for name, value in asdict(run).items() if name not in (*PUSHING, "output_dir")}
    records = StepRecords(run.output_dir)
    records.check("train", settings)
    # the decoder needs diffusers, which an understanding-only environment may lack
    from finetune.scratch.decoder_lora import DecoderLora, push_adapter, save_adapter

    set_seed(run.seed)
    decoder = DecoderLora(run.model_name_or_path)
    data, heldout, kept = load_rows(run, decoder.side)
    num_shown = run.num_eval_pictures
    before = decoder.measure(heldout, kept, num_shown)
    model = decoder.training_model(run.lora_r, run.targets, run.vector_noise, run.vector_dropout)
    rows = decoder.rows(data, kept, run.keep_share, run.latent_steps)
    result: dict[str, Any] = {}

    def work() -> None:
        result["curve"] = train(model, rows, run.training())
        after = decoder.measure(heldout, kept, num_shown)
        result["metrics"] = save_adapter(decoder, run, before, after, result["curve"])

    records.run("train", settings, work)
    if run.push_to_hub:
        print(f"pushed: {push_adapter(Path(run.output_dir), run.hub_model_id, run.hub_token, run.hub_private_repo)}")
    return result.get("metrics", {})


if __name__ == "__main__":
    run_command(main)
