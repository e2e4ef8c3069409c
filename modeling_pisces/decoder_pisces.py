"""The diffusion decoder and its adapters: sizes, time steps, starting noise, guided prediction, VAE decoding, LoRA.

`pipeline_pisces.py` calls every function here, in the order in which it stands, and inherits `DecoderLoraMixin`.
Nothing here knows a prompt, a language model or a processor; what a call may ask for is checked in
`pipeline_checks_pisces.py`. LoRA keeps diffusers' words and files; its own loaders for U-Nets expect a text encoder
beside them, which this pipeline lacks, so only the base class is used, and the two functions that read and write the
format. Adapters of the language model are PEFT's and are merged by `conversion.merge_adapter`.
Letters: B samples, M generated vectors per image, Dg width of a generated vector, C latent channels, h x w latent size
(equal to the picture's size when there is no VAE).
"""

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import is_peft_available, logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor

from .pipeline_checks_pisces import Generators, check_schedule, integer


try:
    from diffusers.utils.torch_utils import get_module_execution_device
except ImportError:  # diffusers < 0.42 knows one device for the whole pipeline
    get_module_execution_device = None

logger = logging.get_logger(__name__)

_UPCASTING = threading.Lock()  # a VAE that is fp32 for a moment must not be met, or taken back, by another thread


def vae_scale_factor(vae: AutoencoderKL | AutoencoderTiny | None) -> int:
    """Pixels of the picture per latent, along one side; 1 for a pixel-space decoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def picture_size(
    unet: UNet2DConditionModel, vae: AutoencoderKL | AutoencoderTiny | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels, from the U-Net's own sample size where none is asked for.

    Raises:
        ValueError: a side is no positive multiple of the VAE's factor, or nothing says how large to draw.
    """
    factor, side = vae_scale_factor(vae), unet.config.sample_size
    if side is None and (height is None or width is None):
        raise ValueError("unet: sample_size is None, so the picture has no default size. Pass height= and width=.")
    sides = (side, side) if isinstance(side, int) or side is None else tuple(side)
    given = {"height": height, "width": width}
    lengths = []
    for side, (name, value) in zip(sides, given.items(), strict=True):
        length = side * factor if value is None else integer(value)
        if length is None or length < 1 or length % factor:
            raise ValueError(
                f"{name} is {value!r}; expected a positive multiple of {factor}, this decoder's pixels per latent."
            )
        lengths.append(length)
    return lengths[0], lengths[1]


def set_timesteps(
    scheduler, num_inference_steps: int, device: torch.device, timesteps: Sequence | None, sigmas: Sequence | None
) -> tuple[Tensor, int]:
    """Let the scheduler plan the steps; custom `timesteps` or `sigmas` replace `num_inference_steps`.

    Returns:
        the timesteps, one per U-Net call, and the number of steps that the progress bar counts.

    Raises:
        ValueError: both are given, or this scheduler cannot take the given one.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas are both given; pass one of them.")
    both = {"timesteps": timesteps, "sigmas": sigmas}
    custom: dict[str, Any] = {name: value for name, value in both.items() if value is not None}
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(scheduler).__name__} takes no custom {name}. Pass num_inference_steps=, or swap the scheduler."
            )
    num_trained = scheduler.config.get("num_train_timesteps")
    for name, values in custom.items():
        custom[name] = check_schedule(name, values, num_trained)
    if not custom and num_trained and num_inference_steps > num_trained:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}; expected at most {num_trained}, the number of steps that "
            "this scheduler was made for (num_train_timesteps)."
        )
    steps = custom or {"num_inference_steps": num_inference_steps}
    scheduler.set_timesteps(**steps, device=device)
    if not len(scheduler.timesteps):
        raise ValueError(f"{custom or num_inference_steps} leaves {type(scheduler).__name__} no step. Give more.")
    return scheduler.timesteps, len(scheduler.timesteps) if custom else num_inference_steps


def step_options(scheduler, eta: float, generator: Generators) -> dict:
    """The optional arguments that this scheduler's `step` understands; not every one has noise or an eta."""
    known = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in known:
        logger.warning(f"eta={eta} has no effect: {type(scheduler).__name__} does not use it.")
    options = {"eta": eta, "generator": generator}
    return {name: value for name, value in options.items() if name in known}


