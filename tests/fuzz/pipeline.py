"""Cases for `PiscesPipeline`: pictures alone and in batches, and arguments that make little sense."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from tests.fixtures import make_model, make_processor
from tests.fuzz.outcomes import Case, Wrong
from tests.fuzz.rows import DG, M, expect_close, expect_finite
from tests.hub_folders import make_pipeline


SURFACE = "pipeline"
PROMPTS = ("a red cube", "", "ünï \U0001f600", "two dogs\nand a cat", "x" * 60)
SIDE = 16  # pixels; two for each latent
TOLERANCE = 0.02  # of pixels in [0, 1]


@functools.lru_cache
def pipe_named(head: str):
    pipe = make_pipeline()
    pipe.register_modules(vision_language_model=make_model(gen_head_type=head), processor=make_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cases(seed: int) -> Iterator[Case]:
    random = np.random.default_rng([seed, 3])
    makers = [
        right_batch,
        right_vectors,
        odd_argument,
        odd_argument,
        odd_argument,
        odd_argument,
        odd_argument,
        reconstructed,
        edited,
    ]
    yield makers[random.integers(len(makers))](random)


def _pipe(random: Generator):
    return pipe_named(str(random.choice(["mlp", "flow"])))


def _picture(random: Generator) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (*random.integers(4, 20, 2).tolist(), 3), dtype=np.uint8))


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw(pipe, **options) -> torch.Tensor:
    images = pipe(output_type="pt", num_inference_steps=options.pop("num_inference_steps", 1), **options).images
    expect_finite(images, "pixels")
    if float(images.min()) < 0 or float(images.max()) > 1:
        raise Wrong(f"pixels from {float(images.min())} to {float(images.max())}")
    return images


def _settings(random: Generator) -> dict[str, Any]:
    found: dict[str, Any] = {"guidance_scale": float(random.choice([0.0, 1.0, 3.0]))}
    if random.random() < 0.3:
        found |= {"height": int(random.choice([8, 16, 24])), "width": int(random.choice([8, 16]))}
    if random.random() < 0.2:
        found["eta"] = float(random.choice([0.0, 0.5, 1.0]))
    return found


def right_batch(random: Generator) -> Case:
    """Each picture of a batch of prompts is what its prompt and generator draw alone."""
    pipe = _pipe(random)
    prompts = [str(random.choice(PROMPTS)) for _ in range(random.integers(1, 4))]
    copies = int(random.integers(1, 3))
    seeds = random.integers(0, 99, len(prompts) * copies).tolist()
    settings = _settings(random)

    def check():
        images = _draw(pipe, prompt=prompts, num_images_per_prompt=copies, generator=_generators(seeds), **settings)
        if len(images) != len(prompts) * copies or images.shape[-2:] != (settings.get("height", SIDE), settings.get("width", SIDE)):  # fmt: skip
            raise Wrong(f"pictures of the shape {tuple(images.shape)}")
        index = int(random.integers(len(images)))
        alone = _draw(
            pipe, prompt=prompts[index // copies], generator=_generators(seeds[index : index + 1]), **settings
        )
        expect_close(images[index], alone[0], f"picture {index} of {prompts}", TOLERANCE)

    return Case("prompts", check, must=False)


def right_vectors(random: Generator) -> Case:
    """Vectors from `encode_prompt` draw what the prompt draws; latents given are the noise; types of output agree."""
    pipe = pipe_named("mlp")
    prompts = [str(random.choice(PROMPTS)) for _ in range(random.integers(1, 3))]
    settings = _settings(random) | {"height": SIDE, "width": SIDE}
    settings.pop("eta", None)
    latents = torch.from_numpy(random.standard_normal((len(prompts), 4, SIDE // 2, SIDE // 2), dtype=np.float32))

    def check():
        images = _draw(pipe, prompt=prompts, latents=latents, **settings)
        vectors = pipe.encode_prompt(prompts)
        if vectors.shape != (len(prompts), M, DG):
            raise Wrong(f"vectors of the shape {tuple(vectors.shape)}")
        settings["negative_prompt"] = ""
        expect_close(
            _draw(pipe, image_vectors=vectors, latents=latents.clone(), **settings), images, "from vectors", 1e-4
        )
        arrays = pipe(
            image_vectors=vectors, latents=latents, num_inference_steps=1, output_type="np", **settings
        ).images
        expect_close(torch.from_numpy(arrays).permute(0, 3, 1, 2), images, "as np", 1e-4)
        pictures = pipe(image_vectors=vectors, latents=latents, num_inference_steps=1, **settings).images
        expect_close(torch.from_numpy(np.asarray(pictures[0])).permute(2, 0, 1) / 255, images[0], "as PIL", 3e-3)

    return Case("vectors", check, must=False)


def reconstructed(random: Generator) -> Case:
    pipe = _pipe(random)
    pictures = [_picture(random) for _ in range(random.integers(1, 3))]
    seeds = random.integers(0, 99, len(pictures)).tolist()

    def check():
        options = {"num_inference_steps": 1, "output_type": "pt"}
        images = pipe.reconstruct(pictures, generator=_generators(seeds), **options).images
        alone = pipe.reconstruct(np.asarray(pictures[-1]), generator=_generators(seeds[-1:]), **options).images
        expect_close(images[-1], alone[0], "a picture drawn again", TOLERANCE)

    return Case("reconstruct", check, must=False)


def edited(random: Generator) -> Case:
    pipe = _pipe(random)
    prompts = [str(random.choice(PROMPTS)) for _ in range(random.integers(1, 3))]
    pictures = [_picture(random) for _ in prompts]
    seeds = random.integers(0, 99, len(prompts)).tolist()
    settings: dict[str, Any] = {"guidance_scale": float(random.choice([1.0, 3.0]))}
    if random.random() < 0.4:
        settings |= {"strength": float(random.choice([0.3, 0.7, 1.0])), "num_inference_steps": 4}
    if random.random() < 0.3:
        settings["negative_prompt"] = "blue"

    def check():
        images = _draw(pipe, prompt=prompts, image=pictures, generator=_generators(seeds), **settings)
        alone = _draw(pipe, prompt=prompts[-1], image=pictures[-1], generator=_generators(seeds[-1:]), **settings)
        expect_close(images[-1], alone[0], "an edit", TOLERANCE)

    return Case("edit", check, must=False)


GOOD: dict[str, Any] = {"prompt": "a red cube", "num_inference_steps": 1, "output_type": "pt"}
VALUES: tuple[Any, ...] = (-1, 0, 1, 3, 10**30, 0.5, -0.5, 1e30, 1e300, float("nan"), float("inf"), True, False, "x", "", b"x", [], [1], ["x"], ["x", 3], [[1]],
          (), (1, 2), {}, {"a": 1}, object(), torch.tensor(1), torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), np.float32(0.5), np.int64(2), np.str_("dog"),
          np.array(["a", "b"]), lambda *a: None, "\ud800", "<|image|>", "<|eot_id|>", ["a", None], torch.Generator(), [torch.Generator()], [torch.Generator(), None],
          iter(["a"]), {"x"}, complex(1, 1), range(3), "pil", "np", "latent", None)  # fmt: skip
ARGUMENTS = (
    "prompt negative_prompt image_vectors negative_image_vectors num_images_per_prompt height width num_inference_steps guidance_scale generator latents timesteps sigmas eta "
    "original_size crops_coords_top_left target_size output_type return_dict callback_on_step_end callback_on_step_end_tensor_inputs vector_kwargs image strength"
).split()  # fmt: skip
VECTOR_OPTIONS = (
    "input_ids attention_mask pixel_values inputs inputs_embeds streamer return_dict_in_generate generation_config max_new_tokens image_temperature num_flow_steps guidance_scale "
    "negative_prompt_ids negative_prompt_attention_mask use_cache cache_implementation generation_mode generator past_key_values cache temperature num_beams labels unknown "
    "output_scores custom_generate logits_processor num_return_sequences do_sample"
).split()  # fmt: skip


def _tensors(random: Generator, shape: tuple[int, ...]) -> Any:
    value = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
    odd = value.clone()
    odd.view(-1)[random.integers(odd.numel())] = [float("nan"), float("inf"), 1e38][random.integers(3)]
    forms = [value.numpy(), value.tolist(), value.double(), value.half(), value.bfloat16(), value.long(), value[0], value[None], value[..., :-1], value[:, :-1], torch.cat([value, value]), value[:0],
             odd, value * 1e38, value * 1e20, value.to("meta"), value.to_sparse(), value.to(torch.complex64), value.to(torch.float8_e4m3fn), value.transpose(1, 2), value.requires_grad_()]  # fmt: skip
    return forms[random.integers(len(forms))]


def odd_argument(random: Generator) -> Case:
    """A call with one argument exchanged: what comes out is a picture, or it is refused."""
    pipe = _pipe(random)
    options = dict(GOOD)
    key = ARGUMENTS[random.integers(len(ARGUMENTS))]
    value = VALUES[random.integers(len(VALUES))]
    if key in ("image_vectors", "negative_image_vectors") and random.random() < 0.8:
        value = _tensors(random, (1, M, DG))
    if key == "latents" and random.random() < 0.8:
        value = _tensors(random, (1, 4, SIDE // 2, SIDE // 2))
    if key == "vector_kwargs" and random.random() < 0.8:
        value = {VECTOR_OPTIONS[random.integers(len(VECTOR_OPTIONS))]: VALUES[random.integers(len(VALUES))]}
    if key == "strength":
        options["image"] = _picture(random)
    if key == "image" and random.random() < 0.5:
        value = [[_picture(random)] * 2, [_picture(random), None], [[_picture(random)]], [[[_picture(random)]]], np.zeros((1, 4, 4, 3)), np.full((4, 4, 3), np.nan), torch.ones(2, 3, 8, 8),
                 Image.new("RGB", (1, 1)), Image.new("RGB", (300, 1)), Image.new("I", (3, 3), 70000), b"GIF89a", "/dev/zero", _picture(random).convert("P")][random.integers(13)]  # fmt: skip
    if key == "image_vectors" and value is not None:
        options.pop("prompt")
    if key == "callback_on_step_end" and random.random() < 0.7:
        results = [
            None,
            {},
            3,
            {"latents": 3},
            {"latents": torch.full((1, 4, 8, 8), float("nan"))},
            {"latents": torch.zeros(1)},
            {"other": 1},
            "x",
        ]
        result = results[random.integers(len(results))]
        value = lambda *args: result  # noqa: E731
    if key == "callback_on_step_end_tensor_inputs":
        options["callback_on_step_end"] = lambda pipe, step, timestep, tensors: {}
    is_long = key in ("num_inference_steps", "num_images_per_prompt") and isinstance(value, int) and value > 99
    options[key] = value
    if options.get("output_type") is None:
        options.pop("output_type")

    def check():
        if is_long:
            return  # means what it says: for ever
        found = pipe(**options)
        images = found[0] if isinstance(found, tuple) else found.images
        _expect_pictures(images, f"{key}={value!r:.60}")
        after = _draw(pipe, prompt="a red cube", generator=_generators([1]))  # the call left nothing behind
        expect_close(after, _usual(pipe), f"the call after {key}={value!r:.60}", 1e-4)

    return Case(f"argument {key}", check)


@functools.lru_cache
def _usual(pipe) -> torch.Tensor:
    return _draw(pipe, prompt="a red cube", generator=_generators([1]))


def _expect_pictures(images: Any, what: str) -> None:
    for image in images:
        values = torch.from_numpy(np.asarray(image).copy()) if not isinstance(image, torch.Tensor) else image
        expect_finite(values.float(), what)
    if len(images) == 0:
        raise Wrong(f"{what}: no picture")
