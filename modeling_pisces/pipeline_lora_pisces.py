"""LoRA adapters of the decoder, in diffusers' words and diffusers' files.

`PiscesPipeline` inherits `DecoderLoraMixin`. diffusers' own loaders for U-Nets expect a text encoder beside them,
which this pipeline lacks, so only the base class is used, and the two functions that read and write the format.
Adapters of the language model are PEFT's and are merged by `conversion.merge_adapter`.
"""

import os
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import is_peft_available
from safetensors import SafetensorError
from torch import Tensor


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
