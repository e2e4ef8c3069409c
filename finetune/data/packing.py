"""Several samples in one row: no padding, and no sample sees another.

`PackedRows` decides which rows of a data set share a row of the batch (best-fit decreasing inside shuffled windows),
`PackingCollator` builds those rows from whatever padded batch another collator makes. Both sides pack alike: text,
pictures to understand, drawings, and mixtures. Recipes call both; attention over such rows is in `packed_attention`,
the check that transformers really keeps samples apart is in the model's forward.
"""

# B rows of the batch (packs), S samples, T tokens
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from modeling_pisces import PiscesProcessor


Row = dict[str, Any]
IGNORED = -100  # label without a loss


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest pack that still has room.

    Args:
        lengths: tokens of each sample, at least 1.
        capacity: tokens of one pack.

    Returns:
        Packs of indices into `lengths`, in the order in which they were opened; every index once.

    Raises:
        ValueError: a sample is longer than the capacity; names the first ones.
    """
    if too_long := [index for index, length in enumerate(lengths) if length > capacity]:
        raise ValueError(_overflow_message(too_long, lengths, capacity))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            packs.append([])
            free, pack = capacity, len(packs) - 1
        else:
            free, pack = room.pop(place)
        packs[pack].append(index)
        insort(room, (free - lengths[index], pack))
    return packs


def _overflow_message(too_long: list[int], lengths: Sequence[int], capacity: int) -> str:
    shown = ", ".join(f"{index} ({lengths[index]} tokens)" for index in too_long[:5])
    return (
        f"{len(too_long)} of {len(lengths)} rows are longer than a pack of {capacity} tokens: rows {shown}"
        f"{', ...' if len(too_long) > 5 else ''}. Raise the capacity, shorten them, or pass on_overflow='skip'."
    )


def token_lengths(rows: Iterable[Row], processor: PiscesProcessor, batch_size: int = 256) -> list[int]:
    """Tokens of each row once its pictures have become placeholders; no picture is opened.

    Args:
        rows: with "messages".
        processor: the one that the collator uses.
    """
    lengths: list[int] = []
    batch: list[list[dict]] = []
    for row in tqdm(rows, desc="token lengths", delay=2, leave=False, disable=None):
        batch.append(row["messages"])
        if len(batch) == batch_size:
            lengths += _batch_lengths(batch, processor)
            batch = []
    return lengths + (_batch_lengths(batch, processor) if batch else [])


def _batch_lengths(conversations: list[list[dict]], processor: PiscesProcessor) -> list[int]:
    texts = processor.apply_chat_template(conversations, tokenize=False)
    bos = processor.tokenizer.bos_token
    adds_tokens = not (bos and all(text.startswith(bos) for text in texts))  # as the processor decides it
    ids = processor.tokenizer(texts, add_special_tokens=adds_tokens)["input_ids"]
    gen_extra = processor.num_gen_image_tokens + 1  # M and two delimiters instead of one placeholder
    return [
        len(row)
        + text.count(processor.image_token) * (processor.num_image_tokens - 1)
        + (text.count(processor.gen_image_token) * gen_extra if processor.can_draw else 0)
        for row, text in zip(ids, texts, strict=True)
    ]


def rows_of(item: Any) -> list[Row]:
    """The rows of an item of a dataset: of a pack, all that are in it; otherwise the row itself."""
    return item["rows"] if isinstance(item, Mapping) and "rows" in item else [item]


class PackedRows(Dataset):
    """A data set of packs: item k is `{"rows": [row, ...]}`, to be shuffled and batched like any other item.

    Which rows share a pack depends on (lengths, capacity, window, seed) alone, so that a resumed run meets the same
    packs: keep the order of packs to the trainer's sampler, which is resumable. Rows are shuffled before they are cut
    into windows; without that, packs would hold rows of similar length and source.

    Args:
        rows: indexable, each row as the inner collator takes it.
        lengths: tokens of each row, for example from `token_lengths`.
        capacity: tokens of one pack.
        window: rows that are packed together; more waste less and mix less.
        seed: of the shuffle.
        on_overflow: "error" or "skip" for rows longer than the capacity; `num_skipped` counts them.

    Raises:
        ValueError: lengths and rows differ in number, nothing is left to pack, or a row is too long.
    """

    def __init__(
        self,
        rows: Sequence[Row] | Dataset,
        lengths: Sequence[int],
        capacity: int,
        window: int = 1024,
        seed: int = 0,
        on_overflow: str = "error",
    ):
        if len(lengths) != len(rows):
            raise ValueError(f"{len(lengths)} lengths for {len(rows)} rows; pass one length per row.")
        if on_overflow not in ("error", "skip"):
            raise ValueError(f"on_overflow={on_overflow!r}: expected 'error' or 'skip'.")
        too_long = [index for index, length in enumerate(lengths) if length > capacity]
        if too_long and on_overflow == "error":
            raise ValueError(_overflow_message(too_long, lengths, capacity))
        self.rows, self.capacity, self.num_skipped = rows, capacity, len(too_long)
        self.packs = _pack_windows(
            [i for i in range(len(lengths)) if lengths[i] <= capacity], lengths, capacity, window, seed
        )
        if not self.packs:
            raise ValueError(
                f"no row fits into a pack of {capacity} tokens ({len(lengths)} rows, {self.num_skipped} too long). "
                "Raise the capacity."
            )
        self.num_tokens = sum(lengths[index] for pack in self.packs for index in pack)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[Row]]:
        return {"rows": [self.rows[row] for row in self.packs[index]]}

    @property
    def fill(self) -> float:
        """Share of the packs' capacity that holds tokens."""
        return self.num_tokens / (self.capacity * len(self.packs))


