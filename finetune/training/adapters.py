"""Adapters on the language model of a Pisces: where they go, what else is trained, and in which precision.

Recipes call `add_adapter` on a loaded model and get a PEFT model back in which the adapter is trained and nothing of a
tower ever is. Two flavours: `portable` is LoRA alone (served side by side with others, hot-swapped, merged); `full`
also trains copies of the projector and the head of the sides that it learns. Loading an adapter needs nothing from
here: `PeftModel.from_pretrained(model, folder)`.
"""

import importlib.util
import re
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from trl import ModelConfig

from finetune.flags.names import quiet_old_names
from finetune.flags.ranges import check_ranges
from modeling_pisces import PISCES_QUANT_SKIP_MODULES, PiscesForConditionalGeneration


LANGUAGE_MODEL = "model.language_model."
FLAVOURS = ("portable", "full")
# What a side trains beside the language model in the flavour "full".
SIDE_MODULES = {"understanding": ["multi_modal_projector"], "generation": ["gen_projector", "gen_head"]}
TORCHAO_TYPES = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's `ModelConfig` (checkpoint, precision, LoRA, quantization) with defaults for a Pisces."""

    dtype: str | None = field(
        default="auto", metadata={"help": "of the frozen weights: auto (as stored), float32, bfloat16 or float16"}
    )
    flavour: str = field(
        default="portable", metadata={"help": "portable (LoRA alone) or full (with projectors and head, in fp32)"}
    )
    use_peft: bool = field(default=True, metadata={"help": "not used: these recipes train adapters"})
    # 16 and twice that as in TRL; without dropout, which keeps one more activation for every target
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "regular expression over full module names; default: all linear layers of the language model"
        },
    )
    adapter_dtype: str = field(
        default="float32", metadata={"help": "in which the finished adapter is stored: float32, bfloat16 or float16"}
    )
    torchao: str | None = field(
        default=None, metadata={"help": "quantize the language model with torchao: int8, int4"}
    )

    def __post_init__(self):
        check_ranges(self)
        super().__post_init__()
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype}: expected auto, float32, bfloat16 or float16.")
        if self.adapter_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--adapter_dtype {self.adapter_dtype}: expected float32, bfloat16 or float16.")
        if self.flavour not in FLAVOURS:
            raise ValueError(f"--flavour {self.flavour}: expected one of {', '.join(FLAVOURS)}.")
        if self.flavour == "portable" and self.use_dora:
            raise ValueError(
                "--use_dora True needs --flavour full: a DoRA adapter can be merged, but neither hot-swapped nor "
                "mixed with others in one batch, which portable promises."
            )
        if not self.use_peft or self.lora_modules_to_save or self.lora_target_parameters:
            raise ValueError(
                "use_peft, lora_modules_to_save and lora_target_parameters are chosen by --flavour; leave them out."
            )
        if self.torchao is not None and self.torchao not in TORCHAO_TYPES:
            raise ValueError(f"--torchao {self.torchao}: expected one of {', '.join(TORCHAO_TYPES)}.")
        if sum([self.load_in_4bit, self.load_in_8bit, self.torchao is not None]) > 1:
            raise ValueError("choose one of --load_in_4bit, --load_in_8bit and --torchao.")


def language_model_pattern(model: PiscesForConditionalGeneration) -> str:
    """A regular expression (for `re.fullmatch`) that names every linear layer of the language model and nothing else.

    Made from the model because its language model is chosen by config: the layers' own names differ.
    """
    leaves = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    }
    return rf"{re.escape(LANGUAGE_MODEL)}.+\.({'|'.join(sorted(leaves))})"


def add_adapter(
    model: PiscesForConditionalGeneration, settings: AdapterConfig, sides: tuple[str, ...] = ()
) -> PeftModel:
    """Freeze everything, and put a new adapter on the language model; all that is trained is fp32.

    Args:
        model: the loaded checkpoint.
        settings: rank and friends.
        sides: "understanding", "generation" or both: whose projectors and head the flavour "full" trains too.

    Raises:
        ValueError: the target modules match nothing, or reach outside the language model; names some of them.
    """
    model.requires_grad_(False)  # DDP waits for the gradient of everything that wants one, towers included
    targets = settings.lora_target_modules or language_model_pattern(model)
    check_targets(model, targets)
    modules_to_save = None
    if settings.flavour == "full":
        modules_to_save = [name for side in sides for name in SIDE_MODULES[side]]
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=targets,
        modules_to_save=modules_to_save,
        trainable_token_indices=new_token_rows(model),
    )  # without a task_type: PEFT's classes for tasks know nothing of drawing
    with quiet_old_names():
        adapted = get_peft_model(model, config)
    train_in_full_precision(adapted)
    return adapted


def new_token_rows(model: PiscesForConditionalGeneration) -> dict[str, list[int]] | None:
    """Which rows of the embedding and of `lm_head` an adapter trains: those of tokens the language model never saw.

    Everything else in both stays frozen. Without training, the row of `<|gen_start|>` in `lm_head` would decide alone
    how often the model opens an image, and LoRA cannot move it.

    Returns:
        name of the module -> ids, as PEFT's `trainable_token_indices`; None for a checkpoint without new tokens.
    """
    if not (ids := model.config.new_token_ids):
        return None
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [next(name for name, module in model.named_modules() if module is wanted) for wanted in modules]
    return {name: list(ids) for name in names}


def check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Check, as PEFT matches them, that target modules lie in the language model.

    Raises:
        ValueError: none matches, or some lie elsewhere.
    """
    names = [name for name, module in model.named_modules() if not list(module.children())]
    if isinstance(targets, str):
        matched = [name for name in names if re.fullmatch(targets, name)]
    else:
        matched = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
    outside = [name for name in matched if not name.startswith(LANGUAGE_MODEL)]
    if outside or not matched:
        what = f"reaches outside the language model ({', '.join(outside[:3])})" if outside else "matches no module"
        raise ValueError(
            f"--lora_target_modules {targets!r} {what}. Give one regular expression over full names, for example "
            f"'{language_model_pattern(model)}', which is the default."
        )


def train_in_full_precision(model: nn.Module) -> None:
    """Cast what is trained to fp32, in place.

    PEFT leaves the copies in `modules_to_save` in the base's dtype; in bf16 most updates of a usual learning rate are
    rounded away (5.9 % of a head's weights moved in 50 steps of AdamW at 1e-5, 100 % in fp32).
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def quantization_config(settings: AdapterConfig) -> BitsAndBytesConfig | TorchAoConfig | None:
    """How `from_pretrained` shall quantize the language model; towers, projectors and heads stay as they are.

    Raises:
        ValueError: the package that would do it is not installed.
    """
    skip = list(PISCES_QUANT_SKIP_MODULES)
    if settings.torchao is not None:
        _require("torchao", f"--torchao {settings.torchao}")
        import torchao.quantization as kinds

        return TorchAoConfig(getattr(kinds, TORCHAO_TYPES[settings.torchao])(), modules_to_not_convert=skip)
    if settings.load_in_8bit:
        _require("bitsandbytes", "--load_in_8bit")
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if settings.load_in_4bit:
        _require("bitsandbytes", "--load_in_4bit")
        storage = settings.bnb_4bit_quant_storage
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=None if storage is None else getattr(torch, storage),
            llm_int8_skip_modules=skip,  # the name is historical; 4-bit loading reads it too
        )
    return None


def _require(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs the package {package}: pip install {package}. Or leave the flag out.")
