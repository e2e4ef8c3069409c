"""vLLM's Transformers backend, read from the source that `make test-vllm` downloads: its questions, and its code.

Nothing of vLLM is installed or kept in this repository. `questions` reads which attributes the backend asks our
objects for; `imported_backend` runs its two files that talk to model and processor, with stand-ins for the rest of
vLLM (schedulers, kernels, distribution), which is not needed for what is asked here.
"""

import ast
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


ROOT = Path(__file__).resolve().parents[2]
BACKEND = "vllm.model_executor.models.transformers"
FILES = ("base", "causal", "multimodal", "utils")  # what stands between vLLM and a model with pictures

# what an expression in the backend's source stands for
_SUBJECTS = {
    "self.model": "model",
    "model": "model",
    "self.config": "config",
    "config": "config",
    "self.text_config": "text config",
    "text_config": "text config",
    "processor": "processor",
    "hf_processor": "processor",
    "self.get_hf_processor()": "processor",
    "self.info.get_hf_processor()": "processor",
    "self.get_hf_processor().image_processor": "image processor",
    "sub_processor": "image processor",
    "tokenizer": "tokenizer",
}


def find_source() -> Path | None:
    """The unpacked source: $PISCES_VLLM_SOURCE, or the newest that `make test-vllm` has left; None without one."""
    named = os.environ.get("PISCES_VLLM_SOURCE")
    folders = [Path(named)] if named else sorted((ROOT / ".venv-vllm").glob("vllm-*/"))
    return folders[-1] if folders and (folders[-1] / "vllm" / "model_executor").is_dir() else None


def backend_file(source: Path, name: str) -> Path:
    return source / BACKEND.replace(".", "/") / f"{name}.py"


# ---- questions


def questions(source: Path) -> set[tuple[str, tuple[str, ...], bool]]:
    """(subject, names of which one has to be there, whether its absence is provided for), from all files."""
    found = set()
    for name in FILES:
        tree = ast.parse(backend_file(source, name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found |= set(_asked_by(node))
    return found


def _asked_by(node: ast.AST) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        subject = _SUBJECTS.get(ast.unparse(node.value))
        if subject:
            yield subject, (node.attr,), False
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2):
        return
    subject, names = _SUBJECTS.get(ast.unparse(node.args[0])), _names(node.args[1])
    if subject is None or not names:
        return
    if node.func.id == "getattr":
        yield subject, names, len(node.args) > 2
    elif node.func.id in ("hasattr", "getattr_iter"):
        yield subject, names, node.func.id == "hasattr" or len(node.args) > 2 or bool(node.keywords)


def _names(node: ast.expr) -> tuple[str, ...]:
    """The names in a literal, a tuple of them, or an f-string whose one gap is the modality; () where there are none."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "image" for part in node.values]
        return ("".join(parts),)
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ()
    return (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ()


def keywords_of_calls(source: Path) -> set[tuple[str, str]]:
    """(what is called, keyword), for calls of a subject itself or of its methods; "model" and "model.get_encoder"."""
    found = set()
    for name in FILES:
        for node in ast.walk(ast.parse(backend_file(source, name).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            callee = _SUBJECTS.get(ast.unparse(node.func))
            if callee is None and isinstance(node.func, ast.Attribute):
                subject = _SUBJECTS.get(ast.unparse(node.func.value))
                callee = subject and f"{subject}.{node.func.attr}"
            if callee:
                found |= {(callee, keyword.arg) for keyword in node.keywords if keyword.arg}
    return found


# ---- running it


class _AnyName(type):
    """The type of stand-in classes: whatever is asked of the class is there."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{cls.__name__}.{name}")

    def __getitem__(cls, item: Any) -> type:
        return cls


class _StandIn(ModuleType):
    """A module of vLLM that is not run: names in capitals and small letters are classes, all others take any call."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[0].isupper() and not name.isupper()
        value = _AnyName(name, (), {}) if is_class else MagicMock(name=name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, source: Path):
        self.source = source

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "vllm":
            return None
        package, _, last = name.rpartition(".")
        if package == BACKEND and last in FILES:
            return importlib.util.spec_from_file_location(name, backend_file(self.source, last))
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def _first_attribute(obj: Any, names: tuple[str, ...], default: Any = None) -> Any:
    return next((getattr(obj, name) for name in names if hasattr(obj, name)), default)


@contextmanager
def imported_backend(source: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The backend's modules `base` and `multimodal`; afterwards no trace of them or of the stand-ins is left."""
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}
    finder = _Finder(source)
    sys.meta_path.insert(0, finder)
    try:
        # what is looked at when it comes back
        importlib.import_module("vllm.multimodal.parse").ImageSize = namedtuple("ImageSize", "width height")
        importlib.import_module("vllm.config.utils").getattr_iter = _first_attribute
        importlib.import_module("vllm.utils.gpu_sync_debug").gpu_sync_allowed = nullcontext
        importlib.import_module("vllm.multimodal.processing").cached_encode = lambda tokenizer, text, **options: (
            tokenizer.encode(text, **options)
        )
        yield importlib.import_module(f"{BACKEND}.base"), importlib.import_module(f"{BACKEND}.multimodal")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(others)
