"""The generation side that a LLaVA can be given when it becomes a Pisces: a public tower, a new projector and head.

`from_llava` calls it when `--gen_vision_tower` is named. The three drawing tokens take embedding rows that no token
uses; projector and head start untrained. Trained with `finetune`, the result draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from conversion.assembly.new_tensors import new_module_tensors
from conversion.assembly.part_keys import expected_tensors, match_tower
from conversion.assembly.parts import Part, load_part_image_processor, open_part
from conversion.assembly.vocabulary import PISCES_TOKENS
from conversion.storage.tensors import DTYPE_NAMES, PlannedTensor
from modeling_pisces import PiscesConfig


@dataclass(frozen=True)
class GenerationSide:
    """What the model shall draw with.

    Args:
        tower: folder or Hub id of a generation tower.
        revision: its commit on the Hub.
        pool_stride: patches averaged per side into one drawn vector; None: the tower's own in a Pisces, or 4.
        head_type: "mlp" (the paper's), or another of `GEN_HEADS`.
        seed: of the new projector and head.
    """

    tower: str
    revision: str | None = None
    pool_stride: int | None = None
    head_type: str = "mlp"
    seed: int = 0

    def open(self) -> tuple[Part, dict[str, Any]]:
        """The tower, and the settings that a `PiscesConfig` takes of it."""
        part = open_part(self.tower, self.revision, "gen_vision_tower")
        own = part.pisces.gen_pool_stride if part.pisces is not None else 4
        settings = {"gen_pool_stride": self.pool_stride or own, "gen_head_type": self.head_type}
        return part, {"gen_vision_config": part.config, **settings}


def add_drawing_tokens(tokenizer: Any, token_ids: Mapping[str, int], where: str) -> None:
    """Give the tokenizer `<|gen_image|>`, `<|gen_start|>` and `<|gen_end|>`, under the ids that were chosen for them.

    Raises:
        ValueError: the tokenizer gives them other ids, because it has gaps or knows one of them.
    """
    names = {PISCES_TOKENS[key]: wanted for key, wanted in token_ids.items()}
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    for name, wanted in names.items():
        if (found := tokenizer.convert_tokens_to_ids(name)) != wanted:
            raise ValueError(f"{where}: the tokenizer puts {name} at {found}, expected the free row {wanted}.")


def open_image_processor(part: Part) -> Any:
    """How the tower's pictures are resized and normalised.

    Raises:
        ValueError: the part does not say it.
    """
    try:
        return load_part_image_processor(part)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"gen_vision_tower {part.name}: no image processor ({' '.join(str(error).split())}). Get its "
            "preprocessor_config.json from where the tower comes from."
        ) from error


def plan_generation(part: Part, config: PiscesConfig, seed: int) -> tuple[list[PlannedTensor], dict[str, str]]:
    """The tower's tensors and the new ones, all in the config's dtype; and how the new ones were initialised.

    Raises:
        ValueError: naming the first tensor of the tower that is missing, extra or misshapen.
    """
    dtype = DTYPE_NAMES[config.dtype]
    tower = match_tower(part, expected_tensors(config))
    plan = [PlannedTensor(name, source, part="gen_vision_tower", dtype=dtype) for name, source in tower.items()]
    modules, how = new_module_tensors(config, seed)
    new = {
        name: tensor for name, tensor in modules.items() if name.startswith(("model.gen_projector", "model.gen_head"))
    }
    plan += [PlannedTensor(name, tensor=tensor, part=name.split(".")[1], dtype=dtype) for name, tensor in new.items()]
    return plan, dict.fromkeys(new, how)


__all__ = ["GenerationSide", "add_drawing_tokens", "open_image_processor", "plan_generation"]