def _pack_windows(
    indices: list[int], lengths: Sequence[int], capacity: int, window: int, seed: int | str
) -> list[list[int]]:
    """Packs of `indices`, window by window of the shuffled order; inside a window the packs are shuffled again."""
    rng = random.Random(f"packing-{seed}")
    rng.shuffle(indices)
    packs: list[list[int]] = []
    for start in range(0, len(indices), window):
        chosen = indices[start : start + window]
        made = pack_lengths([lengths[index] for index in chosen], capacity)
        rng.shuffle(made)  # best-fit decreasing leaves the least full packs at the end
        packs += [[chosen[place] for place in pack] for pack in made]
    return packs


class PackedStream(IterableDataset):
    """The same for rows that come one by one: fills a window, packs it, hands out its packs.

    Deterministic: the same rows in the same order give the same packs, so skipping the items already seen resumes.

    Args:
        rows: an iterable that can be started again.
        length_of: tokens of one row.
        capacity, window, seed: as for `PackedRows`. Rows longer than the capacity are left out and counted.
    """

    def __init__(
        self, rows: Iterable[Row], length_of: Callable[[Row], int], capacity: int, window: int = 1024, seed: int = 0
    ):
        self.rows, self.length_of, self.capacity = rows, length_of, capacity
        self.window, self.seed, self.num_skipped = window, seed, 0

    def __iter__(self) -> Iterator[dict[str, list[Row]]]:
        self.num_skipped = 0
        held: list[Row] = []
        lengths: list[int] = []
        for number, row in enumerate(self.rows):
            length = self.length_of(row)
            if length > self.capacity:
                self.num_skipped += 1
                continue
            held.append(row)
            lengths.append(length)
            if len(held) == self.window:
                yield from self._packs_of(held, lengths, number)
                held, lengths = [], []
        yield from self._packs_of(held, lengths, -1)

    def _packs_of(self, held: list[Row], lengths: list[int], number: int) -> Iterator[dict[str, list[Row]]]:
        for pack in _pack_windows(
            list(range(len(held))), lengths, self.capacity, self.window, f"{self.seed}-{number}"
        ):
            yield {"rows": [held[index] for index in pack]}


class PackingCollator:
    """Packs to model inputs: the inner collator makes a padded batch, this one takes the padding out.

    Works with every collator whose batch has an attention mask and flat lists of pictures in reading order, so that
    what the inner one checks per row (pictures against placeholders) stays checked per sample.

    Args:
        collator: rows to a padded batch with "input_ids", "attention_mask" and "labels".
        pad_token_id: fills the shorter packs of a batch; any id that is no placeholder.
    """

    def __init__(self, collator: Callable[[list[Row]], dict[str, Any]], pad_token_id: int = 0):
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, packs: list[dict[str, list[Row]]]) -> dict[str, Any]:
        batch = self.collator([row for pack in packs for row in pack["rows"]])
        return pack_batch(batch, [len(pack["rows"]) for pack in packs], self.pad_token_id)


def pack_batch(batch: dict[str, Any], samples_per_pack: list[int], pad_token_id: int = 0) -> dict[str, Any]:
    """A padded batch of S samples as B packed rows.

    Args:
        batch: "input_ids" and "attention_mask" (S, T), padded on either side; other (S, T) tensors are packed alike,
            everything else (pixels, vectors: flat, in reading order) passes through.
        samples_per_pack: how many successive samples form each row.
        pad_token_id: fills shorter rows; the filling is a sample of its own without labels.

    Returns:
        "input_ids" and "labels" (B, T'), the first label of each sample -100, because nothing of its own stands before
        it; "position_ids" (B, T') that restart at 0; no attention mask, so that transformers looks at the positions;
        and what variable-length attention takes: "cu_seq_lens_q", "cu_seq_lens_k" (samples + 1,) int32, and
        "max_length_q", "max_length_k".

    Raises:
        ValueError: the batch has no attention mask, or another number of samples.
    """
    is_real, batch = _real_tokens(batch, samples_per_pack)
    lengths = is_real.sum(-1).tolist()
    shape = is_real.shape
    totals, start = [], 0
    for count in samples_per_pack:
        totals.append(sum(lengths[start : start + count]))
        start += count

    def pack(values: torch.Tensor, fill: int) -> torch.Tensor:
        return pad_sequence(values[is_real].split(totals), batch_first=True, padding_value=fill)

    packed = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            packed[name] = value
        else:
            packed[name] = pack(value, {"input_ids": pad_token_id}.get(name, IGNORED if "labels" in name else 0))
    positions = pack(is_real.long().cumsum(-1) - 1, 0)
    width = positions.shape[1]
    for row, total in enumerate(totals):
        positions[row, total:] = torch.arange(width - total)
    packed["position_ids"] = positions
    if "labels" in packed:
        packed["labels"] = packed["labels"].masked_fill(positions == 0, IGNORED)
    return packed | _sample_boundaries(positions)


def _real_tokens(batch: dict[str, Any], samples_per_pack: list[int]) -> tuple[torch.BoolTensor, dict[str, Any]]:
    if batch.get("attention_mask") is None:
        raise ValueError("the batch has no attention_mask, so its padding is not known. Let the collator return one.")
    is_real = batch["attention_mask"].bool()
    if is_real.shape[0] != sum(samples_per_pack):
        raise ValueError(
            f"the batch has {is_real.shape[0]} rows but the packs hold {sum(samples_per_pack)} samples "
            f"({samples_per_pack}). The inner collator must return one row per sample."
        )
    return is_real, {name: value for name, value in batch.items() if name != "attention_mask"}


def _sample_boundaries(positions: torch.LongTensor) -> dict[str, Any]:
    """Where samples begin in the rows laid end to end, under the names that transformers' flash attention reads."""
    starts = (positions.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
