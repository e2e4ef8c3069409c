"""What `finetune.lora_decoder` does to a pipeline: frozen encodings, the adapter, its loss, its measure, its folder.

Works on the pipeline's own parts, so that small decoders and SDXL's shape are one case: `modeling_pisces` knows how
each of them is called.
"""

# I pictures, M vectors of width Dg, C channels and h side of a latent
import json
import math
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler
from huggingface_hub import CommitOperationAdd, HfApi
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import nn
from torch.nn import functional as F

from finetune.parts.captioned import PictureData
from finetune.parts.pictures import TensorRows, to_pixel_values, to_uint8, write_sheet
from finetune.parts.trainer import Metrics
from finetune.scratch.scores import draw, psnr
from modeling_pisces.decoder_pisces import predict, vae_scale_factor
from modeling_pisces.pipeline_pisces import PiscesPipeline
from pisces_commands.arguments import UsageError
from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.writing import whole_files, write_json, write_whole


WEIGHTS = "pytorch_lora_weights.safetensors"
PUSHED = (WEIGHTS, "README.md", "run.yaml", "sheet.png")
POOR = 22.0  # dB, of an autoencoder: colours and outlines of small pictures are visibly others below
NUM_TRIED = 64  # pictures that tell whether an autoencoder is poor
LATENT_RATE = 0.1  # of `fit_latents`, in standard deviations of a batch's latents
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Measured = namedtuple("Measured", "psnr pictures")  # by name of the pictures: dB, and drawings (I, 3, S, S) uint8
Loaded = namedtuple("Loaded", "missing_keys unexpected_keys")


