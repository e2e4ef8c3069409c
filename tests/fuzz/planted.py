"""Checkpoint folders with something planted in them, for `tests/fuzz/checkpoint.py`.

`PLANTED` names what to do to a folder, and whether it has to be refused (True), has to answer as before (False), or
either (None). Beside the folder lies a file `secret` that nothing may open.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


CODE = "import os\nos.system('touch planted')\nclass Planted:\n    from_pretrained = os.system\n"


class _Pickle:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch planted",))


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Settings of a JSON file, added or replaced; the file is made where it is not there."""

    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return apply


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def both(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for step in steps:
            step(folder)

    return apply


def replace(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else under the name of a file, in a folder that is made if needed."""

    def apply(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)

    return apply


def gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def code(*files: str) -> Callable[[Path], None]:
    return both(*(write(file, CODE) for file in files))


def template(text: str) -> Callable[[Path], None]:
    return write("chat_template.jinja", text)


def setting(file: str, *path: str | int, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return apply


def move_out(file: str, index: str, reference: str) -> Callable[[Path], None]:
    """Weights beside the folder, and an index that points there."""

    def apply(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / file, framework="pt") as weights:
            names = list(weights.keys())
        target = folder.parent / "outside.safetensors"
        shutil.move(folder / file, target)
        name = str(target) if reference == "absolute" else reference
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))

    return apply


def torch_pickle(path: Path) -> None:
    """A zip as `torch.save` writes them, with a pickle that runs a program."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(_Pickle()))
        file.writestr("archive/version", "3\n")


PICKLE = pickle.dumps(_Pickle())
MODEL = "model.safetensors"
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
HUGE_HEADER = (2**40).to_bytes(8, "little") + b"{}"
DIGITS = "7" * 5000

_TEMPLATES: dict[str, tuple[str, bool | None]] = {
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", True),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch planted') }}", True),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('touch planted').read() }}", True),
    "request": ("{{ messages.__class__.__base__ }}", True),
    "attribute filter": ("{{ messages|attr('__class__') }}", None),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", True),
    "format map": ("{{ '{m.__class__}'.format_map({'m': messages}) }}", True),
    "change": ("{{ messages.append(messages) }}{{ messages.clear() }}", True),
    "include": ("{% include '../../secret' %}", True),
    "import": ("{% import '/etc/passwd' as x %}{{ x }}", True),
    "extends": ("{% extends '/etc/passwd' %}", True),
    "loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", True),
    "range": ("{{ range(10 ** 12)|list }}", True),
    "doubling": (
        "{% set ns = namespace(t='aaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        True,
    ),
    "times": ("{{ 'a' * 10 ** 11 }}", True),
    "list times": ("{{ ([0] * 10 ** 10)|length }}", True),
    "power": ("{{ 9 ** 9 ** 9 }}", True),
    "centre": ("{{ 'a'.center(10 ** 11) }}", True),
    "padding": ("{{ '%099999999999d' % 1 }}", True),
    "long": ("{{ 'a' * 9000000 }}", True),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", True),
    "raise": ("{{ raise_exception('no') }}", True),
    "syntax": ("{% if %}", True),
    "undefined": ("{{ x.y.z }}", True),
    "divide": ("{{ 1 / 0 }}", True),
    "nothing": ("", True),
    "bytes": ("\x00\x01", True),
}