def start_latents(
    scheduler, shape: tuple[int, int, int, int], generator: Generators, device: torch.device, latents: Tensor | None
) -> Tensor:
    """The noise that denoising starts from, (B, C, h, w) in fp32, scaled as the scheduler wants it."""
    if latents is None:
        # fp32 whatever the weights are, so that one seed means one picture in every dtype
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    # flow-matching schedulers start from unit noise and have no such factor
    return latents.to(device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)


def shortened(scheduler, timesteps: Tensor, num_steps: int, strength: float) -> tuple[Tensor, int]:
    """The last `strength` of the planned steps, as diffusers' image-to-image pipelines count them.

    Args:
        scheduler: of this call alone; it is told where it begins.

    Returns:
        as `set_timesteps`.

    Raises:
        ValueError: not one step is left.
    """
    left = int(num_steps * strength + 1e-6)  # 50 * 0.58 is 28.999999999999996
    if left < 1:
        raise ValueError(
            f"strength {strength:g} of {num_steps} steps leaves no step. Raise strength or num_inference_steps."
        )
    first = (num_steps - left) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:], left


def noised(scheduler, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents of a picture with the noise of a time step, (B, C, h, w) in fp32."""
    latents, timesteps = latents.to(noise), timestep.reshape(1).expand(len(noise))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(latents, timesteps, noise)
    return scheduler.add_noise(latents, noise, timesteps)


def predict(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: Tensor,
    vectors: Tensor,
    negative_vectors: Tensor | None,
    guidance_scale: float,
    time_ids: Tensor | None,
) -> Tensor:
    """One call of the U-Net, guided away from `negative_vectors` where there are any.

    Args:
        latents: (B, C, h, w), scaled for the U-Net.
        vectors, negative_vectors: (B, M, Dg).
        time_ids: (6,) sizes and crop of SDXL, or None for U-Nets without them.

    Returns:
        (B, C, h, w) in fp32: noise, sample or velocity, as the U-Net was trained.
    """
    if negative_vectors is not None:
        latents, vectors = torch.cat([latents, latents]), torch.cat([negative_vectors, vectors])
    vectors = vectors.to(unet.dtype)
    added = None
    if time_ids is not None:
        added = {"text_embeds": vectors.mean(1), "time_ids": time_ids.to(vectors).expand(len(vectors), -1)}
    output = unet(
        latents.to(unet.dtype),
        timestep,
        encoder_hidden_states=vectors,
        added_cond_kwargs=added,
        return_dict=False,
    )[0].float()  # fp32: schedulers subtract nearly equal numbers
    if negative_vectors is None:
        return output
    negative, positive = output.chunk(2)
    return negative + guidance_scale * (positive - negative)


def encode_latents(vae: AutoencoderKL | AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) in fp32, the most likely ones: no noise is drawn."""
    encoded = _run_vae(vae, vae.encode, pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return _scale_latents(vae.config, latents.float())


def decode_latents(vae: AutoencoderKL | AutoencoderTiny | None, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) in about [-1, 1]; without a VAE the latents are the pixels."""
    if vae is None:
        return latents
    return _run_vae(vae, vae.decode, _unscale_latents(vae.config, latents)).sample


def _run_vae(vae: AutoencoderKL | AutoencoderTiny, work: Callable[[Tensor], Any], values: Tensor) -> Any:
    if get_module_execution_device is not None:
        values = values.to(get_module_execution_device(vae))  # a VAE on a device of its own
    # fp32 here: the SDXL VAE overflows in fp16 and returns black images; its config says so with force_upcast
    with _UPCASTING:
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae.to(dtype=torch.float32)
            try:
                return work(values.float())
            finally:
                vae.to(dtype=torch.float16)  # exact: every fp16 number survives the way to fp32 and back
    return work(values.to(vae.dtype))


def _scale_latents(config, latents: Tensor) -> Tensor:
    """The inverse of `_unscale_latents`."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return (latents - mean) / std * config.scaling_factor
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _unscale_latents(config, latents: Tensor) -> Tensor:
    """Undo the scaling that gives the U-Net latents of about unit variance: one factor, or one per channel."""
    latents = latents / config.scaling_factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return latents * std + mean
    return latents + (getattr(config, "shift_factor", None) or 0.0)


class DecoderLoraMixin(LoraBaseMixin):
    """`load_lora_weights` and its kin for the U-Net; `set_adapters`, `delete_adapters`, ... are diffusers' own."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """Attach a LoRA adapter to the U-Net and make it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a folder or Hub id with `pytorch_lora_weights.safetensors`, a
                safetensors file, or its tensors by name. Names start with "unet." (as `save_lora_weights` writes
                them) or with the U-Net's own parts (as `unet.save_lora_adapter` does).
            adapter_name: to select it by; None is default_0, default_1, ...
            hotswap: put the weights into the adapter of that name, without recompiling.
            low_cpu_mem_usage: as in diffusers.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, ... as in diffusers.

        Raises:
            ValueError: PEFT is missing, the file is no safetensors LoRA of this U-Net, or a number is not finite.
        """
        if not is_peft_available():
            raise ValueError("LoRA adapters need the package peft. Install it: pip install peft")
        source = pretrained_model_name_or_path_or_dict
        label = "the given tensors" if isinstance(source, dict) else str(source)
        state, alphas, metadata = self.lora_state_dict(source, **kwargs)
        state = {name: value for name, value in state.items() if not name.startswith(("text_encoder", "te_"))}
        _check_lora(state, label)
        prefix = self.unet_name if any(name.startswith("unet.") for name in state) else None
        try:
            self.unet.load_lora_adapter(
                state,
                prefix=prefix,
                network_alphas=alphas,
                adapter_name=adapter_name,
                metadata=metadata,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )
        except (RuntimeError, KeyError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{label}: does not fit this decoder's U-Net ({reason:.300}).") from error

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor], **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict | None, dict | None]:
        """The tensors of a LoRA file in diffusers' names, its alphas (kohya files) and metadata; never a pickle."""
        source = pretrained_model_name_or_path_or_dict
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False; expected a safetensors file: a pickle can run code when read.")
        kwargs.pop("return_lora_metadata", None)
        if not isinstance(source, dict):
            source = os.fspath(source)
            if os.path.isfile(source) and not source.endswith(".safetensors"):
                raise ValueError(f"{source}: expected a .safetensors file; a pickle can run code when read.")
        try:
            return StableDiffusionLoraLoaderMixin.lora_state_dict(
                dict(source) if isinstance(source, dict) else source,
                use_safetensors=True,
                return_lora_metadata=True,
                **kwargs,
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{source}: no LoRA weights could be read ({reason:.200}). Give a folder or Hub id with "
                "pytorch_lora_weights.safetensors, or weight_name=."
            ) from error

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, torch.nn.Module | Tensor] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write LoRA layers of the U-Net as `pytorch_lora_weights.safetensors`, which every diffusers loader reads.

        Args:
            save_directory: a folder; made if it is not there.
            unet_lora_layers: for example `peft.get_peft_model_state_dict(pipe.unet, adapter_name=...)`.
            safe_serialization: only True; a pickle is not written.
            kwargs: `weight_name`, `unet_lora_adapter_metadata`, `is_main_process`, `save_function` of diffusers.

        Raises:
            ValueError: there are no layers, or a folder cannot be written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False; expected True: LoRA weights are saved as safetensors only.")
        if not unet_lora_layers:
            raise ValueError(
                "unet_lora_layers is empty; expected the U-Net's LoRA layers, for example "
                "peft.get_peft_model_state_dict(pipe.unet)."
            )
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory}: this is a file. Give a folder to save the LoRA weights in.")
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            save_directory, unet_lora_layers=unet_lora_layers, safe_serialization=True, **kwargs
        )

    def fuse_lora(self, components: list[str] = ["unet"], **kwargs: Any) -> None:  # noqa: B006 (diffusers' signature)
        """Add the active adapters into the U-Net's weights; `lora_scale` and `adapter_names` as in diffusers."""
        super().fuse_lora(components=components, **kwargs)

    def unfuse_lora(self, components: list[str] = ["unet"], **kwargs: Any) -> None:  # noqa: B006
        """Take fused adapters out of the weights again."""
        super().unfuse_lora(components=components, **kwargs)


def _check_lora(state: dict[str, Any], source: str) -> None:
    wrong = [name for name in state if "lora" not in name]
    if not state or wrong:
        found = f"names such as {wrong[0]}" if wrong else "no tensors for the U-Net"
        raise ValueError(f"{source}: {found}; expected LoRA layers of the U-Net, named unet.(...).lora_A.weight.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not torch.isfinite(value).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values. Train or download the adapter again.")
