"""`PiscesPipeline`: prompts, pictures or ready vectors in, pictures out, with the manners of a diffusers pipeline.

Users and the console command load it from a checkpoint folder; `DiffusionPipeline.from_pretrained` runs this file as
remote code in processes without the package, and then copies the siblings that this file imports, but not what those
import. What to draw is decided by the language model's own `generate`; the arithmetic of the decoder is left to
`decoder_pisces.py`, refusing bad input to `pipeline_checks_pisces.py`.

One folder holds the decoder and, at its root, the language model. It is loaded through the Auto classes of
transformers, because the classes of the package may be remote code themselves.

Several threads may draw with one pipeline, so each call works on a scheduler of its own and on values of its own.
Callbacks keep diffusers' habits all the same: inside a call `pipe.scheduler`, `pipe._guidance_scale` and
`pipe._interrupt` mean that call, in whichever variable the pipeline is held; between calls they show the latest one.
Letters: B prompts, M generated vectors per image, Dg width of a generated vector.
"""

import copy
import inspect
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from .decoder_pisces import (
    DecoderLoraMixin,
    decode_latents,
    encode_latents,
    noised,
    picture_size,
    predict,
    set_timesteps,
    shortened,
    start_latents,
    step_options,
    vae_scale_factor,
)
from .image_loading_pisces import BOTH, UNDERSTANDING, load_image
from .pipeline_checks_pisces import (
    Generators,
    check_callback,
    check_callback_result,
    check_count,
    check_decoder,
    check_default_negative,
    check_eta,
    check_finite,
    check_generators,
    check_guidance,
    check_latents,
    check_one_given,
    check_output_type,
    check_plan,
    check_rows,
    check_scheduler,
    check_size_pairs,
    check_strength,
    check_vae_config,
    check_vector_options,
    check_vectors,
    picture_rows,
    prediction_kind,
    prompt_list,
)


logger = logging.get_logger(__name__)


# arguments of from_pretrained that mean the same to diffusers and to transformers
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")

PARTS = ("unet", "scheduler", "vae", "vision_language_model", "processor")
# of a pipeline whose checkpoint names none; steps and guidance are those of Emu2's decoder, arXiv 2312.13286
DEFAULTS = {"default_num_inference_steps": 50, "default_guidance_scale": 3.0, "default_negative": "empty"}


def has_language_model(source: str | os.PathLike, **hub_options: Any) -> bool:
    """Whether a folder or Hub repository has a Pisces model at its root, in the transformers layout."""
    if os.path.isdir(source):
        path = os.path.join(source, "config.json")
        if not os.path.isfile(path):
            return False
    else:
        try:
            path = hf_hub_download(str(source), "config.json", **hub_options)
        except EntryNotFoundError:
            return False
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("model_type") == "pisces"


def language_model_dtype(dtype: Any) -> Any:
    """What diffusers calls a dtype (nothing, one for all, or a dict of components) as one for the language model."""
    if isinstance(dtype, dict):
        dtype = dtype.get("vision_language_model", dtype.get("default"))
    return "auto" if dtype is None else dtype  # "auto": as saved; fp32 would double the memory of an 8B model


def source_of_decoder(source: str | os.PathLike, unet: UNet2DConditionModel) -> dict[str, Any] | None:
    """Where, and at which revision, `DiffusionPipeline.from_pretrained(source)` has just found the decoder.

    It does not tell the pipeline its `revision` and `cache_dir`. The U-Net remembers its folder, and in the cache of
    the Hub that folder lies in `<cache_dir>/<repository>/snapshots/<commit>/`.

    Returns:
        options for `from_pretrained`, or None if the U-Net came from elsewhere.
    """
    if os.path.isdir(source):
        return {}
    folder = Path(unet.config.get("_name_or_path") or "").absolute().parent
    if folder.parent.name != "snapshots":
        return None
    return {"revision": folder.name, "cache_dir": str(folder.parents[2])}


def trained_prediction(source: str | os.PathLike, **hub_options: Any) -> str | None:
    """What the checkpoint's own scheduler says its U-Net was trained to predict; None where nothing says so."""
    try:
        config = DDIMScheduler.load_config(source, subfolder="scheduler", **hub_options)  # reads any scheduler's file
    except (OSError, ValueError):
        return None
    return prediction_kind(str(config.get("_class_name", "")), config)


