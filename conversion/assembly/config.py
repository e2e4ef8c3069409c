"""Everything in an assembled folder that is no weight: config, processor, chat template, generation config.

What to put together is an `AssembleArguments`; `assemble` calls the three functions before it writes anything, and
each checks that what the parts bring fits.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import GenerationConfig

from conversion.assembly.chat_formats import ChatTemplate, make_chat_template
from conversion.assembly.parts import Part, load_part_image_processor
from conversion.assembly.vocabulary import PISCES_TOKENS, Vocabulary
from modeling_pisces import PiscesConfig, PiscesProcessor
from modeling_pisces.configuration_pisces import num_prefix_tokens, read_generation_config


_SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class AssembleArguments:
    """What to put together. A part is a local folder, or a Hub id together with its `_revision`.

    `gen_pool_stride` None takes that of the Pisces out of which the generation tower is taken, otherwise 4.
    `licenses` maps a part to what its own card does not say, or says otherwise.
    """

    language_model: str
    vision_tower: str
    gen_vision_tower: str | None = None
    decoder: str | None = None
    language_model_revision: str | None = None
    vision_tower_revision: str | None = None
    gen_vision_tower_revision: str | None = None
    decoder_revision: str | None = None
    gen_pool_stride: int | None = None
    gen_head_type: str = "mlp"
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: str | None = None
    chat_template: str | None = None
    chat_format: str | None = None
    dtype: str | None = None
    seed: int = 0
    allow_pickle: bool = False
    licenses: Mapping[str, str] = field(default_factory=dict)


def make_config(run: AssembleArguments, parts: Mapping[str, Part], vocabulary: Vocabulary) -> PiscesConfig:
    """The parts' configs as one.

    Raises:
        ValueError: they cannot work together, such as a pool stride that does not divide the grid.
    """
    text_config = copy.deepcopy(parts["language_model"].config)
    text_config.vocab_size = vocabulary.num_rows
    towers = {
        role: copy.deepcopy(parts[role].config) for role in ("vision_tower", "gen_vision_tower") if role in parts
    }
    for tower in towers.values():
        if hasattr(tower, "vision_use_head"):
            tower.vision_use_head = False  # the pooling head, which Pisces never reads
    strategy = run.vision_feature_select_strategy
    if strategy is None:  # patches only: a class token in front of them is for classification
        strategy = "default" if num_prefix_tokens(towers["vision_tower"]) else "full"
    try:
        return PiscesConfig(
            text_config=text_config,
            vision_config=towers["vision_tower"],
            gen_vision_config=towers.get("gen_vision_tower"),
            gen_pool_stride=_pool_stride(run, parts.get("gen_vision_tower")),
            gen_head_type=run.gen_head_type,
            vision_feature_layer=run.vision_feature_layer,
            vision_feature_select_strategy=strategy,
            architectures=["PiscesForConditionalGeneration"],
            **vocabulary.token_ids,
            new_token_ids=vocabulary.new_token_ids or None,
            num_token_rows=vocabulary.num_token_rows,
        )
    except Exception as error:  # strict configs wrap what a check raised into a class of their own
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        raise ValueError(" ".join(str(cause).split())) from error


def _pool_stride(run: AssembleArguments, part: Part | None) -> int:
    if run.gen_pool_stride is not None:
        return run.gen_pool_stride
    return part.pisces.gen_pool_stride if part is not None and part.pisces is not None else 4


def make_processor(
    run: AssembleArguments, parts: Mapping[str, Part], vocabulary: Vocabulary, config: PiscesConfig
) -> tuple[PiscesProcessor, ChatTemplate]:
    """Tokenizer and image processors as one, with a chat template that knows images.

    Returns:
        the processor, and its chat template with what is known about it.

    Raises:
        ValueError: a tower has no image processor, or one for other pictures than the tower takes.
    """
    tokenizer = vocabulary.tokenizer
    tokens = {key.removesuffix("_id"): token for key, token in PISCES_TOKENS.items()}
    chat = make_chat_template(
        tokenizer, tokens["image_token"], tokens["gen_image_token"], run.chat_template, run.chat_format
    )
    tokenizer.chat_template = None  # the processor's is the one that counts
    pictures = {"image_processor": ("vision_tower", config.vision_config)}
    if "gen_vision_tower" in parts:
        pictures["gen_image_processor"] = ("gen_vision_tower", config.gen_vision_config)
    processor = PiscesProcessor(
        **{name: _open_image_processor(parts[role], tower) for name, (role, tower) in pictures.items()},
        tokenizer=tokenizer,
        chat_template=chat.template,
        num_image_tokens=config.num_image_tokens,
        num_gen_image_tokens=config.num_gen_image_tokens,
        **tokens,
    )
    return processor, chat


def _open_image_processor(part: Part, tower: Any) -> Any:
    side, where = tower.image_size, f"{part.role} {part.name}"
    if part.pisces is None and not (part.path / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{where}: preprocessor_config.json not found. It says how pictures are resized and normalised; get it "
            "from where the tower comes from."
        )
    try:
        image_processor = load_part_image_processor(part)
        pixels = image_processor([Image.new("RGB", (side + 3, side))], return_tensors="pt")["pixel_values"]
    except Exception as error:  # each image processor has its own errors; all mean that this file is wrong
        raise ValueError(
            f"{where}: preprocessor_config.json does not work ({' '.join(str(error).split())})."
        ) from error
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise ValueError(
            f"{where}: preprocessor_config.json makes pictures of shape {tuple(pixels.shape[1:])}, expected "
            f"{(3, side, side)} as the tower's config.json says."
        )
    return image_processor


def make_generation_config(part: Part, vocabulary: Vocabulary, end_token: str) -> GenerationConfig:
    """The language model's own settings, with every token that may end an answer, and the pad token."""
    has_own = (part.path / "generation_config.json").is_file()
    settings = read_generation_config(part.path) if has_own else GenerationConfig()
    if not settings.do_sample:  # without effect, but transformers refuses to save them (Llama-2 and its kin have some)
        for name in _SAMPLING_SETTINGS:
            setattr(settings, name, None)
    tokenizer, own = vocabulary.tokenizer, settings.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    ends += [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_token)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    settings.bos_token_id = tokenizer.bos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    return settings


__all__ = ["AssembleArguments", "make_config", "make_generation_config", "make_processor"]
