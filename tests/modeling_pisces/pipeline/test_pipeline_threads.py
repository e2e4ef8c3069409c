"""Several threads on one pipeline: each call is as it is alone, and callbacks reach their own call."""

import copy
import threading

import pytest
import torch


diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler  # noqa: E402

from modeling_pisces.decoder_pisces import decode_latents  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import (  # noqa: E402
    draw,
    make_full_pipeline,
    make_pipeline,
    make_vae,
    seeds,
    vectors,
)
from tests.modeling_pisces.processor.test_processor_threads import eager_switching, in_threads  # noqa: E402, F401


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_eight_threads_draw_what_each_draws_alone(scheduler, eager_switching):  # noqa: F811
    pipe = make_full_pipeline()
    pipe.scheduler = scheduler()
    pipe.set_progress_bar_config(disable=False, file=open("/dev/null", "w"))
    prompts = ["a", "two dogs", "", "a much longer prompt about a cat", "b", "three", "red", "a blue star"]

    def one(index: int) -> torch.Tensor:
        options = {"num_inference_steps": 2 + index, "guidance_scale": 1.0 + index % 3}
        return draw(pipe, prompts[index], generator=seeds(index), **options)

    alone = [one(index) for index in range(8)]
    for index, drawn in enumerate(in_threads(lambda index: [one(index) for _ in range(3)])):
        assert isinstance(drawn, list), drawn
        for images in drawn:
            torch.testing.assert_close(images, alone[index], atol=1e-4, rtol=0)


def test_callbacks_change_only_their_own_call():
    pipe = make_pipeline()
    seen: dict[int, list] = {}

    def one(index: int) -> torch.Tensor:
        seen[index] = []

        def watch(given, step, timestep, tensors):
            seen[index].append((given.num_timesteps, given.guidance_scale, len(given.scheduler.timesteps)))
            if index % 2:
                pipe._guidance_scale = 1.0  # in whichever variable the pipeline is held
            elif step == 1:
                given._interrupt = True

        options = {"num_inference_steps": 3 + index, "guidance_scale": 2.0 + index}
        return draw(pipe, image_vectors=vectors(seed=index), generator=seeds(0), callback_on_step_end=watch, **options)

    alone = [one(index) for index in range(4)]
    expected = dict(seen)
    together = in_threads(one, 4)
    for index in range(4):
        torch.testing.assert_close(together[index], alone[index], atol=1e-5, rtol=0)
    assert seen == expected
    assert seen[0] == [(3, 2.0, 3), (3, 2.0, 3)]  # interrupted after two of three
    assert seen[1] == [(4, 3.0, 4)] + [(4, 1.0, 4)] * 3


def test_interrupt_from_outside_stops_the_calls_that_run():
    pipe = make_pipeline()
    steps: dict[int, int] = {}
    stepping, stopped = threading.Barrier(3, timeout=30), threading.Event()

    def one(index: int) -> None:
        def count(given, step, timestep, tensors):
            steps[index] = step + 1
            if step == 0:
                stepping.wait()
                stopped.wait(timeout=30)

        draw(pipe, image_vectors=vectors(), num_inference_steps=6, callback_on_step_end=count)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    stepping.wait()
    pipe._interrupt = True
    stopped.set()
    for thread in threads:
        thread.join()
    assert steps == {0: 1, 1: 1}
    counted = []
    draw(pipe, image_vectors=vectors(), callback_on_step_end=lambda *args: counted.append(1))
    assert len(counted) == 2 and not pipe.interrupt  # the next call starts afresh


def test_a_callback_may_draw_with_the_same_pipeline():
    pipe = make_pipeline(scheduler=DPMSolverMultistepScheduler())
    plain = draw(pipe, image_vectors=vectors(), generator=seeds(0), num_inference_steps=4)

    def draw_another(given, step, timestep, tensors):
        draw(pipe, image_vectors=vectors(seed=1), num_inference_steps=2 + step)
        assert given.num_timesteps == 4

    nested = draw(
        pipe, image_vectors=vectors(), generator=seeds(0), num_inference_steps=4, callback_on_step_end=draw_another
    )
    assert torch.equal(plain, nested)


def test_the_scheduler_of_the_pipeline_never_steps_and_swapping_it_waits_for_the_next_call():
    scheduler, other = DPMSolverMultistepScheduler(), DDIMScheduler()
    pipe = make_pipeline(scheduler=scheduler)
    plain = draw(pipe, image_vectors=vectors(), generator=seeds(0))
    assert pipe.scheduler is scheduler and scheduler.step_index is None

    def swap(given, step, timestep, tensors):
        given.scheduler = other
        assert isinstance(given.scheduler, DPMSolverMultistepScheduler)

    assert torch.equal(plain, draw(pipe, image_vectors=vectors(), generator=seeds(0), callback_on_step_end=swap))
    assert pipe.scheduler is other and pipe.config.scheduler[1] == "DDIMScheduler"


def test_a_pipeline_can_be_copied_while_it_draws():
    pipe = make_pipeline()
    copies = []
    draw(pipe, image_vectors=vectors(), callback_on_step_end=lambda *args: copies.append(copy.deepcopy(pipe)))
    assert torch.equal(*(draw(one, image_vectors=vectors(), generator=seeds(0)) for one in (pipe, copies[0])))


def test_threads_share_a_vae_that_is_decoded_in_fp32(eager_switching):  # noqa: F811
    vae = make_vae(force_upcast=True).half()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def decode(index: int) -> list:
        with torch.no_grad():
            return [decode_latents(vae, latents) for _ in range(10)]

    alone = decode(0)[0]
    for images in in_threads(decode):
        assert isinstance(images, list), images
        assert all(image.dtype == torch.float32 and torch.equal(image, alone) for image in images)
    assert vae.dtype == torch.float16


def test_offloaded_pipelines_serve_one_call_after_the_other(eager_switching):  # noqa: F811
    pytest.importorskip("accelerate")
    pipe = make_full_pipeline()
    alone = [draw(pipe, "a", generator=seeds(index), num_inference_steps=2 + index) for index in range(4)]
    pipe.enable_model_cpu_offload(device="cpu")
    found = in_threads(lambda index: draw(pipe, "a", generator=seeds(index), num_inference_steps=2 + index), 4)
    for images, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
