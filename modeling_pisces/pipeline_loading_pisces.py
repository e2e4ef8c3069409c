"""How `PiscesPipeline` is loaded and saved: one folder holds the decoder and, at its root, the language model.

The pipeline inherits `PipelineLoadingMixin`; the rest of this file finds the language model that lies beside a
decoder, in a folder or in one revision of a Hub repository. It is loaded through the Auto classes of transformers,
because the classes of the package may be remote code themselves.
"""

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from .pipeline_checks_pisces import check_count, check_decoder, check_default_negative, check_guidance
from .scheduler_checks_pisces import prediction_kind


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Base
else:
    Base = object  # the pipeline brings DiffusionPipeline; diffusers wants one subclass of it per file

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


class PipelineLoadingMixin(Base):
    """`from_pretrained`, `save_pretrained` and what they need; to be inherited before `DiffusionPipeline`."""

    _attach_when_named: bool  # set by the pipeline's constructor

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
        `from_pretrained`. Its last act is to note where the parts came from, and there the model lies too.
        """
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
        super(PipelineLoadingMixin, decoder).save_pretrained(folder, **kwargs)

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
