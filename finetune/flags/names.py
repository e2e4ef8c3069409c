"""Options that transformers renamed inside our range of versions, so that no run opens with a warning about them.

transformers 5.24 calls gradient checkpointing activation checkpointing. Both names stay flags here; what PEFT and TRL
still ask by the old name is no business of whoever trains.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def use_new_names(arguments: Any) -> None:
    """Give what stands under an old name to the new one, where this version has it and it was not given itself."""
    for old, new in RENAMED.items():
        if hasattr(arguments, new) and getattr(arguments, new) is None:
            setattr(arguments, new, getattr(arguments, old))


@contextmanager
def quiet_old_names() -> Iterator[None]:
    """Inside the block other libraries may use the old names without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning
        )
        yield
