"""Stage 0, part 2: the diffusion decoder, which paints pixels from the frozen generation encoder's pooled vectors.

`python -m finetune.parts.decoder --part vae ...` trains the small autoencoder whose latents are diffused, and `--part
unet` the U-Net on latents and vectors computed once. The language model has no part in it (paper: the decoder is
trained as an autoencoder of the generation encoder). `vae` and `unet` in one folder, with the `scheduler`
that the U-Net's run adds there, are a whole decoder for `PiscesPipeline`.

`--checkpoint MODEL` goes on with the decoder of a finished Pisces of this kind, all of its weights, on pictures of
your own; `finetune.lora_decoder` is the way that leaves the base as it is.
"""

# I pictures, M vectors per picture, Dg width of a vector, C channels and h side of a latent
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F
from transformers import AutoProcessor, set_seed

from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts.captioned import PictureData
from finetune.parts.latents import VaeTraining, build_vae, encode_latents, whiten_latents
from finetune.parts.pictures import TensorRows, edge_errors, shift_pictures, to_pixel_values, write_sheet
from finetune.parts.trainer import Metrics, RunArguments, load_data_of, run_evaluation, train, write_results
from finetune.parts.whitening import pooled_vectors
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from modeling_pisces.modeling_pisces_gen_vision import PiscesGenVisionModel
from pisces_commands.arguments import UsageError
from pisces_commands.writing import whole_files


@dataclass
class DecoderArguments(RunArguments):
    """Flags of this recipe; the defaults are those of pisces-tiny."""

    part: Literal["vae", "unet"] = field(default="vae", metadata={"help": "which part to train"})
    gen_encoder: str | None = field(default=None, metadata={"help": "folder of the trained generation encoder (unet)"})
    vae: str | None = field(default=None, metadata={"help": "folder of the autoencoder (unet)"})
    checkpoint: str | None = field(
        default=None, metadata={"help": "a finished Pisces folder whose decoder is trained on; its towers stay"}
    )
    pool_stride: int = field(default=2, metadata={"help": "the model's gen_pool_stride (unet)"})
    vae_channels: list[int] = field(default_factory=lambda: [16, 32, 32], metadata={"help": "one width per level"})
    latent_channels: int = field(default=4, metadata={"help": "numbers of a latent's place (vae)"})
    unet_channels: list[int] = field(default_factory=lambda: [64, 80], metadata={"help": "one width per level"})
    edge_weight: float = field(default=4.0, metadata={"help": "extra weight of pixels at edges (vae)"})
    kl_weight: float = field(default=1e-4, metadata={"help": "weight of the divergence from a unit Gaussian (vae)"})
    vector_noise: float = field(default=0.15, metadata={"help": "noise on vectors of unit standard deviation (unet)"})
    vector_dropout: float = field(default=0.1, metadata={"help": "share of pictures with all-zero vectors (unet)"})
    max_shift: float = field(
        default=0.0, metadata={"help": "largest move and zoom of a training picture, in shares of its side"}
    )
    num_views: int = field(default=1, metadata={"help": "versions of each picture, moved by max_shift (unet)"})
    num_sampling_steps: int = field(default=20, metadata={"help": "DDIM steps of held-out samples (unet)"})


