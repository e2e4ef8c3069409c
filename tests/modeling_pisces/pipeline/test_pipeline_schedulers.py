"""Schedulers that do not fit the U-Net's training, and settings that end in NaN, are refused by name."""

import json

import pytest


diffusers = pytest.importorskip("diffusers")

from modeling_pisces.checkpoint.files import check_checkpoint  # noqa: E402
from modeling_pisces.pipeline_checks_pisces import check_scheduler_config, check_vae_config  # noqa: E402
from modeling_pisces.pipeline_pisces import PiscesPipeline  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import draw, make_full_pipeline, make_pipeline, vectors  # noqa: E402


def saved(folder, **scheduler) -> PiscesPipeline:
    """A decoder that was trained with this scheduler, loaded from its checkpoint."""
    kind = scheduler.pop("kind", "DDIMScheduler")
    make_pipeline(scheduler=getattr(diffusers, kind)(**scheduler)).save_pretrained(folder)
    pipe = PiscesPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


REFUSED = [
    ("FlowMatchEulerDiscreteScheduler", {}, "flow_prediction"),
    ("FlowMatchHeunDiscreteScheduler", {}, "flow_prediction"),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "flow_prediction",
    ),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow_prediction"),
    ("EDMEulerScheduler", {}, "edm"),
    ("EDMDPMSolverMultistepScheduler", {}, "edm"),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("DDPMScheduler", {"prediction_type": "sample"}, "sample"),
]


@pytest.mark.parametrize("kind, settings, found", REFUSED)
def test_a_scheduler_of_another_prediction_is_refused_before_the_unet_runs(tmp_path, kind, settings, found):
    pipe = saved(tmp_path)
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the U-Net ran")
    pipe.scheduler = getattr(diffusers, kind)(**settings)
    message = rf"{kind} reads the U-Net's output as '{found}', but this U-Net was trained to predict 'epsilon'. Use"
    with pytest.raises(ValueError, match=message):
        draw(pipe, image_vectors=vectors())
    given = PiscesPipeline.from_pretrained(tmp_path, scheduler=getattr(diffusers, kind)(**settings))
    with pytest.raises(ValueError, match=message):
        draw(given, image_vectors=vectors())


def test_the_message_says_how_to_build_the_scheduler_that_fits(tmp_path):
    pipe = saved(tmp_path, prediction_type="v_prediction")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    advice = r"Use EulerDiscreteScheduler.from_config\(pipe.scheduler.config, prediction_type='v_prediction'\)"
    with pytest.raises(ValueError, match=advice):
        draw(pipe, image_vectors=vectors())
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, prediction_type="v_prediction")
    assert draw(pipe, image_vectors=vectors()).isfinite().all()


def test_settings_that_another_class_left_behind_are_not_read(tmp_path):
    pipe = saved(tmp_path)
    for kind in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"):
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    assert draw(pipe, image_vectors=vectors()).isfinite().all()


def test_a_decoder_trained_by_flow_matching_keeps_to_flow_matching(tmp_path):
    pipe = saved(tmp_path, kind="FlowMatchEulerDiscreteScheduler")
    assert draw(pipe, image_vectors=vectors()).isfinite().all()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    assert draw(pipe, image_vectors=vectors()).isfinite().all()
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match=r"as 'epsilon', but this U-Net was trained to predict 'flow_prediction'"):
        draw(pipe, image_vectors=vectors())


def test_of_a_unet_whose_training_nobody_knows_nothing_is_said(tmp_path):
    pipe = saved(tmp_path)
    other = PiscesPipeline.from_pretrained(tmp_path, unet=make_pipeline().unet)
    other.set_progress_bar_config(disable=True)
    other.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    assert draw(other, image_vectors=vectors()).isfinite().all()
    pipe.unet = make_pipeline().unet
    pipe.scheduler = other.scheduler
    assert draw(pipe, image_vectors=vectors()).isfinite().all()


WRONG = [
    ({"beta_end": 0}, r"beta_end is 0; expected a number between 0 and 1, both excluded"),
    ({"beta_start": -0.1}, r"beta_start is -0.1; expected a number between 0 and 1"),
    ({"beta_start": float("nan")}, r"beta_start is nan; expected a number between 0 and 1"),
    ({"beta_end": 1.0}, r"beta_end is 1.0; expected a number between 0 and 1"),
    ({"beta_end": None}, r"beta_end is None; expected a number between 0 and 1"),
    ({"trained_betas": [0.1, 0.0]}, r"trained_betas 1 is 0.0; expected a number between 0 and 1"),
    ({"num_train_timesteps": 0}, r"num_train_timesteps is 0; expected an integer of at least 1"),
    ({"num_train_timesteps": "1000"}, r"num_train_timesteps is '1000'; expected an integer of at least 1"),
    ({"prediction_type": "velocity"}, r"prediction_type is 'velocity'; expected one of epsilon, sample, v_prediction"),
    ({"rescale_betas_zero_snr": True}, r"prediction_type is 'epsilon' with rescale_betas_zero_snr; expected 'v_pred"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_settings_of_a_scheduler_that_end_in_nan_are_refused(settings, message):
    config = {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon", **settings}
    with pytest.raises(ValueError, match="here: " + message):
        check_scheduler_config({"_class_name": "DDIMScheduler", **config}, "here")


@pytest.mark.parametrize("settings", [{"rescale_betas_zero_snr": True}, {"beta_end": 1.0}])
def test_the_pipeline_refuses_them_too(settings):
    pipe = make_pipeline(scheduler=diffusers.DDIMScheduler(timestep_spacing="trailing", **settings))
    with pytest.raises(ValueError, match=r"DDIMScheduler: (prediction_type is 'epsilon' with|beta_end is 1.0)"):
        draw(pipe, image_vectors=vectors())


def test_a_plan_that_is_not_finite_is_refused():
    pipe = make_pipeline(scheduler=diffusers.EulerDiscreteScheduler())
    pipe.scheduler.alphas_cumprod[:] = float("nan")
    with pytest.raises(ValueError, match=r"scheduler: EulerDiscreteScheduler plans (sigmas|timesteps) that are not"):
        draw(pipe, image_vectors=vectors())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scaling_factor": 0}, r"here: scaling_factor is 0; expected a finite number other than 0"),
        ({"scaling_factor": float("nan")}, r"here: scaling_factor is nan; expected a finite number other than 0"),
        ({"shift_factor": float("inf")}, r"here: shift_factor is inf; expected a finite number"),
        ({"latents_std": [1.0, None]}, r"here: latents_std 1 is None; expected a finite number"),
    ],
)
def test_settings_of_a_vae_that_end_in_nan_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_vae_config(settings, "here")


def test_the_pipeline_checks_its_vae():
    pipe = make_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.0)
    with pytest.raises(ValueError, match=r"vae: scaling_factor is 0.0; expected a finite number other than 0"):
        draw(pipe, image_vectors=vectors())


@pytest.mark.parametrize(
    "part, settings, message",
    [
        ("scheduler", {"beta_end": 0}, r"scheduler_config.json: beta_end is 0; expected"),
        ("scheduler", {"rescale_betas_zero_snr": True, "prediction_type": None}, r"prediction_type is not set, which"),
        ("vae", {"scaling_factor": 0}, r"vae.config.json: scaling_factor is 0; expected"),
    ],
)
def test_the_console_refuses_such_files_by_name(tmp_path, part, settings, message):
    make_full_pipeline().save_pretrained(tmp_path)
    check_checkpoint(tmp_path, with_decoder=True)
    path = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path, with_decoder=True)
