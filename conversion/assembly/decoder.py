"""Checks and copies the diffusion decoder of an assembled checkpoint; `assemble` calls both.

A decoder folder comes from `from_emu2_gen`, `from_sdxl` or `finetune`. Its weights keep their dtype, whatever the
language model's: an SDXL VAE, for one, overflows in float16.
"""

import shutil
from pathlib import Path
from typing import Any

from conversion.assembly.parts import Part
from conversion.storage.decoder import CLASSES, WEIGHTS, build_component, check_shapes, read_component, state_shapes
from conversion.storage.tensors import PlannedTensor, index_tensors
from conversion.storage.write import write_shards
from modeling_pisces import PiscesConfig
from modeling_pisces.checkpoint.files import DECODER_PARTS
from modeling_pisces.pipeline_checks_pisces import check_decoder


def check_decoder_part(part: Part, config: PiscesConfig) -> None:
    """Build the decoder on the meta device and compare it with its files and with the vectors that the model draws.

    Raises:
        ValueError: it is no Pisces decoder, its weights are not those of its configs, or it reads other vectors.
    """
    where = f"decoder {part.name}"
    name = part.config.get("_class_name")
    if (name[-1] if isinstance(name, list) else name) != "PiscesPipeline":
        raise ValueError(
            f"{where}: model_index.json has _class_name {name!r}, expected 'PiscesPipeline'. Make a decoder of a "
            "public one with conversion.from_sdxl or conversion.from_emu2_gen."
        )
    if not config.has_generation:
        raise ValueError(f"{where}: given without a generation tower, whose vectors it would draw. Leave it out.")
    models: dict[str, Any] = {"vae": None}
    for component in _components(part):
        settings, tensors = read_component(where, part.path, component, None)
        models[component] = build_component(component, settings)
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        check_shapes(f"{where}: {component}", shapes, state_shapes(models[component]))
    check_decoder(models["unet"], models["vae"], config.gen_vector_size, "the generation tower")


def _components(part: Part) -> list[str]:
    return [name for name in CLASSES if (part.config.get(name) or [None])[0] is not None]


def write_decoder_part(part: Part, folder: Path, max_shard_size: int | str) -> list[dict[str, Any]]:
    """Copy the decoder into a checkpoint folder.

    Returns:
        the records of its tensors, named "unet.<key>" and "vae.<key>".
    """
    records = []
    for component in _components(part):
        (folder / component).mkdir()
        tensors = index_tensors(part.path / component, WEIGHTS)
        plan = [PlannedTensor(key, tensor, part=part.role) for key, tensor in tensors.items()]
        written = write_shards(plan, folder / component, max_shard_size, stem=WEIGHTS)
        records += [record | {"name": f"{component}.{record['name']}"} for record in written]
    for component in DECODER_PARTS:
        (folder / component).mkdir(exist_ok=True)
        for path in sorted((part.path / component).glob("*config.json")):
            shutil.copyfile(path, folder / component / path.name)
    shutil.copyfile(part.path / "model_index.json", folder / "model_index.json")
    return records


__all__ = ["check_decoder_part", "write_decoder_part"]
