"""Loads an exported folder as a stranger would: with its own code, in a process that cannot import this package.

`export` runs this file by its path, isolated (`python -I load_export.py FOLDER`), because a class that is registered
in the running process would win over the folder's code without a word. It imports nothing of this repository. Prints
one JSON object; a wrong folder ends it with an error.
"""

import json
import sys
from pathlib import Path


class PackageBlocker:
    """Makes `import modeling_pisces` fail, also where the package is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_pisces":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def load(folder: str) -> dict:
    """Load processor, model and decoder through the Auto classes, and let each of them compute something."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForMultimodalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(problem) or ())):
            raise ValueError(f"{len(keys)} {problem.replace('_', ' ')}, the first is {keys[0]}")
    model.eval()
    inputs = processor(text="a red circle", return_tensors="pt")
    checks = {"text": lambda: model(**inputs).logits}
    has_decoder = (Path(folder) / "model_index.json").is_file()
    if model.config.gen_vision_config is not None and not has_decoder:
        checks["vectors"] = lambda: model.generate(**inputs, generation_mode="image")
    if has_decoder:
        checks["drawing"] = lambda: draw(folder, model, processor)
    shapes = {}
    for name, compute in checks.items():  # one by one: a drawing of bad text states would be refused in other words
        with torch.no_grad():
            tensor = compute()
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: holds values that are not finite")
        shapes[name] = list(tensor.shape)
    for item in (model, processor):
        if not type(item).__module__.startswith("transformers_modules."):
            raise ValueError(f"{type(item).__name__} is not the folder's own code")
    return shapes


def draw(folder: str, model, processor):
    """One picture of one step: (1, 3, H, W)."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, vision_language_model=model, processor=processor, torch_dtype=model.dtype
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", num_inference_steps=1, output_type="pt").images


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    print(json.dumps(load(sys.argv[1])))
