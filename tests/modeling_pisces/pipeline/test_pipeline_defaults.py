"""The checkpoint's steps, guidance and negative, and what its U-Net was trained to predict, go where its U-Net goes."""

import copy
import json

import pytest
import torch


diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline  # noqa: E402

from modeling_pisces.pipeline_pisces import PiscesPipeline  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import draw, make_pipeline, make_unet, make_vae, seeds, vectors  # noqa: E402


NAMED = {"default_num_inference_steps": 3, "default_guidance_scale": 1.5, "default_negative": "zeros"}


def defaults(pipe: PiscesPipeline) -> dict:
    return {name: pipe.config[name] for name in NAMED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    make_pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction"), **NAMED).save_pretrained(folder)
    return folder


WAYS = {
    "components": lambda pipe, folder: PiscesPipeline(**pipe.components),
    "parts by hand": lambda pipe, folder: PiscesPipeline(unet=pipe.unet, scheduler=pipe.scheduler, vae=pipe.vae),
    "components and parameters": lambda pipe, folder: PiscesPipeline(**pipe.components, **pipe.parameters),
    "from_pipe": lambda pipe, folder: PiscesPipeline.from_pipe(pipe),
    "deepcopy": lambda pipe, folder: copy.deepcopy(pipe),
    "deepcopy of the parts": lambda pipe, folder: PiscesPipeline(**copy.deepcopy(pipe.components)),
    "from_pretrained": lambda pipe, folder: PiscesPipeline.from_pretrained(folder, unet=pipe.unet, vae=pipe.vae),
    "a new scheduler": lambda pipe, folder: PiscesPipeline(
        unet=pipe.unet, vae=pipe.vae, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_defaults_of_the_checkpoint_are_kept_on_every_way(folder, way):
    pipe = PiscesPipeline.from_pretrained(folder)
    again = WAYS[way](pipe, folder)
    assert defaults(again) == NAMED
    assert PiscesPipeline(**again.components).parameters["default_negative"] == "zeros"
    again.set_progress_bar_config(disable=True)
    again.scheduler = EulerDiscreteScheduler()  # reads the output as noise; this U-Net predicts velocities
    with pytest.raises(ValueError, match="trained to predict 'v_prediction'"):
        draw(again, image_vectors=vectors())


def test_saving_and_loading_again_keeps_the_defaults(folder, tmp_path):
    pipe = PiscesPipeline(**PiscesPipeline.from_pretrained(folder).components)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert defaults(PiscesPipeline.from_pretrained(tmp_path)) == NAMED
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: index[name] for name in NAMED} == NAMED


def test_pipelines_that_share_a_unet_keep_their_own_defaults():
    first = make_pipeline(**NAMED)
    second = PiscesPipeline.from_pipe(first, default_guidance_scale=7.0)
    assert defaults(second) == {**NAMED, "default_guidance_scale": 7.0}
    assert defaults(PiscesPipeline(**first.components)) == NAMED
    assert defaults(PiscesPipeline(**second.components)) == defaults(second)
    first.register_to_config(default_guidance_scale=2.0)
    assert PiscesPipeline(**first.components).config.default_guidance_scale == 2.0


def test_a_named_default_goes_before_that_of_the_unet():
    pipe = PiscesPipeline(**make_pipeline(**NAMED).components, default_negative="empty")
    assert defaults(pipe) == {**NAMED, "default_negative": "empty"}


def test_a_unet_without_history_gets_the_usual_defaults():
    pipe = PiscesPipeline(make_unet(), DDIMScheduler(), make_vae())
    assert defaults(pipe) == {
        "default_num_inference_steps": 50,
        "default_guidance_scale": 3.0,
        "default_negative": "empty",
    }


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"default_num_inference_steps": 0}, r"default_num_inference_steps is 0; expected an integer of at least 1"),
        ({"default_num_inference_steps": True}, r"default_num_inference_steps is True; expected an integer"),
        ({"default_guidance_scale": float("nan")}, r"default_guidance_scale is nan; expected a finite number >= 0"),
        ({"default_negative": ["zeros"]}, r"default_negative is \['zeros'\]; expected \"empty\""),
    ],
)
def test_a_default_that_no_call_could_use_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**wrong)


def stable_diffusion() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=make_unet(),
        vae=make_vae(),
        scheduler=DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_from_pipe_takes_any_pipeline_with_the_parts_and_casts_none():
    other = stable_diffusion()
    other.unet.to(torch.bfloat16)
    pipe = PiscesPipeline.from_pipe(other)
    assert pipe.unet is other.unet and pipe.vae is other.vae and pipe.scheduler is other.scheduler
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert pipe.config["_requires_safety_checker"] is False  # for the way back
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, image_vectors=vectors(), num_inference_steps=2, generator=seeds(0)).isfinite().all()
    assert PiscesPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def test_from_pipe_names_the_part_that_is_missing():
    class Other:
        config: dict = {}
        scheduler = DDIMScheduler()

    with pytest.raises(ValueError, match=r"Other has no unet, which drawing needs. Pass unet=, or a pipeline"):
        PiscesPipeline.from_pipe(Other())
    assert PiscesPipeline.from_pipe(Other(), unet=make_unet()).vae is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"default_num_inference_steps": 0}, "default_num_inference_steps is 0; expected an integer of at least 1"),
        ({"default_num_inference_steps": "x"}, "default_num_inference_steps is 'x'"),
        ({"default_guidance_scale": -1}, "default_guidance_scale is -1; expected a finite number >= 0"),
        ({"default_negative": "nope"}, "default_negative is 'nope'"),
    ],
)
def test_a_default_that_no_call_could_use_cannot_be_registered_later(wrong, message):
    pipe = make_pipeline(default_num_inference_steps=3)
    with pytest.raises(ValueError, match=message):
        pipe.register_to_config(**wrong)
    assert pipe.config.default_num_inference_steps == 3


def test_none_registered_later_is_what_the_constructor_makes_of_none():
    pipe, usual = make_pipeline(), make_pipeline()
    pipe.register_to_config(default_num_inference_steps=7, default_guidance_scale=2.0)
    pipe.register_to_config(default_num_inference_steps=None)
    assert pipe.config.default_num_inference_steps == usual.config.default_num_inference_steps
    assert pipe.config.default_guidance_scale == 2.0
