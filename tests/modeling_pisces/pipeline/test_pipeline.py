"""Drawing from vectors: the loop, generators, guidance, schedulers, outputs and callbacks."""

import numpy as np
import pytest
import torch


diffusers = pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback  # noqa: E402

from modeling_pisces.decoder_pisces import decode_latents  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import draw, make_pipeline, seeds, vectors  # noqa: E402


def test_picture_depends_on_the_vectors_and_on_the_generator():
    pipe = make_pipeline()
    first = draw(pipe, image_vectors=vectors(seed=0), generator=seeds(0))
    assert first.shape == (1, 3, 16, 16) and 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, draw(pipe, image_vectors=vectors(seed=0), generator=seeds(0)))
    assert not torch.allclose(first, draw(pipe, image_vectors=vectors(seed=1), generator=seeds(0)), atol=1e-3)
    assert not torch.allclose(first, draw(pipe, image_vectors=vectors(seed=0), generator=seeds(1)), atol=1e-3)


def test_drawing_equals_a_loop_written_by_hand():
    pipe = make_pipeline(scheduler=EulerDiscreteScheduler())
    positive, negative = vectors(seed=0), vectors(seed=1)
    found = pipe(
        image_vectors=positive,
        negative_image_vectors=negative,
        guidance_scale=2.5,
        num_inference_steps=3,
        generator=seeds(7),
        output_type="latent",
    ).images
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            # one batch of two, as the pipeline runs it: alone, other kernels are chosen and Euler's steps magnify that
            both = pipe.unet(torch.cat([scaled] * 2), timestep, torch.cat([negative, positive])).sample
            away, towards = both.chunk(2)
            latents = scheduler.step(away + 2.5 * (towards - away), timestep, latents).prev_sample
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-5)  # Euler starts at about 14.6, so 1e-5 of that


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_batch_row_equals_the_row_alone_with_the_same_generator(scheduler):
    pipe = make_pipeline(scheduler=scheduler())
    batch = draw(pipe, image_vectors=vectors(3), generator=seeds(3, 4, 5))
    for row in range(3):
        alone = draw(pipe, image_vectors=vectors(3)[row : row + 1], generator=seeds(3 + row))
        torch.testing.assert_close(batch[row : row + 1], alone, atol=1e-5, rtol=0)
        single = draw(pipe, image_vectors=vectors(3)[row : row + 1], generator=seeds(3 + row)[0])
        assert torch.equal(alone, single)


def test_images_per_prompt_come_prompt_by_prompt():
    pipe = make_pipeline()
    both = draw(pipe, image_vectors=vectors(2), num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    by_hand = draw(pipe, image_vectors=vectors(2)[[0, 0, 1, 1]], generator=seeds(0, 1, 2, 3))
    assert torch.equal(both, by_hand)


def test_guidance_of_one_equals_no_guidance_and_runs_the_unet_on_single_rows():
    pipe = make_pipeline()
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    single = draw(pipe, image_vectors=vectors(), guidance_scale=1.0, negative_image_vectors=None, generator=seeds(0))
    assert rows == [1, 1]
    double = draw(pipe, image_vectors=vectors(), guidance_scale=1.0 + 1e-6, generator=seeds(0))
    assert rows == [1, 1, 2, 2]
    torch.testing.assert_close(single, double, atol=1e-5, rtol=0)
    assert not torch.allclose(
        single, draw(pipe, image_vectors=vectors(), guidance_scale=7.0, generator=seeds(0)), atol=1e-3
    )


def test_useless_negative_side_is_said_once(caplog):
    diffusers.utils.logging.enable_propagation()
    draw(make_pipeline(), image_vectors=vectors(), guidance_scale=1.0)
    assert "the negative side has no effect: guidance_scale is 1.0" in caplog.text


def test_defaults_of_steps_and_guidance_come_from_the_checkpoint():
    pipe = make_pipeline(default_num_inference_steps=3, default_guidance_scale=5.0)
    with_defaults = draw(pipe, image_vectors=vectors(), generator=seeds(0))
    assert pipe.num_timesteps == 3 and pipe.guidance_scale == 5.0
    named = draw(pipe, image_vectors=vectors(), generator=seeds(0), num_inference_steps=3, guidance_scale=5.0)
    assert torch.equal(with_defaults, named)
    assert make_pipeline().config.default_guidance_scale == 3.0


def test_a_decoder_trained_with_zeros_is_guided_away_from_zeros():
    pipe = make_pipeline(default_negative="zeros")
    rows = vectors(num_rows=2)
    by_default = pipe(image_vectors=rows, guidance_scale=4.0, generator=seeds(0, 1), output_type="pt").images
    named = draw(
        make_pipeline(),
        image_vectors=rows,
        negative_image_vectors=torch.zeros_like(rows[:1]),
        guidance_scale=4.0,
        generator=seeds(0, 1),
    )
    assert torch.equal(by_default, named)
    other = draw(pipe, image_vectors=rows, negative_image_vectors=rows[:1], guidance_scale=4.0, generator=seeds(0, 1))
    assert not torch.equal(by_default, other)  # a given negative goes first


def test_an_unknown_default_negative_is_refused():
    with pytest.raises(ValueError, match="default_negative is 'none'; expected \"empty\""):
        make_pipeline(default_negative="none")


def test_given_latents_replace_the_drawn_noise():
    pipe = make_pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    assert torch.equal(
        draw(pipe, image_vectors=vectors(), latents=noise), draw(pipe, image_vectors=vectors(), generator=seeds(9))
    )


def test_size_other_than_the_trained_one():
    pipe = make_pipeline()
    assert draw(pipe, image_vectors=vectors(), height=24, width=8).shape == (1, 3, 24, 8)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        DDPMScheduler(),
        EulerDiscreteScheduler(),
        EulerAncestralDiscreteScheduler(),
        HeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(),
        LCMScheduler(),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_scheduler_is_swapped_by_assignment(scheduler):
    pipe = make_pipeline()
    pipe.scheduler = scheduler
    steps = []
    images = draw(
        pipe,
        image_vectors=vectors(2),
        generator=seeds(0, 1),
        num_inference_steps=4,
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step) or tensors,
    )
    assert images.isfinite().all() and len(steps) == pipe.num_timesteps == len(scheduler.timesteps)