def checked_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The three defaults of a pipeline, refused where a call could not use them.

    Raises:
        ValueError: naming the default.
    """
    name = "default_num_inference_steps"
    steps = check_count(name, settings[name])
    guidance = check_guidance(settings["default_guidance_scale"], "default_guidance_scale")
    check_default_negative(settings["default_negative"])
    return {**settings, name: steps, "default_guidance_scale": guidance}


def save_remote_code(pipeline_class: type, folder: Path) -> None:
    """Copy the files that define `pipeline_class` into `folder` and name it there as remote code."""
    file = Path(inspect.getfile(pipeline_class))
    for sibling in file.parent.glob("*_pisces.py"):
        shutil.copyfile(sibling, folder / sibling.name)
    index = folder / "model_index.json"
    settings = json.loads(index.read_text(encoding="utf-8"))
    settings["_class_name"] = [file.stem, pipeline_class.__name__]
    index.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_adapters(model: Any, name: str, advice: str) -> None:
    # PEFT's layers rename the weights (base_layer), and a wrapped or adapted transformers model saves the adapter only
    if getattr(model, "peft_config", None):
        adapters = ", ".join(map(str, model.peft_config))
        raise ValueError(
            f"{name} carries the adapter {adapters}, which this format cannot hold. Save it on its own, then {advice}."
        )


# ---- one call -------------------------------------------------------------------------------------------------------

# locks of the process: inside a pipeline they could be neither copied nor pickled
_PLANNING = threading.Lock()
_OFFLOADED = threading.RLock()  # a callback may draw, too


class Call:
    """The values of one call in progress; `outer` is the call that this one was made in, by a callback."""

    def __init__(self, pipeline: Any, values: dict[str, Any], outer: "Call | None"):
        self.pipeline, self.values, self.outer = pipeline, values, outer


# a context variable, not a thread's: helpers started with the context of a call (asyncio.to_thread) belong to the call
_CURRENT: ContextVar[Call | None] = ContextVar("pisces_pipeline_call", default=None)


def call_values(pipeline: Any) -> dict[str, Any] | None:
    """The values of the innermost call of this pipeline that is running here, or None between calls."""
    call = _CURRENT.get()
    while call is not None and call.pipeline is not pipeline:
        call = call.outer
    return None if call is None else call.values


class CallValue:
    """An attribute that, while a call runs, is the call's own; otherwise the pipeline's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        if pipeline is None:
            return self
        values = call_values(pipeline)
        try:
            return pipeline.__dict__[self.name] if values is None else values[self.name]
        except KeyError:
            raise AttributeError(f"{type(pipeline).__name__} has no {self.name} yet.") from None

    def __set__(self, pipeline: Any, value: Any) -> None:
        values = call_values(pipeline)
        (pipeline.__dict__ if values is None else values)[self.name] = value


class CallScheduler(CallValue):
    """Swapping the scheduler is for the next calls; the running one has planned its steps already."""

    def __set__(self, pipeline: Any, value: Any) -> None:
        pipeline.__dict__[self.name] = value


class CallInterrupt(CallValue):
    """True stops this call after the step it is at; set from outside any call, it stops all that are running."""

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        values = None if pipeline is None else call_values(pipeline)
        if values is None:
            return super().__get__(pipeline, owner)
        return values[self.name] or values["num_interrupts"] != pipeline.__dict__.get("_num_interrupts", 0)

    def __set__(self, pipeline: Any, value: Any) -> None:
        super().__set__(pipeline, value)
        if value and call_values(pipeline) is None:
            pipeline.__dict__["_num_interrupts"] = pipeline.__dict__.get("_num_interrupts", 0) + 1


# ---- drawing --------------------------------------------------------------------------------------------------------


@dataclass
class PromptsToDraw:
    """B prompts, to be drawn once the call is checked.

    Args:
        texts: B prompts; of an edit the instructions.
        pictures: the pictures that each prompt shows, opened, or None.
        negative: 1 or B texts that guidance of an edit's vectors leads away from, with the same pictures.
        shown_as: how the pictures enter, as in rows of data: "understanding" or "both".
    """

    texts: list[str]
    pictures: list[list[Image.Image]] | None = None
    negative: list[str] | None = None
    shown_as: str = UNDERSTANDING

    def __len__(self) -> int:
        return len(self.texts)


class PicturesToEncode:
    """Vectors that `reconstruct` asks for: their shape is known, but the model runs only once the call is checked."""

    def __init__(self, model: Any, pixels: Tensor):
        self.model, self.pixels = model, pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def encode(self) -> Tensor:
        _run_offload_hook(self.model)
        advice = "Use other pictures, or load the language model with torch_dtype=torch.float32."
        return check_finite("the vectors of the generation tower", self.model.encode_gen_images(self.pixels), advice)

    def of_nothing(self) -> "PicturesToEncode":
        """An all-zero normalised picture: what guidance leads away from."""
        return PicturesToEncode(self.model, torch.zeros_like(self.pixels[:1]))


