"""Which schedulers and VAE settings can work at all, and which fit what a U-Net was trained to predict.

The pipeline asks at the start of each call, because schedulers are swapped by assignment; the console command asks the
same of the files of a checkpoint. Only configurations and the planned numbers are read; diffusers is not needed.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .pipeline_checks_pisces import finite_number, integer


PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
# beginnings of diffusers' class names
EDM = ("EDM", "CosineDPM", "CMStochastic")
READS_FLOW_SIGMAS = ("DPMSolver", "UniPC", "DEIS", "SASolver")
# these keep a signal of exactly zero at the last step; the others put 2 ** -24 there
KEEPS_ZERO_SIGNAL = ("DDIM", "DDPM", "LCM", "TCD")


def prediction_kind(class_name: str, config: Mapping[str, Any]) -> str | None:
    """What a scheduler takes the U-Net's output for: one of PREDICTIONS, "edm" (Karras et al. 2022, networks with
    their own scaling of input and output), or None where its configuration does not say."""
    prediction = config.get("prediction_type")
    # by class, because `from_config` hands settings on to classes that do not read them
    has_flow_sigmas = class_name.startswith(READS_FLOW_SIGMAS) and config.get("use_flow_sigmas")
    if class_name.startswith("FlowM") or prediction == "flow_prediction" or has_flow_sigmas:
        return "flow_prediction"
    return "edm" if class_name.startswith(EDM) else prediction


def check_scheduler_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse settings that end in NaN: a noise schedule without noise or signal, or an unknown prediction.

    Args:
        config: of any diffusers scheduler, as its JSON file holds it.
        source: the file, or the class, for the message.

    Raises:
        ValueError: naming the setting.
    """
    steps = config.get("num_train_timesteps", 1000)
    if integer(steps) is None or steps < 1:
        raise ValueError(f"{source}: num_train_timesteps is {steps!r}; expected an integer of at least 1.")
    prediction = config.get("prediction_type")
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"{source}: prediction_type is {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
    betas = config.get("trained_betas")
    if betas is not None and not isinstance(betas, (list, tuple)):
        betas = betas.tolist() if hasattr(betas, "tolist") else [betas]
    if betas is not None:
        named = {f"trained_betas {index}": value for index, value in enumerate(betas)}
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        named = {}  # has no start and end
    else:
        named = {name: config[name] for name in ("beta_start", "beta_end") if name in config}
    for name, value in named.items():
        number = finite_number(value)
        if number is None or not 0 < number < 1:
            raise ValueError(f"{source}: {name} is {value!r}; expected a number between 0 and 1, both excluded.")
    class_name = str(config.get("_class_name", source))
    is_epsilon = prediction_kind(class_name, config) in (None, "epsilon")
    if config.get("rescale_betas_zero_snr") and is_epsilon and class_name.startswith(KEEPS_ZERO_SIGNAL):
        found = "is not set, which means" if prediction is None else "is"
        raise ValueError(
            f"{source}: prediction_type {found} 'epsilon' with rescale_betas_zero_snr; expected 'v_prediction' or "
            "'sample', because noise alone says nothing about the picture at a signal of zero."
        )


def check_vae_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a scaling of latents that divides by zero or is no number."""
    factor = config.get("scaling_factor")
    if factor is not None and not finite_number(factor):
        raise ValueError(f"{source}: scaling_factor is {factor!r}; expected a finite number other than 0.")
    shift = config.get("shift_factor")
    if shift is not None and finite_number(shift) is None:
        raise ValueError(f"{source}: shift_factor is {shift!r}; expected a finite number.")
    for name in ("latents_mean", "latents_std"):
        for index, value in enumerate(config.get(name) or ()):
            if finite_number(value) is None:
                raise ValueError(f"{source}: {name} {index} is {value!r}; expected a finite number.")


def check_scheduler(scheduler: Any, trained: str | None) -> None:
    """Refuse a scheduler whose settings cannot work, or that reads the U-Net's output as something else than it is.

    Args:
        trained: what the U-Net was trained to predict, as `prediction_kind` names it; None if nobody knows.
    """
    name = type(scheduler).__name__
    check_scheduler_config({**scheduler.config, "_class_name": name}, name)
    kind = prediction_kind(name, scheduler.config)
    if trained is None or kind is None or kind == trained:
        return
    if trained in ("edm", "flow_prediction") or kind in ("edm", "flow_prediction"):
        advice = "Use a scheduler of the checkpoint's own kind, for example the one in its scheduler/ folder."
    else:
        advice = f"Use {name}.from_config(pipe.scheduler.config, prediction_type={trained!r})."
    raise ValueError(
        f"scheduler: {name} reads the U-Net's output as {kind!r}, but this U-Net was trained to predict {trained!r}. "
        f"{advice}"
    )


def check_plan(scheduler: Any) -> None:
    """Refuse planned steps that hold no finite numbers."""
    name = type(scheduler).__name__
    for attribute in ("timesteps", "sigmas", "alphas_cumprod", "init_noise_sigma"):
        values = getattr(scheduler, attribute, None)
        if values is not None and not torch.isfinite(torch.as_tensor(values).float()).all():
            raise ValueError(f"scheduler: {name} plans {attribute} that are not finite. Check its settings.")