PLANTED: dict[str, tuple[Callable[[Path], Any], bool | None]] = {
    # pickles
    "pickles beside": (
        both(
            *(
                write(f, PICKLE)
                for f in (
                    "pytorch_model.bin",
                    "model.bin",
                    "training_args.bin",
                    "unet/diffusion_pytorch_model.bin",
                    "vae/diffusion_pytorch_model.bin",
                    "tokenizer.pkl",
                    "adapter_model.bin",
                )
            )
        ),
        False,
    ),
    "pickle instead of the model": (both(gone(MODEL), replace("pytorch_model.bin", torch_pickle)), True),
    "pickle instead of the unet": (both(gone(UNET), replace("unet/diffusion_pytorch_model.bin", torch_pickle)), True),
    "pickle instead of the vae": (both(gone(VAE), write("vae/diffusion_pytorch_model.bin", PICKLE)), True),
    "pickle under the name of safetensors": (replace(MODEL, torch_pickle), True),
    "pickle as the unet": (write(UNET, PICKLE), True),
    "pickle index": (
        both(
            gone(MODEL),
            write("pytorch_model.bin", PICKLE),
            edit("pytorch_model.bin.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"}),
        ),
        True,
    ),
    "pickle as a shard": (
        both(
            gone(MODEL),
            write("pytorch_model.bin", PICKLE),
            edit("model.safetensors.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"}),
        ),
        True,
    ),
    "a huge header": (write(MODEL, HUGE_HEADER), True),
    "a header of lists": (write(MODEL, (2).to_bytes(8, "little") + b"[]"), True),
    "a header of text offsets": (
        write(
            MODEL,
            (71).to_bytes(8, "little") + b'{"lm_head.weight":{"dtype":"F32","shape":[1],"data_offsets":["a","b"]}}',
        ),
        True,
    ),
    # code
    **{
        f"auto_map of {file}": (
            both(
                code("planted.py", "configuration_pisces.py", "modeling_pisces.py", "processing_pisces.py"),
                edit(
                    file,
                    auto_map=dict.fromkeys(
                        (
                            "AutoConfig",
                            "AutoModel",
                            "AutoModelForMultimodalLM",
                            "AutoProcessor",
                            "AutoTokenizer",
                            "AutoImageProcessor",
                        ),
                        "planted.Planted",
                    ),
                ),
            ),
            False,
        )
        for file in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json")
    },
    "auto_map to another repository": (
        edit(
            "config.json",
            auto_map={
                "AutoConfig": "someone/else--planted.Planted",
                "AutoModelForMultimodalLM": "someone/else--planted.Planted",
            },
        ),
        None,
    ),
    "auto_map of a tower": (
        both(
            code("planted.py"),
            setting("config.json", "vision_config", "auto_map", value={"AutoModel": "planted.Planted"}),
        ),
        None,
    ),
    "auto_map and a type of its own": (
        both(
            code("planted.py"), edit("config.json", model_type="planted", auto_map={"AutoConfig": "planted.Planted"})
        ),
        True,
    ),
    "text config of a type of its own": (
        both(
            code("planted.py"),
            setting(
                "config.json",
                "text_config",
                value={"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted"}},
            ),
        ),
        True,
    ),
    "image processor of its own": (
        both(
            code("planted.py"),
            setting(
                "processor_config.json", "image_processor", "auto_map", value={"AutoImageProcessor": "planted.Planted"}
            ),
        ),
        None,
    ),
    "modules of the libraries beside": (
        code("torch.py", "json.py", "transformers.py", "sitecustomize.py", "unet/unet.py"),
        False,
    ),
    "custom generation": (code("custom_generate/generate.py"), False),
    "pipeline of its own": (
        both(code("pipeline_planted.py"), edit("model_index.json", _class_name=["pipeline_planted", "Planted"])),
        None,
    ),
    **{
        f"{part} is {module}.{name}": (
            both(code(f"{part}/planted.py", "planted.py"), edit("model_index.json", **{part: [module, name]})),
            True,
        )
        for part in ("unet", "scheduler", "vae")
        for module, name in (
            *(("planted", "Planted"), ("os", "system"), ("subprocess", "Popen"), ("builtins", "eval")),
            *(("antigravity", "x"), ("transformers", "pipeline"), ("diffusers", "DiffusionPipeline")),
        )
    },
    **{
        f"another part {module}.{name}": (
            both(code(f"more/{module}.py"), edit("model_index.json", more=[module, name])),
            None,
        )
        for module, name in (("planted", "Planted"), ("os", "system"), ("antigravity", "x"))
    },
    "a guard of pictures": (
        edit("model_index.json", safety_checker=["os", "system"], feature_extractor=["subprocess", "Popen"]),
        None,
    ),
    "unet of a class": (edit("unet/config.json", _class_name="os.system"), None),
    "scheduler of a class": (edit("scheduler/scheduler_config.json", _class_name="system"), None),
    "antigravity as a class of processors": (edit("processor_config.json", processor_class="antigravity"), None),
    "tokenizer of a class": (edit("tokenizer_config.json", tokenizer_class="antigravity.Planted"), None),
    "image processor of a class": (
        setting("processor_config.json", "image_processor", "image_processor_type", value="../../planted"),
        True,
    ),
    "dtype of a module": (edit("config.json", dtype="os.system"), True),
    "architecture of a module": (edit("config.json", architectures=["os.system"]), None),
    # the Hub
    "name of another repository": (
        edit("config.json", _name_or_path="someone/else", name_or_path="someone/else"),
        None,
    ),
    "tokenizer of another repository": (
        edit("tokenizer_config.json", name_or_path="someone/else", tokenizer_file="someone/else"),
        None,
    ),
    "tokenizer file outside": (
        edit("tokenizer_config.json", tokenizer_file="../../secret", vocab_file="../../secret"),
        None,
    ),
    "audio tokenizer": (
        edit(
            "processor_config.json",
            audio_tokenizer={"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "someone/else"},
        ),
        None,
    ),
    "kernel": (edit("config.json", attn_implementation="someone/kernel"), True),
    "kernel of a tower": (
        setting("config.json", "vision_config", "_attn_implementation", value="someone/kernel@main:fast"),
        True,
    ),
    "kernels": (edit("config.json", use_kernels=True, kernel_config={"RMSNorm": "someone/kernel:Norm"}), None),
    "kernel of the unet": (
        edit("unet/config.json", attn_processor="someone/kernel", attention_backend="someone/kernel"),
        None,
    ),
    "weights elsewhere": (edit("config.json", transformers_weights="../../secret"), True),
    "an adapter beside": (edit("adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA"), True),
    "quantized by what is not here": (
        edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        True,
    ),
    "quantized unet": (
        edit("unet/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        None,
    ),
    "assistant of another repository": (
        edit("generation_config.json", assistant_model="someone/else", custom_generate="someone/else"),
        None,
    ),
    "constraint": (
        edit("generation_config.json", constraints=["x"], stop_strings=["a"], watermarking_config={"bias": "x"}),
        None,
    ),
    "cache by name": (edit("generation_config.json", cache_implementation="someone/cache"), None),
    "compiled": (edit("generation_config.json", compile_config={"backend": "planted", "fullgraph": True}), None),
    "beams": (edit("generation_config.json", num_beams=10**6), None),
    "long answers": (edit("generation_config.json", max_new_tokens=10**9, min_new_tokens=10**9), None),
    "penalty": (edit("generation_config.json", repetition_penalty=-1.0, temperature=-1.0, do_sample=True), None),
    # outside
    **{
        f"index of {file} to {reference}": (move_out(file, index, reference), True)
        for file, index in (
            (MODEL, "model.safetensors.index.json"),
            (UNET, "unet/diffusion_pytorch_model.safetensors.index.json"),
        )
        for reference in (
            "../outside.safetensors",
            "../../planted/outside.safetensors",
            "absolute",
            "./../outside.safetensors",
        )
    },
    "template links outside": (replace("chat_template.jinja", lambda path: path.symlink_to("../../secret")), True),
    "config links outside": (replace("config.json", lambda path: path.symlink_to("../../secret")), True),
    "words link outside": (replace("known_words.txt", lambda path: path.symlink_to("../../secret")), True),
    "more templates": (write("additional_chat_templates/more.jinja", "{{ 'x' }}"), False),
    "more templates outside": (
        replace("additional_chat_templates/more.jinja", lambda path: path.symlink_to("../../../secret")),
        True,
    ),
    # what never ends
    **{
        f"a pipe as {file}": (replace(file, os.mkfifo), None)
        for file in (
            *("config.json", "notes.json", "known_words.txt", "special_tokens_map.json", "preprocessor_config.json"),
            *("vocab.json", "merges.txt", "tokenizer.model", "README.md", "unet/notes.json", "scheduler/x.json"),
            *("custom_generate/generate.py", "video_preprocessor_config.json", "vae/config.json", "pytorch_model.bin"),
            *("additional_chat_templates/a.jinja", "more/config.json", "chat_template.json", "added_tokens.json"),
        )
    },
    "endless words": (replace("known_words.txt", lambda path: path.symlink_to("/dev/zero")), True),
    "a long number": (write("notes.json", '{"a": ' + DIGITS + "}"), None),
    "a long number in the index": (write("model.safetensors.index.json", '{"weight_map": ' + DIGITS + "}"), True),
    "a long number in the config": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json")
            .read_text()
            .replace('"model_type": "pisces"', f'"model_type": "pisces", "n": {DIGITS}')
        ),
        True,
    ),
    "deep brackets": (write("notes.json", "[" * 100_000), None),
    "deep objects in a tower": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json")
            .read_text()
            .replace('"gen_pool_stride"', '"x": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "gen_pool_stride"')
        ),
        None,
    ),
    "many layers": (setting("config.json", "text_config", "num_hidden_layers", value=10**7), True),
    "many blocks of the unet": (edit("unet/config.json", layers_per_block=10**7), True),
    "a wide vocabulary": (setting("config.json", "text_config", "vocab_size", value=10**12), True),
    "regular expression": (
        setting(
            "tokenizer.json",
            "pre_tokenizer",
            value={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        ),
        None,
    ),
    "many added tokens": (
        lambda folder: edit("added_tokens.json", **{f"<{number}>": 320 + number for number in range(50_000)})(folder),
        None,
    ),
    "large pictures": (edit("processor_config.json", num_image_tokens=10**9), True),
    "processor of large pictures": (
        setting("processor_config.json", "image_processor", "size", value={"height": 10**6, "width": 10**6}),
        True,
    ),
    "many steps": (edit("model_index.json", default_num_inference_steps=10**9), None),
    "size of the decoder": (edit("unet/config.json", sample_size=10**6), None),
    **{f"template: {name}": (template(text), must) for name, (text, must) in _TEMPLATES.items()},
    **{
        f"template in the tokenizer: {name}": (
            both(gone("chat_template.jinja"), edit("tokenizer_config.json", chat_template=_TEMPLATES[name][0])),
            True,
        )
        for name in ("globals", "loop", "include")
    },
    "template by name": (
        both(
            gone("chat_template.jinja"),
            edit("processor_config.json", chat_template={"default": "x", "evil": "{{ 1 / 0 }}"}),
        ),
        None,
    ),
}