class PiscesPipeline(DecoderLoraMixin, DiffusionPipeline):
    """Draws pictures with a Pisces checkpoint: language model -> image vectors -> diffusion decoder.

    Args:
        unet: the decoder; its cross attention reads the vectors (width Dg). SDXL U-Nets get the mean of the vectors
            in place of the pooled text embedding.
        scheduler: any diffusers scheduler that fits the U-Net's training; swap it by assignment.
        vae: turns latents into pixels; None for a decoder that works on pixels.
        vision_language_model: `PiscesForConditionalGeneration`; None to draw from `image_vectors` only.
        processor: its `PiscesProcessor`.
        default_num_inference_steps: steps of a call that names none. None here and in the next two: what this U-Net
            came with from its checkpoint or another pipeline, else 50: Emu2's decoder, arXiv 2312.13286.
        default_guidance_scale: guidance of a call that names none; else 3.0: Emu2's decoder.
        default_negative: what guidance leads away from when a call does not say: "empty", the drawing of the empty
            prompt (arXiv 2312.13286), or "zeros", for a decoder that was trained with all-zero vectors now and then.
        load_language_model: read only while `DiffusionPipeline.from_pretrained` builds the pipeline: whether to attach
            the language model that lies in the same folder.

    What diffusers calls `prompt_embeds` and `negative_prompt_embeds` are `image_vectors` and `negative_image_vectors`
    here: `encode_prompt` returns them, and a call takes them in place of a prompt. With `image` a prompt is an
    instruction: what shall be different in that picture. Several threads may draw with one pipeline. LoRA adapters of
    the U-Net are loaded with `load_lora_weights`.

    Example:
        >>> pipe = PiscesPipeline.from_pretrained("./pisces-tiny")
        >>> pipe(["a red cube", "two dogs"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)]).images
        >>> pipe("make the circle red", image="photo.png").images
    """

    model_cpu_offload_seq = "vision_language_model->unet->vae"
    _optional_components = ["vae", "vision_language_model", "processor"]
    _callback_tensor_inputs = ["latents", "image_vectors", "negative_image_vectors"]
    # in a call, the call's own
    scheduler = CallScheduler()
    _guidance_scale = CallValue()
    _num_timesteps = CallValue()
    _interrupt = CallInterrupt()

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        vision_language_model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        default_num_inference_steps: int | None = None,
        default_guidance_scale: float | None = None,
        default_negative: str | None = None,
        load_language_model: bool = True,
    ):
        super().__init__()
        given = {
            "default_num_inference_steps": default_num_inference_steps,
            "default_guidance_scale": default_guidance_scale,
            "default_negative": default_negative,
        }
        defaults = self._resolved_defaults(unet, **given)
        self._attach_when_named = load_language_model
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            vision_language_model=vision_language_model,
            processor=processor,
        )
        self.register_to_config(**defaults)
        if any(value is not None for value in given.values()):
            self._note_defaults()
        self.image_processor = VaeImageProcessor()
        self._interrupt = False
        self._guidance_scale = defaults["default_guidance_scale"]
        self._num_timesteps = 0

    # ---- drawing -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image_vectors: Tensor | None = None,
        negative_image_vectors: Tensor | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        vector_kwargs: dict[str, Any] | None = None,
        image: Any = None,
        strength: float | None = None,
        image_as: str = UNDERSTANDING,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for every prompt, or for every given row of vectors.

        Args:
            prompt: B prompts; an empty string is allowed. Either this or `image_vectors`.
            negative_prompt: one for all or one per prompt; None takes the checkpoint's `default_negative`. Of an edit
                it is an instruction beside the same pictures, "empty" is the empty one, and guidance of the vectors
                (`guidance_scale` in `vector_kwargs`) leads away from it too.
            image_vectors: (B, M, Dg), from `encode_prompt`, `model.generate` or `model.encode_gen_images`.
            negative_image_vectors: (1 or B, M, Dg), instead of `negative_prompt`.
            height, width: pixels; None is the size the U-Net was trained on.
            num_inference_steps, guidance_scale: None takes the checkpoint's defaults. Guidance of 1 or less does not
                run the negative branch at all.
            generator: one for everything, or a list with one per picture (prompt by prompt). Each picture draws its
                vectors' noise (if the model's head has any) and then its latents' noise, so with generators of its own
                a picture is the same alone and in a batch.
            latents: (B * num_images_per_prompt, C, h, w) unit noise to start from.
            timesteps, sigmas: custom schedule instead of `num_inference_steps`.
            eta: noise of DDIM, in [0, 1].
            original_size, crops_coords_top_left, target_size: SDXL's conditions, in pixels, (height, width) and
                (top, left); sizes default to the picture's own. No effect on U-Nets without them.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent".
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: `f(pipe, step, timestep, tensors) -> tensors`, after every step. It may replace
                tensors, change `pipe._guidance_scale`, or set `pipe._interrupt = True` to stop early.
            callback_on_step_end_tensor_inputs: which of `latents`, `image_vectors`, `negative_image_vectors` it gets.
            vector_kwargs: passed on to `model.generate`, for example `image_temperature` of a "flow" head.
            image: what the prompts change: for each prompt a picture, or a list of pictures that it shows in this
                order; for a single prompt the picture itself. A picture is a PIL image, path, URL, array or tensor, as
                the processor reads them; an array of four dimensions is a list. The language model sees it, the
                decoder does not.
            strength: in (0, 1]: the decoder starts from the source's latents (one picture per prompt, stretched to
                height x width) and runs the last `strength` of its steps, as diffusers' image-to-image pipelines do; a
                small one keeps more of the pixels. Needs a VAE. None starts from noise; `latents` is the noise then,
                and here what is put on the source.
            image_as: "understanding", or "both" for a checkpoint that was trained on rows that say so: the pictures'
                generation vectors stand beside them.

        Returns:
            an output whose `images` holds B * num_images_per_prompt pictures, prompt by prompt.

        Raises:
            ValueError: before any model runs, with the value, the expectation and the next step.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = check_count("num_inference_steps", steps)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        guidance, eta = self._guidance_of(guidance_scale), check_eta(eta)
        check_output_type(output_type)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        vector_kwargs = check_vector_options(vector_kwargs)
        positive = self._check_positive(prompt, image_vectors, image, negative_prompt, image_as)
        pictures = positive.pictures if isinstance(positive, PromptsToDraw) else None
        strength = check_strength(strength, pictures, self.vae, self.scheduler)
        negative = self._check_negative(
            negative_prompt, negative_image_vectors, positive, guidance, self._guides_vectors(vector_kwargs)
        )
        height, width = picture_size(self.unet, self.vae, height, width)
        sizes = (original_size, crops_coords_top_left, target_size)
        time_ids = self._time_ids(*((height, width) if size is None else size for size in sizes))
        num_samples, device = len(positive) * num_images_per_prompt, self._execution_device
        generator = check_generators(generator, num_samples, device)
        factor = vae_scale_factor(self.vae)
        shape = (num_samples, self.unet.config.in_channels, height // factor, width // factor)
        check_latents(latents, shape)
        scheduler, (schedule, steps) = self._plan(steps, device, timesteps, sigmas)
        if strength is not None:
            schedule, steps = shortened(scheduler, schedule, steps, strength)

        with self._one_call(scheduler, guidance, len(schedule)):
            # first all vectors, then all latents: the order in which a picture's generator is used
            vectors = self._vectors(positive, num_images_per_prompt, generator, vector_kwargs).to(device)
            if guidance > 1:
                negative = self._negative_vectors(negative, vectors, vector_kwargs).to(device)

            if strength is None or pictures is None:
                latents = start_latents(scheduler, shape, generator, device, latents)
            else:
                source = self._source_latents(pictures or [], height, width, num_images_per_prompt)
                noise = start_latents(None, shape, generator, device, latents)  # of variance 1, in every scheduler
                latents = noised(scheduler, source, noise, schedule[0])
            tensors = {"latents": latents, "image_vectors": vectors, "negative_image_vectors": negative}
            options = step_options(scheduler, eta, generator)
            names = callback_on_step_end_tensor_inputs
            images = self._denoise(tensors, schedule, steps, options, time_ids, callback_on_step_end, names)
            images = check_finite("the denoised latents", images, self._advice(guidance))
            if output_type != "latent":
                images = check_finite("the decoded pixels", decode_latents(self.vae, images), self._advice(guidance))
                images = self.image_processor.postprocess(images, output_type=output_type)
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def reconstruct(
        self, image: Any, negative_image_vectors: Tensor | None = None, **kwargs
    ) -> ImagePipelineOutput | tuple:
        """Encode pictures with the generation tower and draw them again: what the decoder can show of the vectors.

        Args:
            image: a picture or a list of them: PIL image, path, URL, array or tensor, as the processor reads them;
                floats in [0, 1], as this pipeline returns them. An array of four dimensions is a list.
            negative_image_vectors: what guidance leads away from; None takes the checkpoint's `default_negative`,
                where "empty" means the encoding of an all-zero normalised picture (arXiv 2312.13286).
            kwargs: everything else that drawing takes, but no prompts.

        Returns:
            as drawing does: `num_images_per_prompt` pictures for every given one.
        """
        if wrong := {"prompt", "negative_prompt", "image_vectors", "strength", "image_as"} & set(kwargs):
            raise ValueError(f"reconstruct takes no {', '.join(sorted(wrong))}: the pictures say what to draw.")
        model, processor = self._require_language_model("reconstruct pictures")
        check_decoder(self.unet, self.vae, model.config.gen_vector_size, "vision_language_model")
        pixels = processor(gen_images=image, return_tensors="pt")["gen_pixel_values"].to(self._execution_device)
        vectors: Any = PicturesToEncode(model, pixels)
        return self(image_vectors=vectors, negative_image_vectors=negative_image_vectors, **kwargs)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        image_as: str = UNDERSTANDING,
        **vector_kwargs,
    ) -> Tensor:
        """Let the language model write the vectors of every prompt; hand them back as `image_vectors` to draw.

        Args:
            prompt: B prompts.
            image: pictures that the prompts change, as a call takes them.
            negative_prompt: one for all or one per prompt; what guidance of the vectors leads away from, beside the
                same pictures. None is the empty instruction with pictures, and the model's own empty prompt without.
            image_as: how the pictures are shown, as a call takes it.
            num_images_per_prompt: drawings per prompt. Only a head of type "flow" makes them differ.
            generator: one, or a list with one per drawing; used only by a head of type "flow".
            vector_kwargs: passed on to `model.generate`.

        Returns:
            (B * num_images_per_prompt, M, Dg), prompt by prompt, in the model's dtype.
        """
        prompts = self._prompts_to_draw(prompt, image, negative_prompt, image_as)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        generator = check_generators(generator, len(prompts) * num_images_per_prompt, self._execution_device)
        return self._encode(prompts, num_images_per_prompt, generator, check_vector_options(vector_kwargs))

    def _encode(
        self, prompts: PromptsToDraw, num_images_per_prompt: int, generator: Generators, vector_kwargs: dict[str, Any]
    ) -> Tensor:
        model, _ = self._require_language_model("draw from a prompt")
        is_random = model.model.gen_head.is_stochastic  # the others return the same vectors every time
        texts, pictures = prompts.texts, prompts.pictures
        negative = None if prompts.negative is None else _one_per_row(prompts.negative, len(texts))
        if is_random:
            rows = (texts, pictures, negative)
            texts, pictures, negative = (_repeated(values, num_images_per_prompt) for values in rows)
            if generator is not None:
                vector_kwargs = {**vector_kwargs, "generator": generator}
        device, dtype = self._execution_device, model.dtype
        inputs = self._prompt_inputs(texts, pictures, prompts.shown_as).to(device, dtype=dtype)
        if negative is not None and "negative_prompt_ids" not in vector_kwargs and self._guides_vectors(vector_kwargs):
            away = self._prompt_inputs(negative, pictures, prompts.shown_as).to(device)
            vector_kwargs = {
                **vector_kwargs,
                "negative_prompt_ids": away["input_ids"],
                "negative_prompt_attention_mask": away["attention_mask"],
            }
        _run_offload_hook(model)
        vectors = model.generate(**inputs, generation_mode="image", **vector_kwargs)
        advice = "Lower image_temperature, or load the language model with torch_dtype=torch.float32."
        check_finite("the vectors of the language model", vectors, advice)
        return vectors if is_random else vectors.repeat_interleave(num_images_per_prompt, dim=0)

    def _prompts_to_draw(
        self, prompt: Any, image: Any, negative_prompt: Any = None, image_as: str = UNDERSTANDING
    ) -> PromptsToDraw:
        """Prompts and their opened pictures; a wrong pairing and a broken file are refused here."""
        if image_as not in (UNDERSTANDING, BOTH) or (image is None and image_as != UNDERSTANDING):
            found = "without image" if image is None else f'expected "{UNDERSTANDING}" or "{BOTH}"'
            raise ValueError(f"image_as={image_as!r}: {found}. It says how the pictures of image= are shown.")
        texts = prompt_list("prompt", prompt)
        rows = None if image is None else picture_rows(image, len(texts))
        pictures = None if rows is None else [[load_image(picture) for picture in row] for row in rows]
        negative = None
        if negative_prompt is not None or pictures is not None:
            negative = prompt_list("negative_prompt", "" if negative_prompt is None else negative_prompt)
            check_rows("negative_prompt", len(negative), len(texts))
        return PromptsToDraw(texts, pictures, negative, image_as)

    def _guides_vectors(self, vector_kwargs: dict[str, Any]) -> bool:
        """Whether `generate` will guide the vectors: as the call says, else as the checkpoint's own settings do."""
        own = getattr(self.vision_language_model, "generation_config", None)
        places = (vector_kwargs.get("generation_config"), own)
        given = [vector_kwargs.get("guidance_scale"), *(getattr(place, "guidance_scale", None) for place in places)]
        return next((scale for scale in given if scale is not None), 1) != 1

    def _prompt_inputs(
        self, prompts: list[str], pictures: list[list[Image.Image]] | None = None, shown_as: str = UNDERSTANDING
    ):
        """One user turn per prompt, ended so that the next thing the model does is draw; padded on the left.

        Pictures come first, as in the rows that training uses.
        """
        shown = [[] for _ in prompts] if pictures is None else pictures
        contents = [
            [
                *({"type": "image", "image": picture, "as": shown_as} for picture in row),
                {"type": "text", "text": prompt},
            ]
            for prompt, row in zip(prompts, shown, strict=True)
        ]
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            generation_mode="image",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding_side="left",
        )

    def _vectors(
        self, positive: Any, num_images_per_prompt: int, generator: Generators, vector_kwargs: dict
    ) -> Tensor:
        """Prompts, pictures or given vectors as (B * num_images_per_prompt, M, Dg)."""
        if isinstance(positive, PromptsToDraw):
            return self._encode(positive, num_images_per_prompt, generator, vector_kwargs)
        if isinstance(positive, PicturesToEncode):
            positive = positive.encode()
        return positive.repeat_interleave(num_images_per_prompt, dim=0)

    def _negative_vectors(self, negative: Any, vectors: Tensor, vector_kwargs: dict) -> Tensor:
        """Negative prompts, a picture, given vectors or zeros, one row for each of `vectors`."""
        if negative is None:
            return torch.zeros_like(vectors)
        if isinstance(negative, PromptsToDraw):
            if self.vision_language_model.model.gen_head.is_stochastic:
                # without noise: the counterpart of what a regression head answers, and free of any picture's generator
                vector_kwargs = {**vector_kwargs, "image_temperature": 0.0}
            if negative.pictures is not None:  # guided away from itself it would stay what it is
                own = ("negative_prompt_ids", "negative_prompt_attention_mask")
                vector_kwargs = {name: value for name, value in vector_kwargs.items() if name not in own}
                vector_kwargs["guidance_scale"] = 1.0
            encoded = self._encode(negative, 1, None, vector_kwargs)
        else:
            encoded = negative.encode() if isinstance(negative, PicturesToEncode) else negative
        if encoded.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"negative_image_vectors have {encoded.shape[1]} vectors per picture and image_vectors "
                f"{vectors.shape[1]}; expected the same number."
            )
        return encoded.repeat_interleave(len(vectors) // len(encoded), dim=0)

    def _source_latents(
        self, pictures: list[list[Image.Image]], height: int, width: int, num_images_per_prompt: int
    ) -> Tensor:
        """The latents of each prompt's one picture, (B * num_images_per_prompt, C, h, w) in fp32."""
        resized = [row[0].resize((width, height), Image.Resampling.LANCZOS) for row in pictures]
        pixels = self.image_processor.numpy_to_pt(self.image_processor.pil_to_numpy(resized))
        latents = encode_latents(self.vae, self.image_processor.normalize(pixels).to(self._execution_device))
        advice = "Use another picture, leave strength out, or load the decoder with torch_dtype=torch.float32."
        return check_finite("the latents of the source", latents, advice).repeat_interleave(num_images_per_prompt, 0)

    def _denoise(
        self,
        tensors: dict[str, Any],
        timesteps: Tensor,
        num_steps: int,
        options: dict[str, Any],
        time_ids: Tensor | None,
        callback: Callable | None,
        callback_names: Sequence[str],
    ) -> Tensor:
        """The loop over timesteps; `tensors` are what the callback may see and replace."""
        scheduler = self.scheduler
        # flow-matching schedulers have no scale_model_input
        scale = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
        num_warmup_steps = max(len(timesteps) - num_steps * scheduler.order, 0)
        with self.progress_bar(total=num_steps) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                output = predict(
                    self.unet,
                    scale(tensors["latents"], timestep),
                    timestep,
                    tensors["image_vectors"],
                    tensors["negative_image_vectors"] if self.do_classifier_free_guidance else None,
                    self.guidance_scale,
                    time_ids,
                )
                tensors["latents"] = scheduler.step(
                    output, timestep, tensors["latents"], **options, return_dict=False
                )[0]
                if callback is not None:
                    seen = {name: tensors[name] for name in callback_names}
                    tensors.update(check_callback_result(callback(self, step, timestep, seen), tensors))
                is_full_step = step + 1 > num_warmup_steps and (step + 1) % scheduler.order == 0
                if is_full_step or step == len(timesteps) - 1:
                    progress_bar.update()
        return tensors["latents"]

    # ---- checking ----------------------------------------------------------------------------------------------

    def _guidance_of(self, guidance_scale: float | None) -> float:
        return check_guidance(self.config.default_guidance_scale if guidance_scale is None else guidance_scale)

    def _plan(self, steps: int, device: torch.device, timesteps: Any, sigmas: Any) -> tuple[Any, tuple[Tensor, int]]:
        """A scheduler of this call's own that fits the U-Net, and its timesteps and number of steps."""
        check_scheduler(self.scheduler, getattr(self.unet, "_trained_prediction", None))
        if self.vae is not None:
            check_vae_config(self.vae.config, "vae")
        planned = self._planned_scheduler(lambda own: set_timesteps(own, steps, device, timesteps, sigmas))
        check_plan(planned[0])
        return planned

    def _advice(self, guidance_scale: float) -> str:
        given = f"Lower guidance_scale ({guidance_scale:g}), use smaller image_vectors, latents or sigmas"
        is_half = self.unet.dtype in (torch.float16, torch.bfloat16)
        other = "load the decoder with torch_dtype=torch.float32" if is_half else "another scheduler"
        return f"{given}, or {other}."

    def _check_positive(self, prompt: Any, image_vectors: Any, image: Any, negative_prompt: Any, image_as: str) -> Any:
        """What to draw: prompts, vectors, or pictures to encode; either way it fits the decoder."""
        if image is not None and prompt is None:
            found = "image_vectors, which say already what to draw" if image_vectors is not None else "no prompt"
            raise ValueError(
                f"image came with {found}; expected a prompt that says what to change in it. Pass prompt= (an empty "
                "one draws without an instruction), or reconstruct(image) to draw the picture again."
            )
        check_one_given("prompt", "image_vectors", (prompt, image_vectors))
        if isinstance(image_vectors, PicturesToEncode):
            return image_vectors
        if image_vectors is not None:
            self._check_vectors("image_vectors", image_vectors)
            return image_vectors
        # of a prompt alone the vectors' guidance leads away from what the model takes for empty
        prompts = self._prompts_to_draw(prompt, image, None if image is None else negative_prompt, image_as)
        model, _ = self._require_language_model("draw from a prompt")
        check_decoder(self.unet, self.vae, model.config.gen_vector_size, "vision_language_model")
        return prompts

    def _check_negative(
        self,
        prompt: str | list[str] | None,
        vectors: Tensor | None,
        positive: Any,
        guidance_scale: float,
        guides_vectors: bool,
    ) -> Any:
        """What guidance leads away from: prompts or a picture to encode, vectors, or None for zeros or no guidance."""
        check_one_given("negative_prompt", "negative_image_vectors", (prompt, vectors), needs_one=False)
        pictures = positive.pictures if isinstance(positive, PromptsToDraw) else None
        if guidance_scale <= 1:
            has_effect = pictures is not None and guides_vectors and prompt is not None
            if not has_effect and (prompt is not None or vectors is not None):
                logger.warning(f"the negative side has no effect: guidance_scale is {guidance_scale}, not above 1.")
            return None
        if vectors is not None:
            self._check_vectors("negative_image_vectors", vectors)
            check_rows("negative_image_vectors", len(vectors), len(positive))
            return vectors
        if prompt is None and self.config.default_negative == "zeros":
            return None
        if isinstance(positive, PicturesToEncode):
            return positive.of_nothing()
        prompts = prompt_list("negative_prompt", "" if prompt is None else prompt)
        check_rows("negative_prompt", len(prompts), len(positive))
        self._require_language_model("encode the negative prompt (or pass negative_image_vectors=)")
        # beside pictures there is one for each prompt, because no two show the same
        if pictures is None:
            return PromptsToDraw(prompts)
        return PromptsToDraw(_one_per_row(prompts, len(positive)), pictures, shown_as=positive.shown_as)

    def _check_vectors(self, name: str, vectors: Tensor) -> None:
        check_vectors(name, vectors)
        check_decoder(self.unet, self.vae, vectors.shape[-1], name)
        model = self.vision_language_model
        if model is not None and vectors.shape[1] != model.config.num_gen_image_tokens:
            raise ValueError(
                f"{name} has {vectors.shape[1]} vectors per picture but this model draws with "
                f"{model.config.num_gen_image_tokens}. Encode them with this model."
            )

    def _time_ids(self, original_size: tuple, crops_coords_top_left: tuple, target_size: tuple) -> Tensor | None:
        """SDXL's six numbers, or None for a U-Net that has no place for them."""
        check_size_pairs(
            original_size=original_size, crops_coords_top_left=crops_coords_top_left, target_size=target_size
        )
        if self.unet.config.addition_embed_type != "text_time":
            return None
        numbers = [int(value) for value in (*original_size, *crops_coords_top_left, *target_size)]
        return torch.tensor(numbers, device=self._execution_device)

    def _require_language_model(self, purpose: str) -> tuple[Any, Any]:
        if self.vision_language_model is None or self.processor is None:
            missing = "language model" if self.vision_language_model is None else "processor"
            raise ValueError(
                f"this pipeline has no {missing}, which it needs to {purpose}. Pass ready vectors as image_vectors=, "
                "or attach one: pipe.load_language_model(folder), or pass vision_language_model= and processor="
            )
        return self.vision_language_model, self.processor

    # ---- the call in progress -----------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _planned_scheduler(self, plan: Callable[[Any], Any]) -> tuple[Any, Any]:
        """A copy of the scheduler with its steps planned, and what `plan(scheduler)` returned.

        The pipeline's own scheduler is planned as well, for those who read its timesteps afterwards; it never steps.
        """
        with _PLANNING:
            scheduler = self.__dict__["scheduler"]  # not that of a call around this one
            planned = plan(scheduler)
            return copy.deepcopy(scheduler), planned

    @contextmanager
    def _one_call(self, scheduler: Any, guidance_scale: float, num_timesteps: int) -> Iterator[None]:
        """Everything inside is one call with values of its own; its last ones stay visible afterwards."""
        shown = {"_guidance_scale": guidance_scale, "_num_timesteps": num_timesteps, "_interrupt": False}
        num_interrupts = self.__dict__.get("_num_interrupts", 0)
        values = {**shown, "scheduler": scheduler, "num_interrupts": num_interrupts}
        # offloading moves whole models between devices, so such a pipeline serves one call after the other
        with _OFFLOADED if getattr(self, "_all_hooks", None) else nullcontext():
            token = _CURRENT.set(Call(self, values, _CURRENT.get()))
            try:
                yield
            finally:
                _CURRENT.reset(token)
                self.__dict__.update({name: values[name] for name in shown})

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, load_language_model: bool = True, **kwargs
    ) -> Any:
        """Load the decoder and, from the same folder or Hub repository, the language model and its processor.

        Args:
            pretrained_model_name_or_path: a checkpoint folder, or a Hub id.
            load_language_model: False loads the decoder only, to draw from `image_vectors`.
            kwargs: as for every diffusers pipeline. `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download`, `trust_remote_code`, `device_map` and the dtype also apply to the language model;
                without a dtype it keeps the one it was saved in. `vision_language_model=` and `processor=` replace
                the folder's own, and None there attaches none.
        """
        source = pretrained_model_name_or_path
        pipe = super().from_pretrained(source, load_language_model=False, **kwargs)
        parts = {"vision_language_model", "processor"} - set(kwargs)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if "unet" not in kwargs:
            pipe.unet._trained_prediction = trained_prediction(source, **hub_options)
        if load_language_model and parts and has_language_model(source, **hub_options):
            device_map = kwargs.get("device_map")
            pipe.load_language_model(
                source,
                dtype=language_model_dtype(kwargs.get("dtype", kwargs.get("torch_dtype"))),
                device_map="auto" if device_map == "balanced" else device_map,  # the same idea, in transformers' word
                trust_remote_code=kwargs.get("trust_remote_code", False),
                parts=parts,
                **hub_options,
            )
        return pipe

    def load_language_model(
        self,
        source: str | os.PathLike | None = None,
        dtype: Any = "auto",
        device_map: Any = None,
        trust_remote_code: bool = False,
        parts: set[str] | tuple[str, ...] = ("vision_language_model", "processor"),
        **hub_options,
    ) -> None:
        """Attach the language model and processor of a checkpoint; before `.to()` or offloading, which place both.

        Args:
            source: a checkpoint folder or Hub id; None is where the decoder came from.
            dtype: "auto" keeps the dtype of the checkpoint.
            device_map, trust_remote_code, hub_options: as in transformers.
            parts: which of the two components to replace.

        Raises:
            ValueError: the checkpoint is no Pisces model, or its vectors do not fit this decoder. Before its weights
                are read.
        """
        source = self.name_or_path if source is None else source
        if source is None or not has_language_model(source, **hub_options):
            raise ValueError(
                f"{source}: no Pisces model there (a config.json with model_type 'pisces'). Give the checkpoint "
                "folder or the Hub id of one."
            )
        options = {"trust_remote_code": trust_remote_code, **hub_options}
        if "vision_language_model" in parts:
            config = AutoConfig.from_pretrained(source, **options)
            check_decoder(self.unet, self.vae, config.gen_vector_size, str(source))
            model = AutoModelForMultimodalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **options)
            self.register_modules(vision_language_model=model.eval())
        if "processor" in parts:
            self.register_modules(processor=AutoProcessor.from_pretrained(source, **options))

    def register_to_config(self, **kwargs) -> None:
        """Note settings of the pipeline, as diffusers does; and attach the language model to a pipeline named so late.

        `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` builds this class without calling its
        `from_pretrained`. Its last act is to note where the parts came from, and there the model lies too. Of the
        three defaults None is, as in the constructor, what the U-Net came with.

        Raises:
            ValueError: a default that no call could use.
        """
        if named := {name: kwargs[name] for name in DEFAULTS if name in kwargs}:
            resolved = self._resolved_defaults(self.unet, **named)
            kwargs |= {name: resolved[name] for name in named}
        super().register_to_config(**kwargs)
        source = kwargs.get("_name_or_path")
        if source is None or not hasattr(self, "_attach_when_named") or self.unet is None:
            return
        hub_options = source_of_decoder(source, self.unet)
        is_own = os.path.realpath(self.unet.config.get("_name_or_path") or "") == os.path.realpath(f"{source}/unet")
        if (is_own or hub_options) and not hasattr(
            self.unet, "_trained_prediction"
        ):  # a U-Net given by hand may differ
            self.unet._trained_prediction = trained_prediction(source, **(hub_options or {}))
        if not self._attach_when_named or self.vision_language_model is not None:
            return
        self._attach_when_named = False
        if hub_options is None or not has_language_model(source, **hub_options):
            return
        # fp32 is what diffusers gives those who ask for nothing; the repository's code is running already
        dtype = "auto" if self.unet.dtype == torch.float32 else self.unet.dtype
        self.load_language_model(source, dtype=dtype, trust_remote_code=True, **hub_options)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; `PiscesPipeline(**pipe.components)` shares them, and draws with the same defaults."""
        # Only parts travel this way, and pipelines of different defaults may share one U-Net: whoever hands it out
        # says which defaults go with it.
        self._note_defaults()
        return super().components

    def _note_defaults(self) -> None:
        if self.unet is not None:  # diffusers builds pipelines of the text half alone, to encode prompts with
            self.unet._pipeline_defaults = {name: self.config[name] for name in DEFAULTS}

    def _resolved_defaults(self, unet: Any, **given: Any) -> dict[str, Any]:
        """Each default: as given, else as the U-Net came with, else the usual one."""
        noted = getattr(unet, "_pipeline_defaults", None) or {}
        named = {name: value for name, value in given.items() if value is not None}
        return checked_defaults({**DEFAULTS, **noted, **named})

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs) -> Any:
        """A pipeline that shares the parts of another one; nothing is loaded, copied or cast.

        Args:
            pipeline: any diffusers pipeline that has a U-Net and a scheduler; a VAE, language model and processor
                are taken over where it has them.
            kwargs: parts and defaults to have instead; `dtype` (or `torch_dtype`) casts all parts.

        Raises:
            ValueError: a part is missing.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        parts = {name: getattr(pipeline, name, None) for name in PARTS}
        settings = {name: pipeline.config[name] for name in DEFAULTS if name in pipeline.config}
        options = {**parts, **settings, "load_language_model": False, **kwargs}
        if missing := [name for name in ("unet", "scheduler") if options[name] is None]:
            raise ValueError(
                f"{type(pipeline).__name__} has no {' and no '.join(missing)}, which drawing needs. Pass "
                f"{missing[0]}=, or a pipeline that has one."
            )
        pipe = cls(**options)
        # diffusers keeps what only the other class knows under a private name, for the way back
        others = {name: value for name, value in pipeline.config.items() if name not in options}
        pipe.register_to_config(**{name if name[0] == "_" else f"_{name}": value for name, value in others.items()})
        return pipe if dtype is None else pipe.to(dtype=dtype)

    def save_pretrained(
        self, save_directory: str | os.PathLike, save_language_model: bool = True, **kwargs: Any
    ) -> None:
        """Save everything in the folder that `from_pretrained` reads: decoder, language model and processor.

        U-Net, VAE and scheduler go into folders of their own beside `model_index.json`; language model and processor,
        where the pipeline has them, to the root, as their own `save_pretrained` writes them. Nothing is saved twice.
        A pipeline that came as remote code saves that code too, which diffusers itself leaves out.

        Args:
            save_language_model: False saves the decoder only.
            kwargs: as for every diffusers pipeline, `push_to_hub` too; `max_shard_size` also holds for the language
                model, `variant` is for the decoder only.

        Raises:
            ValueError: an adapter hangs on a part whose file could not be loaded again.
        """
        _refuse_adapters(self.unet, "unet", "unload_lora_weights() (after fuse_lora() to keep its effect)")
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"{folder}: this is a file. Give a folder to save the pipeline in.")
        if save_language_model and self.vision_language_model is not None:
            _refuse_adapters(self.vision_language_model, "vision_language_model", "merge it (merge_and_unload)")
            shards = {"max_shard_size": kwargs["max_shard_size"]} if kwargs.get("max_shard_size") else {}
            self.vision_language_model.save_pretrained(folder, **shards)
        if save_language_model and self.processor is not None:
            self.processor.save_pretrained(folder)
        names = ("unet", "scheduler", "vae")
        parts = {name: self.__dict__[name] for name in names}  # the pipeline's scheduler, not that of a running call
        decoder = type(self)(**parts, **{name: self.config[name] for name in DEFAULTS})
        DiffusionPipeline.save_pretrained(decoder, folder, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `model_index.json`, and the code of a pipeline that came as remote code, before any upload begins."""
        super().save_config(save_directory, **kwargs)
        if type(self).__module__.startswith("diffusers_modules."):
            save_remote_code(type(self), Path(save_directory))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # exported folders name this class as remote code; whoever calls it has the code and need not trust a copy
        settings = super()._dict_from_json_file(json_file)
        if isinstance(settings.get("_class_name"), list):
            settings["_class_name"] = settings["_class_name"][1]
        return settings


def _one_per_row(values: list[str], num_rows: int) -> list[str]:
    return values * num_rows if len(values) == 1 else values


def _repeated(rows: Any, times: int) -> Any:
    return None if rows is None else [row for row in rows for _ in range(times)]


def _run_offload_hook(model: Any) -> None:
    """Bring an offloaded model to its device: accelerate does so at `forward`, but we enter by other methods."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(model)
