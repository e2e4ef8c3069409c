"""`PiscesPipeline`: prompts, pictures or ready vectors in, pictures out, with the manners of a diffusers pipeline.

Users and the console command load it from a checkpoint folder; `DiffusionPipeline.from_pretrained` runs this file as
remote code in processes without the package, and then copies the siblings that this file imports, but not what those
import. What to draw is decided by the language model's own `generate`; the arithmetic of the decoder is left to
`decoder_pisces.py`, refusing bad input to `pipeline_checks_pisces.py`, folders to `pipeline_loading_pisces.py`.
Letters: B prompts, M generated vectors per image, Dg width of a generated vector.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from .decoder_pisces import (
    decode_latents,
    picture_size,
    predict,
    set_timesteps,
    start_latents,
    step_options,
    vae_scale_factor,
)
from .pipeline_calls_pisces import PipelineCallMixin
from .pipeline_checks_pisces import (
    Generators,
    check_callback,
    check_callback_result,
    check_count,
    check_decoder,
    check_eta,
    check_finite,
    check_generators,
    check_guidance,
    check_latents,
    check_one_given,
    check_output_type,
    check_rows,
    check_size_pairs,
    check_vector_options,
    check_vectors,
    prompt_list,
)
from .pipeline_loading_pisces import PipelineLoadingMixin
from .pipeline_lora_pisces import DecoderLoraMixin
from .scheduler_checks_pisces import check_plan, check_scheduler, check_vae_config


logger = logging.get_logger(__name__)


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


class PiscesPipeline(PipelineLoadingMixin, PipelineCallMixin, DecoderLoraMixin, DiffusionPipeline):
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
    here: `encode_prompt` returns them, and a call takes them in place of a prompt. Several threads may draw with one
    pipeline. LoRA adapters of the U-Net are loaded with `load_lora_weights`.

    Example:
        >>> pipe = PiscesPipeline.from_pretrained("./pisces-tiny")
        >>> pipe(["a red cube", "two dogs"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)]).images
    """

    model_cpu_offload_seq = "vision_language_model->unet->vae"
    _optional_components = ["vae", "vision_language_model", "processor"]
    _callback_tensor_inputs = ["latents", "image_vectors", "negative_image_vectors"]

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
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for every prompt, or for every given row of vectors.

        Args:
            prompt: B prompts; an empty string is allowed. Either this or `image_vectors`.
            negative_prompt: one for all or one per prompt; None takes the checkpoint's `default_negative`.
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
        positive = self._check_positive(prompt, image_vectors)
        negative = self._check_negative(negative_prompt, negative_image_vectors, positive, guidance)
        height, width = picture_size(self.unet, self.vae, height, width)
        sizes = (original_size, crops_coords_top_left, target_size)
        time_ids = self._time_ids(*((height, width) if size is None else size for size in sizes))
        num_samples, device = len(positive) * num_images_per_prompt, self._execution_device
        generator = check_generators(generator, num_samples, device)
        factor = vae_scale_factor(self.vae)
        shape = (num_samples, self.unet.config.in_channels, height // factor, width // factor)
        check_latents(latents, shape)
        scheduler, (schedule, steps) = self._plan(steps, device, timesteps, sigmas)

        with self._one_call(scheduler, guidance, len(schedule)):
            # first all vectors, then all latents: the order in which a picture's generator is used
            vectors = self._vectors(positive, num_images_per_prompt, generator, vector_kwargs).to(device)
            if guidance > 1:
                negative = self._negative_vectors(negative, vectors, vector_kwargs).to(device)

            latents = start_latents(scheduler, shape, generator, device, latents)
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
        if wrong := {"prompt", "negative_prompt", "image_vectors"} & set(kwargs):
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
        **vector_kwargs,
    ) -> Tensor:
        """Let the language model write the vectors of every prompt; hand them back as `image_vectors` to draw.

        Args:
            prompt: B prompts.
            num_images_per_prompt: drawings per prompt. Only a head of type "flow" makes them differ.
            generator: one, or a list with one per drawing; used only by a head of type "flow".
            vector_kwargs: passed on to `model.generate`.

        Returns:
            (B * num_images_per_prompt, M, Dg), prompt by prompt, in the model's dtype.
        """
        prompts = prompt_list("prompt", prompt)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        generator = check_generators(generator, len(prompts) * num_images_per_prompt, self._execution_device)
        vector_kwargs = check_vector_options(vector_kwargs)
        model, _ = self._require_language_model("draw from a prompt")
        is_random = model.config.gen_head_type == "flow"  # the other heads return the same vectors every time
        if is_random:
            prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
            if generator is not None:
                vector_kwargs["generator"] = generator
        inputs = self._prompt_inputs(prompts).to(self._execution_device)
        _run_offload_hook(model)
        vectors = model.generate(**inputs, generation_mode="image", **vector_kwargs)
        advice = "Lower image_temperature, or load the language model with torch_dtype=torch.float32."
        check_finite("the vectors of the language model", vectors, advice)
        return vectors if is_random else vectors.repeat_interleave(num_images_per_prompt, dim=0)

    def _prompt_inputs(self, prompts: list[str]):
        """One user turn per prompt, ended so that the next thing the model does is draw; padded on the left."""
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts],
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
        if isinstance(positive, list):
            return self.encode_prompt(positive, num_images_per_prompt, generator, **vector_kwargs)
        if isinstance(positive, PicturesToEncode):
            positive = positive.encode()
        return positive.repeat_interleave(num_images_per_prompt, dim=0)

    def _negative_vectors(self, negative: Any, vectors: Tensor, vector_kwargs: dict) -> Tensor:
        """Negative prompts, a picture, given vectors or zeros, one row for each of `vectors`."""
        if negative is None:
            return torch.zeros_like(vectors)
        if isinstance(negative, list):
            if self.vision_language_model.config.gen_head_type == "flow":
                # without noise: the counterpart of what a regression head answers, and free of any picture's generator
                vector_kwargs = {**vector_kwargs, "image_temperature": 0.0}
            encoded = self.encode_prompt(negative, **vector_kwargs)
        else:
            encoded = negative.encode() if isinstance(negative, PicturesToEncode) else negative
        if encoded.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"negative_image_vectors have {encoded.shape[1]} vectors per picture and image_vectors "
                f"{vectors.shape[1]}; expected the same number."
            )
        return encoded.repeat_interleave(len(vectors) // len(encoded), dim=0)

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

    def _check_positive(self, prompt: str | list[str] | None, image_vectors: Any) -> Any:
        """What to draw: a list of prompts, vectors, or pictures to encode; either way it fits the decoder."""
        check_one_given("prompt", "image_vectors", (prompt, image_vectors))
        if isinstance(image_vectors, PicturesToEncode):
            return image_vectors
        if image_vectors is not None:
            self._check_vectors("image_vectors", image_vectors)
            return image_vectors
        prompts = prompt_list("prompt", prompt)
        model, _ = self._require_language_model("draw from a prompt")
        check_decoder(self.unet, self.vae, model.config.gen_vector_size, "vision_language_model")
        return prompts

    def _check_negative(
        self, prompt: str | list[str] | None, vectors: Tensor | None, positive: Any, guidance_scale: float
    ) -> Any:
        """What guidance leads away from: prompts or a picture to encode, vectors, or None for zeros or no guidance."""
        check_one_given("negative_prompt", "negative_image_vectors", (prompt, vectors), needs_one=False)
        if guidance_scale <= 1:
            if prompt is not None or vectors is not None:
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
        return prompts

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


def _run_offload_hook(model: Any) -> None:
    """Bring an offloaded model to its device: accelerate does so at `forward`, but we enter by other methods."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(model)
