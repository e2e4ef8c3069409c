"""Gives the tokenizer of a language model the tokens that Pisces needs, without moving any that it has.

Llama 3.x keeps reserved special tokens for this purpose: four of them are renamed, and neither embedding nor head
changes. Other tokenizers get new tokens at the end. `assemble` calls `prepare_tokenizer`; the rows that new tokens
need are made in `plan.py`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from conversion.assembly.parts import Part


PISCES_TOKENS = {
    "image_token_id": "<|image|>",
    "gen_image_token_id": "<|gen_image|>",
    "gen_start_token_id": "<|gen_start|>",
    "gen_end_token_id": "<|gen_end|>",
}
PAD_TOKEN = "<|pad|>"
# Llama-3.1's own name for the token that fine-tuning should pad with
_LLAMA_PAD_TOKEN = "<|finetune_right_pad_id|>"
_RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")
# multiples of 64 keep the head's matrix product fast on tensor cores
ROW_MULTIPLE = 64
# published models pad their embeddings by up to 1 % or some hundred rows; more means another model's tokenizer
_MAX_SPARE_ROWS, _MAX_SPARE_SHARE = 1024, 0.05


@dataclass(frozen=True)
class Vocabulary:
    """A prepared tokenizer and what it asks of the embedding.

    Args:
        tokenizer: with all tokens of `PISCES_TOKENS` and a pad token, padding on the left.
        token_ids: config key -> id.
        renamed: new name -> the reserved token that it took.
        new_token_ids: those of `PISCES_TOKENS` that the language model never saw, reserved ones included.
        num_trained: rows that belong to tokens the language model knows; later rows are new.
        num_token_rows: rows that belong to tokens, new ones included; None if all do. Later rows are padding.
        num_rows: rows that embedding and head need.
    """

    tokenizer: Any
    token_ids: dict[str, int]
    renamed: dict[str, str]
    new_token_ids: list[int]
    num_trained: int
    num_token_rows: int | None
    num_rows: int


def prepare_tokenizer(part: Part) -> Vocabulary:
    """Open the language model's tokenizer and give it the Pisces tokens.

    Raises:
        ValueError: there is no tokenizer, or it is not the one of this language model.
    """
    where, rows = f"language_model {part.name}", part.config.vocab_size
    tokenizer = _open_tokenizer(where, part.path)
    num_known = max(tokenizer.get_vocab().values()) + 1
    if num_known > rows:
        raise ValueError(
            f"{where}: the tokenizer has {num_known} tokens, but the embedding has {rows} rows (vocab_size). "
            "Give the tokenizer that the language model was trained with."
        )
    if rows - num_known > max(_MAX_SPARE_ROWS, _MAX_SPARE_SHARE * rows):
        raise ValueError(
            f"{where}: the tokenizer has {num_known} tokens, expected about the {rows} rows of the embedding "
            "(vocab_size). Give the tokenizer that the language model was trained with."
        )
    wanted = list(PISCES_TOKENS.values())
    if tokenizer.pad_token is None:
        has_pad = _LLAMA_PAD_TOKEN in tokenizer.get_vocab()
        wanted += [] if has_pad else [PAD_TOKEN]
    missing = [token for token in wanted if token not in tokenizer.get_added_vocab()]
    reserved = sorted((t for t in tokenizer.get_added_vocab() if _RESERVED.fullmatch(t)), key=_reserved_number)
    renamed = dict(zip(missing, reserved, strict=False)) if len(reserved) >= len(missing) else {}
    if renamed:
        tokenizer = _rename_tokens(tokenizer, renamed)
    else:
        tokenizer.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _LLAMA_PAD_TOKEN if PAD_TOKEN not in wanted else PAD_TOKEN
    tokenizer.padding_side = "left"  # to generate; collators choose their own side
    token_ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in PISCES_TOKENS.items()}
    needed = max(tokenizer.get_vocab().values()) + 1
    num_rows = rows if needed <= rows else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    has_new_rows = missing and not renamed
    return Vocabulary(
        tokenizer,
        token_ids,
        renamed,
        new_token_ids=sorted(token_ids[key] for key, token in PISCES_TOKENS.items() if token in missing),
        num_trained=num_known if has_new_rows else rows,
        num_token_rows=needed if needed < num_rows else None,
        num_rows=num_rows,
    )


def _open_tokenizer(where: str, path: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # every tokenizer class fails in its own way; all mean that a file is wrong or missing
        raise ValueError(f"{where}: the tokenizer cannot be opened ({' '.join(str(error).split())}).") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{where}: found a slow tokenizer, expected a fast one (tokenizer.json).")
    return tokenizer


def _reserved_number(token: str) -> int:
    match = _RESERVED.fullmatch(token)
    assert match is not None, "only reserved tokens are sorted"
    return int(match.group(1))


def _rename_tokens(tokenizer: Any, renamed: dict[str, str]) -> Any:
    """The same tokenizer with other names for some special tokens; no method of it can do that, its files can."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            text = path.read_text(encoding="utf-8")
            for new, old in renamed.items():
                text = text.replace(json.dumps(old), json.dumps(new))
            path.write_text(text, encoding="utf-8")
        changed = AutoTokenizer.from_pretrained(folder)
    for new, old in renamed.items():
        assert changed.convert_tokens_to_ids(new) == tokenizer.convert_tokens_to_ids(old), f"{old} moved"
    return changed


__all__ = ["PISCES_TOKENS", "Vocabulary", "prepare_tokenizer"]
