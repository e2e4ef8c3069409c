"""What a checkpoint folder ships as defaults, and what a loaded model, processor and pipeline really use.

Read by `test_shipped_defaults.py`, and run as `python shipped_defaults.py FOLDER NUM_THREADS` in a process where the
package cannot be imported; so nothing here imports it.
"""

import json
import sys
from pathlib import Path

import torch


WISH = [{"role": "user", "content": "a red circle"}]
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
IN_FORCE_FILES = {
    "generation": "generation_config.json",
    "processor": "processor_config.json",
    "tokenizer": "tokenizer_config.json",
    "pipeline": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
}
# notes of who wrote a file with what, and names of classes: no settings
NOTES = {"transformers_version", "processor_class", "tokenizer_class", "backend", "auto_map", "_class_name"}
NOTES |= {"_diffusers_version", "processor", "scheduler", "unet", "vae", "vision_language_model"}


def shipped(folder: Path) -> dict:
    """Every setting of the folder's JSON files, by part, and the chat template."""
    parts = {
        part: {name: value for name, value in json.loads((folder / file).read_text()).items() if name not in NOTES}
        for part, file in IN_FORCE_FILES.items()
    }
    return parts | {"chat_template": (folder / "chat_template.jinja").read_text()}


def in_force(folder: Path, model=None, processor=None, pipe=None) -> dict:
    """The same settings as the given objects hold them; parts of objects that are not given are left out."""
    wanted, found = shipped(folder), {}
    if model is not None:
        settings = model.generation_config.to_dict()
        found["generation"] = {name: settings.get(name, "absent") for name in wanted["generation"]}
    if processor is not None:
        settings = json.loads(processor.to_json_string())  # sizes are classes of transformers until they are written
        found["processor"] = {name: settings.get(name, "absent") for name in wanted["processor"]}
        for name, value in wanted["processor"].items():
            if isinstance(value, dict):  # an image processor, which holds more names than it was given
                found["processor"][name] = {key: settings[name].get(key, "absent") for key in value}
        own = processor.tokenizer
        found["tokenizer"] = {name: getattr(own, name, own.init_kwargs.get(name)) for name in wanted["tokenizer"]}
        found["chat_template"] = processor.chat_template
    if pipe is not None:
        found["pipeline"] = {name: pipe.config[name] for name in wanted["pipeline"]}
        found["scheduler"] = {name: pipe.scheduler.config[name] for name in wanted["scheduler"]}
    return found


def draws_at(model, processor, temperature: float) -> bool:
    """Whether vectors drawn without any option are those drawn at this temperature."""
    inputs = processor.apply_chat_template(WISH, **OPTIONS)
    drawn = [
        model.generate(**inputs, generation_mode="image", generator=torch.Generator().manual_seed(0), **options)
        for options in ({}, {"image_temperature": temperature})
    ]
    return torch.equal(*drawn)


def write_text(model, processor, **options) -> torch.Tensor:
    inputs = processor.apply_chat_template(WISH, **OPTIONS)
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def look(folder: Path, model, processor, pipe) -> dict:
    """What is in force after loading and after texts with and without options; and how drawings come out."""
    first = in_force(folder, model, processor, pipe)
    draws = [draws_at(model, processor, 0.3), draws_at(model, processor, 1.0)]
    write_text(model, processor, max_new_tokens=2, do_sample=True, temperature=0.7, top_k=3)
    write_text(model, processor)
    again = in_force(folder, model, processor, pipe)
    return {"first": first, "draws": draws, "again": again, "draws_again": draws_at(model, processor, 0.3)}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from remote_code_child import PackageBlocker

    sys.meta_path.insert(0, PackageBlocker())
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    results = look(folder, model, processor, pipe)
    results["module"] = type(model).__module__
    results["pipeline_draws_at"] = draws_at(pipe.vision_language_model, pipe.processor, 0.3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