def test_custom_timesteps_and_sigmas_reach_the_scheduler():
    pipe = make_pipeline(scheduler=EulerDiscreteScheduler())
    draw(pipe, image_vectors=vectors(), timesteps=[900, 500, 100])
    assert pipe.scheduler.timesteps.tolist() == [900, 500, 100]
    draw(pipe, image_vectors=vectors(), sigmas=[10.0, 2.0, 0.0])
    assert pipe.scheduler.sigmas.tolist() == [10.0, 2.0, 0.0]
    with pytest.raises(ValueError, match=r"timesteps and sigmas are both given; pass one"):
        draw(pipe, image_vectors=vectors(), sigmas=[1.0], timesteps=[1])
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"DDIMScheduler takes no custom sigmas. Pass num_inference_steps="):
        draw(pipe, image_vectors=vectors(), sigmas=[1.0])


def test_eta_reaches_ddim_and_is_refused_a_meaning_elsewhere(caplog):
    diffusers.utils.logging.enable_propagation()
    pipe = make_pipeline()
    still, noisy = (draw(pipe, image_vectors=vectors(), generator=seeds(0), eta=eta) for eta in (0.0, 1.0))
    assert not torch.allclose(still, noisy, atol=1e-3)
    pipe.scheduler = EulerDiscreteScheduler()
    draw(pipe, image_vectors=vectors(), eta=1.0)
    assert "eta=1.0 has no effect: EulerDiscreteScheduler does not use it." in caplog.text


def test_output_types_show_the_same_pixels():
    pipe = make_pipeline()
    call = {"image_vectors": vectors(2), "negative_image_vectors": vectors(1, seed=5)}
    outputs = {
        kind: pipe(**call, generator=seeds(0, 1), output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["np"].shape == (2, 16, 16, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in outputs["pil"]] == [(16, 16)] * 2
    assert np.abs(np.asarray(outputs["pil"][1]) / 255 - outputs["np"][1]).max() <= 0.5 / 255 + 1e-6
    decoded = decode_latents(pipe.vae, outputs["latent"]).detach()
    torch.testing.assert_close(outputs["pt"], (decoded / 2 + 0.5).clamp(0, 1))
    assert isinstance(pipe(**call, return_dict=False), tuple)


def test_callback_sees_and_replaces_tensors():
    pipe = make_pipeline()
    seen = []

    def use_zeros(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "image_vectors", "negative_image_vectors"]
    latents = pipe(
        image_vectors=vectors(),
        negative_image_vectors=vectors(),
        output_type="latent",
        callback_on_step_end=use_zeros,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert seen == [(0, 500, sorted(names)), (1, 0, sorted(names))]  # DDIM, two of 1000 steps
    assert torch.equal(latents, torch.zeros(1, 4, 8, 8))


def test_callback_changes_vectors_and_guidance_midway():
    pipe = make_pipeline()
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def stop_guiding(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {"image_vectors": vectors(seed=3)}

    changed = draw(pipe, image_vectors=vectors(), generator=seeds(0), callback_on_step_end=stop_guiding)
    assert rows == [2, 1]
    assert not torch.allclose(changed, draw(pipe, image_vectors=vectors(), generator=seeds(0)), atol=1e-4)


def test_diffusers_callback_object_names_its_own_tensors():
    class Spy(PipelineCallback):
        @property
        def tensor_inputs(self):
            return ["image_vectors"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == ["image_vectors"]
            return {"latents": torch.zeros(1, 4, 8, 8)}

    pipe = make_pipeline()
    spy = Spy()
    call = {"image_vectors": vectors(), "guidance_scale": 1.0, "output_type": "latent"}
    assert pipe(**call, callback_on_step_end=spy).images.abs().max() == 0


def test_interrupt_stops_after_the_step():
    pipe = make_pipeline()
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    assert draw(pipe, image_vectors=vectors(), num_inference_steps=5, callback_on_step_end=stop).isfinite().all()
    assert steps == [0]
    draw(pipe, image_vectors=vectors())
    assert not pipe.interrupt  # the next call starts afresh
