"""Model cards: the short one that an export writes where its author gave none, and what every published one must say.

`modeling_pisces/hub/export.py` writes cards, `modeling_pisces/hub/checks.py` checks them before a push. The card of
`pisces-tiny` is `model_card.md` in the repository.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


REQUIRED_METADATA = ("license", "library_name", "pipeline_tag")
DEFAULT_CARD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- pisces
- multimodal
---

# Pisces checkpoint

A Pisces model (arXiv 2506.10395): one language model with an encoder for pictures to understand and another one for
pictures to draw. {drawing}

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("<this repository>", trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained("<this repository>", trust_remote_code=True)
```

What it was trained on, what it is good for and what it is not, and under which license it may be used, is for its
author to add here.
"""


def default_card(config: Any) -> str:
    """A card that says only what the config knows."""
    if not config.has_generation:
        return DEFAULT_CARD.format(pipeline_tag="image-text-to-text", drawing="This one only understands.")
    size = f"{config.num_gen_image_tokens} vectors of width {config.gen_vector_size}"
    return DEFAULT_CARD.format(pipeline_tag="any-to-any", drawing=f"A drawn picture is {size}.")


def check_card(path: Path) -> ModelCard:
    """Read a model card and check the metadata that the Hub and its users need.

    Raises:
        ValueError: no metadata block, broken YAML, or a missing entry.
    """
    text = path.read_text(encoding="utf-8")
    if not re.match(r"\s*---\s*\n", text):
        raise ValueError(f"{path}: starts without a metadata block. Put YAML between two lines of --- at its top.")
    try:
        card = ModelCard(text)
    except Exception as error:  # the YAML reader has many errors, all of which mean this block
        raise ValueError(f"{path}: the metadata block is not valid ({' '.join(str(error).split())}).") from error
    missing = [name for name in REQUIRED_METADATA if not isinstance(getattr(card.data, name, None), str)]
    if missing:
        raise ValueError(f"{path}: the metadata lacks {', '.join(missing)}. Only you can say what is true; add it.")
    return card
