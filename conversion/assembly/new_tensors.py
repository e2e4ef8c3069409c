"""Everything in an assembled checkpoint that no part brings: projectors, head, and rows for new tokens.

`assemble` calls it; each function returns tensors together with a sentence on how they were made, for
`provenance.json`.
"""

import torch

from conversion.storage.tensors import SourceTensor
from modeling_pisces import PiscesConfig, PiscesModel


NEW_MODULES = ("multi_modal_projector", "gen_projector", "gen_head")
# new rows start beside the mean of the trained ones: at it, the two drawing tokens could never be told apart
ROW_NOISE = 0.01
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


def new_rows(source: SourceTensor, num_trained: int, num_new: int, seed: int) -> tuple[torch.Tensor, str]:
    """Rows of an embedding or of `lm_head` for tokens that the language model never saw: (num_new, width), fp32.

    Args:
        source: the trained matrix; read block by block.
        num_trained: rows that belong to tokens of the tokenizer; the mean is over these.

    Source: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021): from the mean a new
    token takes at most an average share of the probability, and the old tokens' answers stay.
    """
    total = torch.zeros(source.shape[1], dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for start in range(0, num_trained, _BLOCK_ROWS):
        block = source.rows(start, min(start + _BLOCK_ROWS, num_trained)).load().double()
        total += block.sum(0)
        squares += block.square().sum()
    mean = total / num_trained
    deviation = (squares / (num_trained * source.shape[1]) - mean.square().mean()).clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_new, source.shape[1], generator=generator, dtype=torch.float64)
    rows = (mean + ROW_NOISE * deviation * noise).float()
    last = num_trained + num_new - 1
    return rows, (
        f"rows {num_trained} to {last}: mean of the rows before them plus {ROW_NOISE:g} of their standard deviation, "
        f"seed {seed}"
    )


__all__ = ["NEW_MODULES", "new_module_tensors", "new_rows"]
