"""Keeps a checkpoint's generation_config.json in force: what was saved is what a later load generates with.

A `GenerationConfig` that was derived from a model config carries `_from_model_config`. transformers keeps that flag
through every change and every save, and drops the names it does not know itself, such as `image_temperature`, when a
flagged file is read: one value set before saving, and the next load has lost it without a word. Pisces never writes
the flag, and reads a flagged file as it stands. The whole model inherits `GenerationConfigMixin`; what handles a
folder without its model calls the two functions.
"""

import os

from transformers import GenerationConfig


_HUB_OPTIONS = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")


def read_generation_config(source: str | os.PathLike, **hub_options) -> GenerationConfig:
    """The generation config of a folder or Hub id with every value that is written there.

    Args:
        source: folder or Hub id.
        hub_options: as `GenerationConfig.from_pretrained` takes them.

    Raises:
        OSError: there is no generation_config.json, or it is no JSON.
    """
    # given here, the flag replaces the file's: transformers (5.16 to 5.24) lets arguments win over the file
    return own_generation_config(GenerationConfig.from_pretrained(source, _from_model_config=False, **hub_options))


def own_generation_config(settings: GenerationConfig) -> GenerationConfig:
    """The same object, no longer marked as derived from a model config; None is the value that no file shows."""
    settings._from_model_config = None
    return settings


class GenerationConfigMixin:
    """Stands before `PreTrainedModel` among the bases of a model with `generate`."""

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
    ):
        """The last step of `from_pretrained`: the generation config, with the values that transformers leaves out."""
        super().adjust_generation_fn(
            generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
        )
        if not self.generation_config._from_model_config:
            return
        if pretrained_model_name_or_path is None:  # weights given as a state_dict: there is no file to read
            own_generation_config(self.generation_config)
            return
        if generation_config is not None:
            values = generation_config.to_dict() | {"_from_model_config": None}
            self.generation_config = type(self.generation_config).from_dict(values)
            return
        try:
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            self.generation_config = read_generation_config(pretrained_model_name_or_path, **hub_options)
        except OSError:
            own_generation_config(self.generation_config)  # no such file: what config.json gave stays

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with a generation config that loads with all of its values."""
        own_generation_config(self.generation_config)
        return super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["GenerationConfigMixin", "own_generation_config", "read_generation_config"]
