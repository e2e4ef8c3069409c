"""What `test_remote_code.py` runs in a process where the package cannot be imported.

`python remote_code_child.py SOURCE PICTURE WORK NUM_THREADS`: SOURCE is a folder or a Hub id. Writes what it computed
to WORK/results.pt and what it saved again to WORK/again. `compute` is also what the parent runs with the package.
"""

import sys
import warnings
from pathlib import Path

import torch


class PackageBlocker:
    """Makes `import modeling_pisces` fail, also where the repository is installed in the environment."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_pisces":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def compute(model, processor, pipe, picture: str) -> dict:
    """Text about a picture, vectors for a prompt, and a drawing."""
    for module in (model, pipe.unet, pipe.vae, pipe.vision_language_model):
        realign(module)
    shown = {"type": "image", "path": picture}
    question = [{"role": "user", "content": [shown, {"type": "text", "text": "what is it?"}]}]
    wish = [{"role": "user", "content": [{"type": "text", "text": "a red cube"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(question, **options)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    wish = processor.apply_chat_template(wish, generation_mode="image", **options)
    generator = torch.Generator().manual_seed(3)
    vectors = model.generate(**wish, generation_mode="image", generator=generator)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red cube", generator=torch.Generator().manual_seed(4), output_type="pt").images
    again = pipe.reconstruct(picture, generator=torch.Generator().manual_seed(5), output_type="pt").images
    results = {"pixel_values": inputs["pixel_values"], "ids": ids, "answer": answer, "vectors": vectors}
    return results | {"drawn": drawn, "reconstructed": again}


def realign(module) -> None:
    """Move the weights to fresh memory: in a mapped file their alignment, and with it the last bits, depends on the
    other tensors of the file (measured: 1e-6 between two shardings of equal weights, 0 after this)."""
    for tensor in module.parameters():
        tensor.data = tensor.data.clone()


def load(source: str):
    """Model and processor through the Auto classes, with the folder's own code."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model, report = AutoModelForMultimodalLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    return model, AutoProcessor.from_pretrained(source, trust_remote_code=True), report


def refusal(function) -> str:
    """The message of the error that a call raises."""
    try:
        function()
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"


def main(source: str, picture: str, work: str, num_threads: str) -> None:
    sys.meta_path.insert(0, PackageBlocker())
    torch.set_num_threads(int(num_threads))
    warnings.simplefilter("always")
    from diffusers import DiffusionPipeline
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    results = {}
    try:
        import modeling_pisces  # noqa: F401
    except ModuleNotFoundError as error:
        results["import"] = str(error)
    results["untrusted"] = refusal(lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model, processor, report = load(source)
    backbone, backbone_report = AutoModel.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    captioner = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)

    results["reports"] = [
        {key: sorted(map(str, value)) for key, value in r.items()} for r in (report, backbone_report)
    ]
    objects = [config, model, processor, backbone, captioner, pipe, pipe.vision_language_model, pipe.processor]
    results["classes"] = [f"{type(item).__module__}.{type(item).__name__}" for item in objects]
    results["config"] = config.to_dict()
    results["first"] = compute(model, processor, pipe, picture)
    results["states"] = [model.state_dict(), captioner.state_dict(), pipe.vision_language_model.state_dict()]
    results["backbone"] = backbone.state_dict()

    again = Path(work) / "again"
    model.save_pretrained(again, max_shard_size="30KB")
    processor.save_pretrained(again)
    results["again_files"] = sorted(path.name for path in again.iterdir())
    model, processor, report = load(str(again))
    results["reports"].append({key: sorted(map(str, value)) for key, value in report.items()})
    results["states"].append(model.state_dict())
    pipe.save_pretrained(again)
    pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
    results["second"] = compute(model, processor, pipe, picture)
    torch.save(results, Path(work) / "results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
