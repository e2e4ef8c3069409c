"""The card of a model that was made from scratch: what it is, how to use it, what it learned from, what it reached.

Everything in it is read off the run; a licence and what the pictures may be used for only their owner can add.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pisces_commands.writing import write_whole


ROWS = (
    ("reconstruction_psnr", "reconstruction, PSNR in dB"),
    ("drawing_psnr", "drawing from the caption, PSNR in dB"),
    ("drawing_own_first", "drawing: the own picture is the nearest of all trained ones"),
    ("drawing_own_in_five", "drawing: among the nearest five"),
    ("answers_exact", "answers, exact"),
)

USAGE = """\
```python
from modeling_pisces import PiscesPipeline

pipe = PiscesPipeline.from_pretrained("this-folder")
pipe({caption!r}).images[0].save("drawing.png")
```

On the command line: `pisces draw --model this-folder {caption!r}`, `pisces describe --model this-folder photo.png`.
"""


def write_model_card(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `README.md`.

    Args:
        folder: of the model.
        facts: "license" or None, "image_size", "num_trained", "num_heldout", "sources", "caption" (one to show),
            "steps" (name to settings and seconds), "scores", "verdict", "commit", "hardware".
    """
    metadata = {"library_name": "transformers", "pipeline_tag": "any-to-any", "tags": ["pisces", "multimodal"]}
    if facts["license"]:
        metadata["license"] = facts["license"]
    missing = "" if facts["license"] else " No licence is named yet: add `license:` above before you publish it."
    parts = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()) + "\n---",
        "# A small Pisces",
        "A Pisces model (arXiv 2506.10395), trained from random weights by `python -m finetune.from_scratch`: it "
        f"describes and draws pictures of {facts['image_size']} x {facts['image_size']} pixels like those it was "
        f"trained on, and knows nothing else.{missing}",
        "![wanted, repeated by the decoder, drawn from the caption: trained above, held-out below](samples.png)",
        "## Use",
        USAGE.format(caption=facts["caption"]),
        "## What it learned from",
        f"{facts['num_trained']} pictures with their texts; {facts['num_heldout']} more were kept for the scores. "
        f"Sources: {', '.join(facts['sources'])}.",
        "## How it was trained",
        steps_table(facts["steps"]),
        f"Hardware: {facts['hardware']}. Commit: {facts['commit'] or 'not recorded'}. Seeds and all settings are in "
        "`from_scratch.yaml`.",
        "## What it reached",
        scores_table(facts["scores"]),
        facts["verdict"],
    ]
    return write_whole(Path(folder) / "README.md", "\n\n".join(parts) + "\n")


def steps_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Name, optimizer steps, rows of a step, seconds, of each step that was trained."""
    rows = ["| step | optimizer steps | batch | seconds |", "|---|---|---|---|"]
    for name, step in steps.items():
        settings = step["settings"]
        cells = [str(settings.get(key, "")) for key in ("max_steps", "batch_size")]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} | {step['seconds'] or 0:.0f} |")
    return "\n".join(rows)


def scores_table(scores: Mapping[str, Any]) -> str:
    """Trained and held-out side by side."""
    rows = [f"| | trained ({scores['trained']['num_pictures']}) | held-out ({scores['heldout']['num_pictures']}) |"]
    rows.append("|---|---|---|")
    for name, title in ROWS:
        rows.append(f"| {title} | {scores['trained'][name]} | {scores['heldout'][name]} |")
    return "\n".join(rows)
