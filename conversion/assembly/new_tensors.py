"""Everything in an assembled checkpoint that no part brings: projectors, head, and rows for new tokens.

`assemble` calls it; each function returns tensors together with a sentence on how they were made, for
`provenance.json`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from conversion.storage.tensors import SourceTensor
from modeling_pisces import PiscesConfig, PiscesModel


NEW_MODULES = ("multi_modal_projector", "gen_projector", "gen_head")
# of the standard deviation of each channel: new tokens start as far apart as trained ones are. Rows at 0.01 of it, all
# beside the mean, could not be told apart by a language model that is trained with a frozen embedding.
ROW_SPREAD = 1.0
# rows of reserved tokens that lie nearer to each other than this share of what trained rows do were never trained
MIN_APART = 0.1
_BLOCK_ROWS = 4096


def new_module_tensors(config: PiscesConfig, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """Projectors and head as `PiscesModel` itself starts them, in fp32, under their keys in a checkpoint."""
    with torch.device("meta"):
        model = PiscesModel(config)
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in NEW_MODULES:
            module = getattr(model, name)
            if module is None:
                continue
            module.to_empty(device="cpu").float()
            for child in module.modules():
                model._init_weights(child)
            tensors |= {f"model.{name}.{key}": value.detach() for key, value in module.state_dict().items()}
    return tensors, f"as PiscesModel starts it, initializer_range {config.initializer_range}, seed {seed}"


class TokenRows(NamedTuple):
    """Rows for tokens that the language model never saw.

    Args:
        patches: id -> row (width,), for ids that the trained matrix has a row for.
        appended: (num_rows - num_trained, width), fp32, behind the trained rows; None if there are none.
        how: a sentence on how they were made; empty if there are none.
    """

    patches: dict[int, torch.Tensor]
    appended: torch.Tensor | None
    how: str


def token_rows(
    source: SourceTensor, num_trained: int, token_ids: Sequence[int], num_rows: int, seed: int
) -> TokenRows:
    """Rows of an embedding or of `lm_head` for new tokens, and for the padding behind them.

    A token's row is normal about the mean of the trained rows, with the standard deviation of each channel, so that
    it is as far from others as theirs are. A padding row is the mean itself: its logit is the mean of all logits and
    never the largest, in any engine. Rows of tokens below `num_trained` (reserved ones) that stand apart already stay.

    Args:
        source: the trained matrix; read block by block.
        num_trained: rows that belong to tokens of the tokenizer; the statistics are over these.
        token_ids: ids of the new tokens.
        num_rows: rows in all.

    Source: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021), which draws from a
    normal distribution with the mean and the covariance of the trained rows; here with its diagonal.
    """
    mean, deviation = _row_statistics(source, num_trained, token_ids)
    reserved = [token for token in token_ids if token < num_trained]
    if reserved and _stand_apart(source, reserved, deviation):
        reserved = []
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(token_ids), source.shape[1], generator=generator, dtype=torch.float64)
    drawn = dict(zip(token_ids, (mean + ROW_SPREAD * deviation * noise).float(), strict=True))
    patches = {token: drawn[token] for token in reserved}
    added = [token for token in token_ids if token >= num_trained]
    appended = None
    if num_rows > num_trained:
        appended = mean.float().expand(num_rows - num_trained, -1).clone()
        for token in added:
            appended[token - num_trained] = drawn[token]
    how = []
    if changed := sorted([*reserved, *added]):
        rows = ", ".join(map(str, changed))
        how.append(
            f"rows {rows}: normal, mean and standard deviation of each channel of the trained rows, seed {seed}"
        )
    if num_rows - num_trained > len(added):
        how.append(f"other rows from {num_trained} to {num_rows - 1}: mean of the trained rows")
    return TokenRows(patches, appended, "; ".join(how))


def _row_statistics(
    source: SourceTensor, num_trained: int, left_out: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over the trained rows, (width,) each, in fp64."""
    total, squares = torch.zeros(2, source.shape[1], dtype=torch.float64)
    count = num_trained - sum(token < num_trained for token in left_out)
    for start in range(0, num_trained, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, num_trained)
        block = source.rows(start, end).load().double()
        kept = [row - start for row in range(start, end) if row not in left_out]
        block = block if len(kept) == len(block) else block[kept]
        total += block.sum(0)
        squares += block.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def _stand_apart(source: SourceTensor, tokens: Sequence[int], deviation: torch.Tensor) -> bool:
    """Whether the rows of some tokens differ from each other about as much as trained rows do."""
    rows = torch.cat([source.rows(token, token + 1).load().double() for token in tokens])
    usual = 2**0.5 * deviation.norm()
    nearest = torch.nn.functional.pdist(rows).min() if len(rows) > 1 else rows.norm()
    return bool(nearest >= MIN_APART * usual)


__all__ = ["NEW_MODULES", "TokenRows", "new_module_tensors", "token_rows"]
