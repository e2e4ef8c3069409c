"""Says which tensor of a part becomes which tensor of a Pisces checkpoint, and stops at the first that does not fit.

What a checkpoint must hold is read off the model class itself, built on the meta device; what a part holds comes from
its safetensors headers. Between the two stand a few prefixes and a list of what is known and left out. `assemble`
calls it before anything is written.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from conversion.assembly.parts import TOWER_PREFIXES, Part
from conversion.storage.tensors import SourceTensor
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration


LANGUAGE_MODEL = "model.language_model."
LM_HEAD = "lm_head.weight"

# what the head is called in files of classes that transformers has since given the common name (GPT-NeoX)
_OTHER_HEADS = ("embed_out.weight",)
# known, and left out: the causal masks and rotary tables that older files carry as buffers
_LANGUAGE_MODEL_LEFT_OUT = (r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")
# known, and left out: what a contrastive pair has beside the vision tower's patches
_TOWER_LEFT_OUT = (
    r"^text_model\.",
    r"^logit_(scale|bias)$",
    r"^(text|visual)_projection\.weight$",
    r"^(vision_model\.)?head\.",  # SigLIP's pooling head
    r"^vision_model\.embeddings\.position_ids$",
)


class ExpectedTensors(NamedTuple):
    """What a checkpoint of one config stores: key -> shape in the model's own order, and the input embedding's key."""

    shapes: dict[str, tuple[int, ...]]
    embedding: str


def expected_tensors(config: PiscesConfig) -> ExpectedTensors:
    """Read off the model class what it stores. Tied weights are stored once, under the input embedding's key."""
    with torch.device("meta"):
        model = PiscesForConditionalGeneration(config)
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
    return ExpectedTensors(shapes, model._tied_weights_keys[LM_HEAD])


def match_language_model(part: Part, expected: ExpectedTensors) -> dict[str, SourceTensor]:
    """Checkpoint key -> place in the language model's files, `lm_head` included where it is stored.

    Embedding and head have as many rows as the part's own config says; the checkpoint may have more.

    Raises:
        ValueError: naming the first key that is missing, extra or misshapen.
    """
    prefix, head, ignored = _causal_lm_names(part.config)
    own = {key: key.removeprefix(LANGUAGE_MODEL) for key in expected.shapes if key.startswith(LANGUAGE_MODEL)}
    if any(name.startswith(f"{prefix}.") for name in part.tensors):  # saved with its head, as most are
        own = {key: f"{prefix}.{name}" for key, name in own.items()}
    left_out = (*_LANGUAGE_MODEL_LEFT_OUT, *ignored)
    head = next((name for name in (head, *_OTHER_HEADS) if name in part.tensors), head)
    if LM_HEAD in expected.shapes:
        own[LM_HEAD] = head
    elif head in part.tensors:
        _check_copy(part, head, own[expected.embedding])
        left_out = (*left_out, f"^{re.escape(head)}$")
    shapes = dict(expected.shapes)
    for key in (LM_HEAD, expected.embedding):
        if key in shapes:
            shapes[key] = (part.config.vocab_size, *shapes[key][1:])
    return _match(part, own, shapes, left_out)


def _causal_lm_names(config: PreTrainedConfig) -> tuple[str, str, tuple[str, ...]]:
    """Of the class that the files were saved from: prefix of the backbone, key of the head, patterns it ignores."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    return model.base_model_prefix, f"{name}.weight", tuple(model._keys_to_ignore_on_load_unexpected or ())


def _check_copy(part: Part, head: str, embedding: str) -> None:
    """A tied model whose file holds the head too: it is left out, so it must be a copy."""
    if embedding in part.tensors and not _same_values(part.tensors[head], part.tensors[embedding]):
        raise ValueError(
            f"language_model {part.name}: {head} differs from {embedding}, which config.json ties it to; expected a "
            "copy. Set tie_word_embeddings to false there if both are meant."
        )


def _same_values(first: SourceTensor, second: SourceTensor, num_rows: int = 4096) -> bool:
    if first.shape != second.shape:
        return False
    ranges = [(start, min(start + num_rows, first.shape[0])) for start in range(0, first.shape[0], num_rows)]
    return all(torch.equal(first.rows(*rows).load(), second.rows(*rows).load()) for rows in ranges)


def match_tower(part: Part, expected: ExpectedTensors) -> dict[str, SourceTensor]:
    """Checkpoint key -> place in the files of a tower, or of a contrastive pair that holds one.

    Raises:
        ValueError: naming the first key that is missing, extra or misshapen.
    """
    target = TOWER_PREFIXES[part.role]
    # some releases of transformers keep the vision half under "vision_model." in class and file, some do not
    keys = [key for key in expected.shapes if key.startswith(target)]
    bare = {key: key.removeprefix(target).removeprefix("vision_model.") for key in keys}
    is_nested = any(name.startswith("vision_model.") for name in part.tensors)
    own = {key: f"vision_model.{name}" if is_nested else name for key, name in bare.items()}
    return _match(part, own, expected.shapes, _TOWER_LEFT_OUT)


def _match(
    part: Part, own: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], left_out: Iterable[str]
) -> dict[str, SourceTensor]:
    where = f"{part.role} {part.name}"
    if missing := [name for name in own.values() if name not in part.tensors]:
        raise ValueError(
            f"{where}: {missing[0]} is missing (as {len(missing)} of the {len(own)} tensors that its config.json asks "
            f"for); found {len(part.tensors)}, such as {next(iter(part.tensors), None)}. Get the weights of this "
            "config.json; a layout that transformers rearranges while loading (experts in single tensors) is not read."
        )
    for key, name in own.items():
        if (found := part.tensors[name].shape) != shapes[key]:
            raise ValueError(f"{where}: {name} has shape {found}, expected {shapes[key]} as its config.json says.")
    known, patterns = set(own.values()), [re.compile(pattern) for pattern in left_out]
    for name in part.tensors:
        if name not in known and not any(pattern.search(name) for pattern in patterns):
            raise ValueError(
                f"{where}: {name} is extra; found {len(part.tensors)} tensors, expected the {len(own)} that its "
                "config.json asks for."
            )
    return {key: part.tensors[name] for key, name in own.items()}


__all__ = ["LM_HEAD", "ExpectedTensors", "expected_tensors", "match_language_model", "match_tower"]