class LoraTraining(nn.Module):
    """The U-Net with its adapter under the loss that its scheduler was made for; its state is the adapter's alone."""

    def __init__(
        self, unet: nn.Module, scheduler: DDPMScheduler, time_ids, silence: torch.Tensor, noise: float, dropout: float
    ):
        super().__init__()
        self.unet, self.scheduler, self.time_ids = unet, scheduler, time_ids
        self.noise, self.dropout = noise, dropout
        self.register_buffer("silence", silence, persistent=False)

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "lora_" in name}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        return Loaded([name for name in found.missing_keys if "lora_" in name], found.unexpected_keys)

    def forward(self, latents: torch.Tensor, vectors: torch.Tensor, is_kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean squared error of noise, velocity or sample, whichever the U-Net predicts.

        What is to be kept learns from the base's own prediction: it has no noise, and is met exactly at the start.
        """
        device, number = latents.device, len(latents)
        vectors = vectors + self.noise * torch.randn_like(vectors)
        is_silent = torch.rand(number, 1, 1, device=device) < self.dropout
        vectors = torch.where(is_silent, self.silence.to(vectors), vectors)
        config = self.scheduler.config
        position = torch.rand(number, device=device)
        if config.get("rescale_betas_zero_snr"):  # more steps near pure noise, where only the vectors can help
            position = position.sqrt()
        steps = (position * config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        targets = {"epsilon": noise.clone, "sample": latents.clone}
        targets["v_prediction"] = lambda: self.scheduler.get_velocity(latents, noise, steps)
        target = targets[config.prediction_type]()
        if is_kept.any():
            target[is_kept] = self.base_prediction(noisy[is_kept], steps[is_kept], vectors[is_kept])
        predicted = predict(self.unet, noisy, steps, vectors, None, 1.0, self.time_ids)
        return {"loss": F.mse_loss(predicted, target)}

    @torch.no_grad()
    def base_prediction(self, noisy: torch.Tensor, steps: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """What the U-Net says without its adapter."""
        self.unet.disable_adapters()
        try:
            return predict(self.unet, noisy, steps, vectors, None, 1.0, self.time_ids)
        finally:
            self.unet.enable_adapters()


class DecoderLora:
    """A pipeline whose decoder is to be adapted.

    Args:
        source: checkpoint folder or Hub id.

    Raises:
        UsageError: it has no decoder with an autoencoder, or one that is not trained by noising.
    """

    def __init__(self, source: str):
        self.pipe = PiscesPipeline.from_pretrained(source, torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        if torch.cuda.is_available():
            self.pipe.to("cuda")
        unet, vae = self.pipe.unet, self.pipe.vae
        if vae is None or not hasattr(vae, "quant_conv") or unet.config.sample_size is None:
            raise UsageError(f"{source}: its decoder has no autoencoder, or no size of its own; nothing to adapt.")
        if self.pipe.scheduler.config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
            kind = type(self.pipe.scheduler).__name__
            raise UsageError(f"{source}: {kind} says no prediction_type of epsilon, v_prediction or sample.")
        self.source, self.side = source, unet.config.sample_size * vae_scale_factor(vae)
        for part in (unet, vae, self.pipe.vision_language_model):
            part.requires_grad_(False)

    @torch.no_grad()
    def encode(
        self, pictures: torch.Tensor, batch_size: int = 64, latent_steps: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 pictures (I, 3, S, S) to latents (I, C, h, h) as the U-Net takes them, and vectors (I, M, Dg).

        Args:
            latent_steps: of `fit_latents` on what the autoencoder encodes; 0 keeps that.
        """
        latents, vectors = [], []
        config, images = self.pipe.vae.config, self.pipe.processor.gen_image_processor
        shift = getattr(config, "shift_factor", None) or 0.0
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        for batch in pictures.split(batch_size):
            shown = to_pixel_values(batch).to(self.pipe.vae.device)
            found = self.pipe.vae.encode(shown).latent_dist.mode()
            found = self.fit_latents(found, shown, latent_steps).cpu()
            if mean is not None and std is not None:
                mean_, std_ = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
                latents.append((found - mean_) * config.scaling_factor / std_)
            else:
                latents.append((found - shift) * config.scaling_factor)
            pixels = images([picture.permute(1, 2, 0).numpy() for picture in batch], return_tensors="pt")[
                "pixel_values"
            ]
            vectors.append(self._vectors(pixels))
        return torch.cat(latents), torch.cat(vectors)

    @torch.enable_grad()
    def fit_latents(self, latents: torch.Tensor, shown: torch.Tensor, steps: int) -> torch.Tensor:
        """Latents that the frozen autoencoder paints nearer to the pictures than those it encodes itself.

        What it was never trained on it encodes worse than it paints: 16 emoji come back from pisces-tiny's latents
        with 13.0 dB, with 17.2 after 20 steps here, with 18.3 after 40.

        Args:
            latents: (B, C, h, h) from the encoder, unscaled.
            shown: the pictures as pixel values, (B, 3, S, S).
            steps: of Adam on the squared error of pixels, from `latents` on.
        """
        fitted = latents.clone().requires_grad_()
        optimizer = torch.optim.Adam([fitted], lr=LATENT_RATE * float(latents.std()))
        for _ in range(steps):
            optimizer.zero_grad()
            (self.pipe.vae.decode(fitted).sample - shown).square().mean().backward()
            optimizer.step()
        return fitted.detach()

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.pipe.vision_language_model
        return model.encode_gen_images(pixels.to(model.device)).float().cpu()

    @torch.no_grad()
    def silence(self) -> torch.Tensor:
        """What the decoder reads where nothing is asked for, (1, M, Dg)."""
        config = self.pipe.vision_language_model.config
        if self.pipe.config.default_negative == "zeros":
            return torch.zeros(1, config.num_gen_image_tokens, config.gen_vector_size)
        side = config.gen_vision_config.image_size
        return self._vectors(torch.zeros(1, 3, side, side))

    def rows(
        self, data: PictureData, kept: PictureData | None, keep_share: float, latent_steps: int = 0
    ) -> TensorRows:
        """Encoded pictures to train on, each of the new ones as often as gives the kept ones their share.

        `latent_steps` are taken only where the autoencoder alone paints these pictures poorly.
        """
        is_poor = bool(latent_steps) and self.ceiling(data.pictures[:NUM_TRIED]) < POOR
        latents, vectors = self.encode(data.pictures, latent_steps=latent_steps if is_poor else 0)
        self.deviation = float(vectors.std())
        self.model.noise *= self.deviation
        if kept is None or not keep_share:
            return TensorRows(latents=latents, vectors=vectors, is_kept=torch.zeros(len(latents), dtype=torch.bool))
        kept_latents, kept_vectors = self.encode(kept.pictures)
        times = max(1, math.ceil(len(kept_latents) * (1 - keep_share) / keep_share / len(latents)))
        fill = max(1, math.ceil(len(latents) * keep_share / (1 - keep_share) / len(kept_latents)))
        return TensorRows(
            latents=torch.cat([latents.repeat(times, 1, 1, 1), kept_latents.repeat(fill, 1, 1, 1)]),
            vectors=torch.cat([vectors.repeat(times, 1, 1), kept_vectors.repeat(fill, 1, 1)]),
            is_kept=torch.arange(len(latents) * times + len(kept_latents) * fill) >= len(latents) * times,
        )

    def training_model(self, rank: int, targets: str, noise: float, dropout: float) -> LoraTraining:
        """The U-Net with a fresh adapter of alpha = rank, which is what a file without alphas means."""
        kinds = (nn.Linear, nn.Conv2d)
        names = [name for name, layer in self.pipe.unet.named_modules() if isinstance(layer, kinds)]
        if targets == "attention":
            names = [name for name in names if name.endswith(ATTENTION)]
        self.pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        time_ids = None
        if self.pipe.unet.config.addition_embed_type == "text_time":
            time_ids = torch.tensor([self.side, self.side, 0, 0, self.side, self.side])
        silence = self.silence()
        self.model = LoraTraining(self.pipe.unet, scheduler, time_ids, silence, noise, dropout)
        return self.model

    @torch.no_grad()
    def ceiling(self, pictures: torch.Tensor) -> float:
        """What the frozen autoencoder makes of pictures by its own encoding, PSNR in dB."""
        vae = self.pipe.vae
        drawn = [
            to_uint8(vae.decode(vae.encode(to_pixel_values(batch).to(vae.device)).latent_dist.mode()).sample.cpu())
            for batch in pictures.split(16)
        ]
        return float(psnr(torch.cat(drawn), pictures).mean())

    def measure(self, heldout: PictureData, kept: PictureData | None, number: int) -> dict[str, Measured]:
        """Reconstructions of the first pictures as the decoder stands now, and how near they come."""
        found = {}
        for name, data in (("heldout", heldout), ("kept", kept)):
            if data is not None:
                wanted = data.pictures[:number]
                drawn = draw(self.pipe, self.side, 0, image=[as_image(picture) for picture in wanted])
                found[name] = Measured(float(psnr(drawn, wanted).mean()), [wanted, drawn])
        return found


def as_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def save_adapter(
    decoder: DecoderLora, run: Any, before: dict[str, Measured], after: dict[str, Measured], curve: list[dict]
) -> Metrics:
    """Write weights, sheet, card, results and `run.yaml`, this one last; returns PSNR in dB before and after."""
    folder, pipe = Path(run.output_dir), decoder.pipe
    with whole_files(folder, last=WEIGHTS) as partial:
        PiscesPipeline.save_lora_weights(partial, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    wanted = before["heldout"].pictures[0]
    metrics = {"heldout_psnr_autoencoder": round(decoder.ceiling(wanted), 2)}
    for name in after:
        metrics[f"{name}_psnr_before"] = round(before[name].psnr, 2)
        metrics[f"{name}_psnr"] = round(after[name].psnr, 2)
    strips = [part[:12] for name in after for part in (*before[name].pictures, after[name].pictures[1])]
    write_sheet([to_pixel_values(strip) for strip in strips], folder / "sheet.png")
    settings = asdict(run) | {"hub_token": None}
    record = {
        "recipe": "lora_decoder",
        "commit": current_commit(),
        "hardware": describe_hardware(),
        "metrics": metrics,
    }
    write_json(folder / "results.json", {**record, "command": _command(run), "arguments": settings, "curve": curve})
    write_whole(
        folder / "README.md", card(run, metrics, sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad))
    )
    write_whole(folder / "run.yaml", yaml.safe_dump({**record, "settings": settings}, sort_keys=False))
    print(f"lora_decoder: {json.dumps(metrics)} -> {folder}", flush=True)
    if metrics["heldout_psnr_autoencoder"] < POOR:
        print(
            f"Warning: the autoencoder alone reaches {metrics['heldout_psnr_autoencoder']} dB on these pictures, and "
            "what it cannot paint no adapter of the U-Net can. Train its painting half first, where you can: `python "
            "-m finetune.parts.decoder --part vae --checkpoint MODEL`."
        )
    return metrics


def _command(run: Any) -> str:
    return current_command().replace(run.hub_token, "...") if run.hub_token else current_command()


def card(run: Any, metrics: Metrics, num_parameters: int) -> str:
    """The adapter's `README.md`."""
    base = run.base_model_id or run.model_name_or_path
    metadata = {"library_name": "diffusers", "tags": ["pisces", "lora", "diffusers"]}
    if not Path(base).exists() and base.count("/") <= 1:
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    rows = [
        f"| {title} | {metrics[f'{name}_psnr_before']} | {metrics[f'{name}_psnr']} |"
        for name, title in (("heldout", "new look, held-out"), ("kept", "what the base drew"))
        if f"{name}_psnr" in metrics
    ]
    return f"""---
{header}
---

# A look for the decoder of {base}

LoRA of rank {run.lora_r} on the diffusion U-Net, {num_parameters:,} parameters, trained by `python -m
finetune.lora_decoder`; `run.yaml` has every setting. The language model and both towers are the base's.

```python
from modeling_pisces import PiscesPipeline

pipe = PiscesPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{run.hub_model_id or "this-folder"}")
pipe.reconstruct("photo.png").images[0]  # pipe.disable_lora() gives back the base
```

![wanted, base, with the adapter](sheet.png)

| reconstruction, PSNR in dB | base | with the adapter |
|---|---|---|
{chr(10).join(rows)}
"""


def push_adapter(folder: Path, repo_id: str, token: str | None, private: bool) -> str:
    """Push weights, card, settings and sheet in one commit; returns its URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = [folder / name for name in PUSHED if (folder / name).is_file()]
    additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    return str(
        api.create_commit(repo_id, additions, commit_message="Upload an adapter of a Pisces decoder").commit_url
    )
