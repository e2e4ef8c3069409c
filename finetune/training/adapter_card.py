"""The card of an adapter: what it is, on which base, learned from what, and how to load it.

`PiscesSFTTrainer` writes it with every checkpoint, `finetune.training.run_folder` once more with all facts at the end.
PEFT's own card would leave every section to be filled in by hand, and TRL's shows a text-generation pipeline.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pisces_commands.writing import write_whole


# What the table shows of the curve, in this order; evaluation's own names carry a prefix.
SHOWN = ("loss", "text_loss", "image_loss", "image_r2")

USAGE = """\
```python
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor

import modeling_pisces  # registers the model with transformers

processor = AutoProcessor.from_pretrained("{base}")
model = AutoModelForMultimodalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "{adapter}")
```

`model.generate(**inputs)` writes, `model.generate(**inputs, generation_mode="image")` draws vectors;
`with model.disable_adapter():` is the base again. `model.merge_and_unload()` gives a plain Pisces.
"""


def write_card(folder: str | Path, model: Any, history: list[dict], facts: Mapping[str, Any] | None = None) -> Path:
    """Write `README.md` into a folder.

    Args:
        folder: of the adapter.
        model: the trained model, with or without PEFT.
        history: the points of the curve, as Trainer keeps them.
        facts: "recipe", "data", "guard", "learned", "base_model", "adapter_id": each is optional, with an honest
            default.
    """
    facts = dict(facts or {})
    base = facts.get("base_model") or getattr(model.config, "_name_or_path", "") or "the base checkpoint"
    is_hub_id = not Path(base).exists() and base.count("/") <= 1 and " " not in base
    data = ModelCardData(
        library_name="peft",
        base_model=base if is_hub_id else None,
        base_model_relation="adapter" if is_hub_id else None,
        tags=["pisces", "lora", "peft", "trl"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# An adapter for {base}",
        f"Trained with `python -m finetune.{facts.get('recipe', 'sft_trainer')}`; `run.yaml` has every setting.",
        "## Use",
        USAGE.format(base=base, adapter=facts.get("adapter_id", "this-folder")),
        "## What it learned from",
        facts.get("data", "Not recorded."),
        "## What was trained",
        describe_adapter(model),
        "## What it reached",
        metrics_table(history),
        *(["## Whether it learned its pictures", facts["learned"]] if "learned" in facts else []),
        "## What it did to both sides",
        facts.get("guard", "Not watched."),
        f"Versions: peft {version('peft')}, trl {version('trl')}, transformers {version('transformers')}.",
    ]
    path = Path(folder) / "README.md"
    write_whole(path, ModelCard("\n\n".join(parts) + "\n").save)
    return path


def describe_adapter(model: Any) -> str:
    """One paragraph on rank, targets and size."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return f"{trained:,} parameters."
    kind = "DoRA" if config.use_dora else "rank-stabilised LoRA" if config.use_rslora else "LoRA"
    copies = f", and whole copies of {', '.join(sorted(config.modules_to_save))}" if config.modules_to_save else ""
    return (
        f"{kind} of rank {config.r}, alpha {config.lora_alpha}, on modules matching `{config.target_modules}`{copies}"
        f": {trained:,} parameters in all."
    )


def metrics_table(history: list[dict]) -> str:
    """First and last point of the training curve and of the evaluations, as Markdown."""
    rows = []
    for name in SHOWN:
        for prefix, where in (("", "training"), ("eval_", "evaluation")):
            values = [point[prefix + name] for point in history if prefix + name in point]
            if values:
                rows.append(f"| {name} | {where} | {values[0]:.4g} | {values[-1]:.4g} |")
    if not rows:
        return "No point of the curve was logged."
    return "\n".join(["| metric | rows of | first | last |", "|---|---|---|---|", *rows])