def build_unet(run: DecoderArguments, latent_size: int, num_channels: int, vector_size: int) -> UNet2DConditionModel:
    """A fresh U-Net that reads vectors by cross-attention at all levels but the first."""
    below = len(run.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=num_channels,
        out_channels=num_channels,
        block_out_channels=tuple(run.unet_channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * below,
        up_block_types=("CrossAttnUpBlock2D",) * below + ("UpBlock2D",),
        cross_attention_dim=64,
        encoder_hid_dim=vector_size,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Velocity prediction down to zero signal, so that the first step knows nothing but the vectors.

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


class UNetTraining(nn.Module):
    """Velocity loss on noised latents, given noised vectors."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler, run: DecoderArguments):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.run = run

    def forward(self, latents: torch.Tensor, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        device, num_pictures = latents.device, len(latents)
        vectors = vectors + self.run.vector_noise * torch.randn_like(vectors)
        # all-zero vectors, the mean of whitened ones, are the unconditional case that guidance needs
        vectors = vectors * (torch.rand(num_pictures, 1, 1, device=device) >= self.run.vector_dropout)
        # root of a uniform number: more steps near pure noise, where only the vectors can help
        position = torch.rand(num_pictures, device=device).sqrt()
        steps = (position * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        kinds = {"epsilon": lambda: noise, "sample": lambda: latents}
        kinds["v_prediction"] = lambda: self.scheduler.get_velocity(latents, noise, steps)
        target = kinds[self.scheduler.config.prediction_type]()
        predicted = self.unet(noisy, steps, encoder_hidden_states=vectors).sample
        return {"loss": F.mse_loss(predicted.float(), target)}

    @torch.no_grad()
    def sample(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (I, M, Dg) to latents (I, C, h, h) by DDIM without guidance."""
        config = self.unet.config
        shape = (len(vectors), config.in_channels, config.sample_size, config.sample_size)
        latents = torch.randn(shape).to(vectors.device)
        self.scheduler.set_timesteps(self.run.num_sampling_steps, device=vectors.device)
        for step in self.scheduler.timesteps:
            velocity = self.unet(latents, step, encoder_hidden_states=vectors).sample
            latents = self.scheduler.step(velocity, step, latents).prev_sample
        return latents


def picture_errors(drawn: torch.Tensor, pictures: torch.Tensor, sheet: Path | None = None) -> Metrics:
    """Mean squared error over all pixels and over pixels at edges, in squares of [-1, 1] units; a sheet to look at."""
    pixel_values = to_pixel_values(pictures)
    errors = (drawn - pixel_values).square().mean(dim=1, keepdim=True)
    if sheet is not None:
        write_sheet([side[i : i + 16] for i in (0, 16) for side in (pixel_values, drawn)], sheet)
    return {"heldout_mse": errors.mean(), "heldout_edge_mse": edge_errors(errors, pictures)}


def check_channels(run: DecoderArguments, image_size: int) -> None:
    """Refuse levels that cannot be: widths that normalisation cannot group, a side that does not halve often enough.

    Raises:
        UsageError: flag, value and expectation.
    """
    for flag, groups in (("vae_channels", 8), ("unet_channels", 16)):
        channels = getattr(run, flag)
        if len(channels) < 2 or any(width % groups for width in channels):
            raise UsageError(f"--{flag} {channels}: expected two or more multiples of {groups}.")
    halvings = len(run.vae_channels) + len(run.unet_channels) - 2
    if image_size % 2**halvings:
        raise UsageError(
            f"--vae_channels and --unet_channels halve a side {halvings} times, but pictures of {image_size} pixels "
            f"are no multiple of {2**halvings}. Take fewer levels, or another --image_size."
        )


def train_vae(run: DecoderArguments, data: PictureData, heldout: PictureData) -> Metrics:
    """Train, whiten and save the autoencoder; of a finished one only the half that paints, so that latents stay."""
    output = Path(run.output)
    if run.checkpoint is None:
        vae = build_vae(run.vae_channels, data.pictures.shape[-1], run.latent_channels)
    else:
        vae = AutoencoderKL.from_pretrained(run.checkpoint, subfolder="vae")
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    model = VaeTraining(vae, run.edge_weight, run.kl_weight, run.max_shift)

    def measure() -> Metrics:
        latents = encode_latents(vae, heldout.pictures).to(vae.device) / vae.config.scaling_factor
        drawn = torch.cat([vae.decode(batch).sample.cpu() for batch in latents.split(128)])
        return picture_errors(drawn, heldout.pictures, output / "sheet.png")

    curve = train(model, TensorRows(pictures=data.pictures), run, measure)
    if run.checkpoint is None:
        whiten_latents(vae, data.pictures[:4096])  # enough for four channels of 256 places each
    metrics = run_evaluation(model, measure)
    with whole_files(output) as folder:
        vae.save_pretrained(folder)
    write_results(run, "decoder vae", curve, metrics)
    return metrics


def frozen_parts(run: DecoderArguments) -> tuple[AutoencoderKL, PiscesGenVisionModel, int]:
    """The autoencoder, the generation tower and how many patches of a side make a vector.

    Raises:
        ValueError: a folder is missing, or the checkpoint prepares its pictures in another way.
    """
    if run.checkpoint is not None:
        model = PiscesForConditionalGeneration.from_pretrained(run.checkpoint)
        images = AutoProcessor.from_pretrained(run.checkpoint).gen_image_processor
        if not model.config.has_generation or set(images.image_mean + images.image_std) != {0.5}:
            raise ValueError(
                f"--checkpoint {run.checkpoint}: not a Pisces as `finetune.from_scratch` makes it (pictures in "
                "[-1, 1]). Train an adapter of its decoder with `python -m finetune.lora_decoder`."
            )
        vae = AutoencoderKL.from_pretrained(run.checkpoint, subfolder="vae")
        return vae.eval(), model.model.gen_vision_tower, model.config.gen_pool_stride
    if run.gen_encoder is None:
        raise ValueError("--part unet needs --gen_encoder, the folder that finetune.parts.gen_encoder wrote.")
    if run.vae is None:
        raise ValueError("--part unet needs --vae, the folder that --part vae wrote.")
    tower = PiscesGenVisionModel.from_pretrained(run.gen_encoder)
    return AutoencoderKL.from_pretrained(run.vae).eval(), tower, run.pool_stride


def train_unet(run: DecoderArguments, data: PictureData, heldout: PictureData) -> Metrics:
    """Precompute latents and vectors, then train and save the U-Net and its scheduler."""
    vae, tower, stride = frozen_parts(run)
    views = [data.pictures]
    for _ in range(run.num_views - 1):
        views.append(torch.cat([shift_pictures(batch, run.max_shift) for batch in data.pictures.split(256)]))
    latents = torch.cat([encode_latents(vae, pictures) for pictures in views])
    vectors = torch.cat([pooled_vectors(tower, pictures, stride) for pictures in views])
    heldout_vectors = pooled_vectors(tower, heldout.pictures, stride)
    if run.checkpoint is None:
        unet, scheduler = build_unet(run, latents.shape[-1], latents.shape[1], vectors.shape[-1]), build_scheduler()
    else:
        unet = UNet2DConditionModel.from_pretrained(run.checkpoint, subfolder="unet")
        scheduler = DDIMScheduler.from_pretrained(run.checkpoint, subfolder="scheduler")
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())  # fused attention in bf16 made a step a third slower on processors
    model = UNetTraining(unet, scheduler, run)
    output = Path(run.output)

    def measure() -> Metrics:
        drawn = [model.sample(batch.to(unet.device)).cpu() for batch in heldout_vectors.split(64)]
        pixels = torch.cat([vae.decode(latents / vae.config.scaling_factor).sample for latents in drawn])
        with whole_files(output) as folder:
            unet.save_pretrained(folder)  # with the averaged weights: usable while the run goes on
        with whole_files(output.parent / "scheduler", last="scheduler_config.json") as folder:
            model.scheduler.save_pretrained(folder)
        return picture_errors(pixels, heldout.pictures, output / "sheet.png")

    curve = train(model, TensorRows(latents=latents, vectors=vectors), run, measure)
    metrics = run_evaluation(model, measure)
    write_results(run, "decoder unet", curve, metrics)
    return metrics


def main(arguments: list[str] | None = None) -> Metrics:
    """Train one part; see the flags with --help."""
    run = parse_flags_of(DecoderArguments, arguments)
    set_seed(run.seed)
    if run.part == "unet" and run.checkpoint is None and (run.gen_encoder is None or run.vae is None):
        frozen_parts(run)  # says which folder is missing, before any picture is read
    if run.checkpoint is not None:
        if not Path(run.checkpoint).is_dir():
            raise UsageError(f"--checkpoint {run.checkpoint}: no such folder. Give a finished Pisces on this machine.")
        config = PiscesConfig.from_pretrained(run.checkpoint)
        if not config.has_generation:
            raise ValueError(f"--checkpoint {run.checkpoint}: no generation tower, so no decoder to train.")
        run.image_size = config.gen_vision_config.image_size
    data, heldout = load_data_of(run, num_heldout=64 if run.part == "unet" else 256)
    if run.checkpoint is None:
        check_channels(run, data.pictures.shape[-1])
    return (train_unet if run.part == "unet" else train_vae)(run, data, heldout)


if __name__ == "__main__":
    run_command(main)
