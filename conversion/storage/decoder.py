"""Reads, checks and writes a diffusion decoder: `unet/`, `vae/`, `scheduler/` and `model_index.json`.

`from_emu2_gen` and `from_sdxl` make their decoder folders here; `PiscesPipeline.from_pretrained` loads them. Weights
are named and measured against the diffusers classes on the meta device, so that a wrong file stops before anything is
written. Which weights a decoder gets is left to the two commands.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.storage.hub_files import index_variant
from conversion.storage.tensors import PlannedTensor, SourceTensor
from conversion.storage.write import write_shards
from modeling_pisces.checkpoint.files import read_json


WEIGHTS = "diffusion_pytorch_model"
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def read_component(
    source: str, folder: Path, component: str, variant: str | None
) -> tuple[dict[str, Any], dict[str, SourceTensor]]:
    """Read the config of `unet` or `vae` and where its tensors lie.

    Args:
        source: what the user calls the folder, for messages.

    Raises:
        ValueError: it is not there, or it is of another class than Pisces can use.
    """
    config = read_json(folder / component / "config.json")
    if (found := config.get("_class_name")) != CLASSES[component]:
        raise ValueError(f"{source}: {component} is a {found!r}, expected a {CLASSES[component]}.")
    config.pop("_name_or_path", None)  # a path on the machine of whoever saved it
    return config, index_variant(folder / component, WEIGHTS, variant)[0]


def build_component(component: str, config: Mapping[str, Any]) -> Any:
    """The diffusers model of a config on the meta device: names and shapes without memory."""
    import torch

    try:
        import diffusers
    except ImportError as error:
        raise ValueError("a decoder needs diffusers; install it with: pip install diffusers accelerate") from error
    with torch.device("meta"):
        return getattr(diffusers, CLASSES[component]).from_config(dict(config))


def check_shapes(where: str, found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Names and shapes must be exactly the expected ones.

    Raises:
        ValueError: naming the first tensor that is missing, not known or of another shape.
    """
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where}: {name} is missing; expected shape {tuple(expected[name])}. Download it again.")
    for name in sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where}: {name} is not known; its config describes no such tensor.")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{where}: {name} has shape {tuple(found[name])}, its config asks for {tuple(shape)}.")


def state_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in a model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_scheduler(source: str, folder: Path) -> dict[str, Any]:
    """The scheduler's config.

    Raises:
        ValueError: there is none, or it does not say its class.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if not isinstance(config.get("_class_name"), str):
        raise ValueError(
            f"{source}: scheduler/scheduler_config.json has no _class_name, expected a diffusers scheduler."
        )
    return config


def change_scheduler(
    config: Mapping[str, Any], prediction_type: str | None, zero_terminal_snr: bool
) -> dict[str, Any]:
    """The scheduler as it is, or with the two settings that a training may want to change.

    Raises:
        ValueError: a zero terminal SNR without v-prediction, or a scheduler that lacks the setting.
    """
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if zero_terminal_snr:
        if {**config, **changes}.get("prediction_type") != "v_prediction":
            raise ValueError(
                "zero_terminal_snr needs prediction_type v_prediction: pure noise holds nothing else to predict."
            )
        # the last step must be the one of pure noise, or sampling never visits it (arXiv 2305.08891)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if unknown := sorted(set(changes) - _scheduler_settings(config["_class_name"])):
        raise ValueError(
            f"scheduler: {config['_class_name']} has no setting {unknown[0]}. Leave it as it is, or put another "
            "scheduler into the folder."
        )
    return {**config, **changes}


def _scheduler_settings(class_name: str) -> set[str]:
    import diffusers

    known = getattr(diffusers, class_name, None)
    return set(inspect.signature(known.__init__).parameters) if known is not None else set()


def write_decoder(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    plans: Mapping[str, Sequence[PlannedTensor]],
    scheduler: Mapping[str, Any],
    max_shard_size: int | str,
) -> list[dict[str, Any]]:
    """Write a decoder folder that `PiscesPipeline.from_pretrained` loads.

    Args:
        configs, plans: of "unet" and "vae".

    Returns:
        the records of `write_shards`, with the names as "unet.<key>" and "vae.<key>".
    """
    records = []
    for component in CLASSES:
        (folder / component).mkdir(parents=True)
        write_json(folder / component / "config.json", configs[component])
        written = write_shards(plans[component], folder / component, max_shard_size, stem=WEIGHTS)
        records += [record | {"name": f"{component}.{record['name']}"} for record in written]
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", _model_index(configs, scheduler))
    return records


def _model_index(configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "PiscesPipeline",
        "_diffusers_version": configs["unet"].get("_diffusers_version"),
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "vision_language_model": [None, None],
        "processor": [None, None],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, readable and ending in a newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
