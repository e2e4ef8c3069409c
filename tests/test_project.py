"""The project's own rules: what the wheel holds, who imports whom, what may stand in a file, what the README says."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from modeling_pisces.hub.export import code_files


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_pisces"
ROOMS = (
    "modeling_pisces",
    "pisces_demo",
    "conversion",
    "finetune",
    "evaluation",
    "benchmarks",
    "demo",
    "examples",
    "curation",
    "pisces_serving",
)
OPEN_TO = {"demo": {"pisces_demo"}}  # beside modeling_pisces: its door, since the wheel carries the page for Spaces
LEAVES = ("benchmarks",)  # may import every room, and nobody imports them
GROUND = "pisces_commands"  # what every room's commands are made of; in the wheel, imports without torch
# what code that the Hub carries may import at the top: the loader refuses to run where anything else is missing
HUB_IMPORTS = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "safetensors", "tokenizers", "filelock"}
DIFFUSERS_FILES = ("pipeline_", "decoder_")  # reached from the pipeline only
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".jinja", ".cfg", ""}


def project_files():
    """The files that git knows or would add; all but the ignored ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def python_files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path, top_level_only=False):
    """Names of absolutely imported modules; optionally only those that importing the file needs in any case."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.Try | ast.If)] if top_level_only else []
    optional = {id(inner) for outer in guarded for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def read_toml():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ---- rooms


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in LEAVES])
def test_rooms_never_import_each_other(room):
    others = {other for other in ROOMS if other not in (room, "modeling_pisces")} - OPEN_TO.get(room, set()) | {
        "tests"
    }
    for path in python_files(room):
        wrong = others & {name.split(".")[0] for name in imported_modules(path)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: rooms meet through folders on disk"


# What a folder may import of its own room, from the ground up.
FLOORS = {
    "finetune": {
        "flags": set(),
        "data": {"flags"},
        "guard": {"data", "flags"},
        "training": {"data", "flags", "guard"},
        "preferences": {"data", "flags", "guard", "training"},
        "scenes": set(),
        "tiny": set(),
        "parts": {"data", "flags", "scenes", "training"},
        "scratch": {"data", "flags", "parts"},
    },
    "conversion": {
        "storage": set(),
        "assembly": {"storage"},
        "formats": {"assembly", "storage"},
        "checks": {"assembly", "storage"},
    },
    "curation": {
        "rules": set(),
        "shards": set(),
        "records": {"rules", "shards"},
        "models": {"records", "rules", "shards"},
        "stages": {"models", "records", "rules", "shards"},
    },
    "evaluation": {
        "runs": set(),
        "report": {"runs"},
        "drawing": {"runs"},
        "scenes": {"runs"},
        "understanding": {"runs"},
        "study": {"report", "runs", "scenes"},
        "lmms_eval_plugin": set(),
    },
}
# commands that are steps of another command
COMMANDS_IN_COMMANDS = {
    "finetune.rejection_sampling": {"finetune.best_of_n", "finetune.lora_generation"},
    "finetune.train_stages": {"finetune.precompute"},
    "finetune.from_scratch": {"finetune.train_stages"},
}


def imports_inside(room, path):
    """What a file imports of its own room: names of its folders, and of commands at its door."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith(f"{room}."))


def doors(room):
    return sorted(path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("room", FLOORS)
def test_folders_of_a_room_import_in_one_direction_and_never_a_command(room):
    folders = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    assert folders == set(FLOORS[room]) - {"lmms_eval_plugin"}
    for folder, below in FLOORS[room].items():
        for path in python_files(f"{room}/{folder}"):
            # `python -m room.folder` is a command, it only lives in a folder
            wrong = set(imports_inside(room, path)) - below - {folder}
            assert path.name == "__main__.py" or not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", FLOORS)
def test_a_command_imports_another_one_only_by_the_written_list(room):
    commands = {path.stem for path in doors(room)}
    for path in doors(room):
        found = {f"{room}.{name}" for name in set(imports_inside(room, path)) & commands - {path.stem}}
        assert found <= COMMANDS_IN_COMMANDS.get(f"{room}.{path.stem}", set()), path.name


@pytest.mark.parametrize("room", FLOORS)
def test_what_stands_at_the_door_of_a_room_is_a_command(room):
    for path in doors(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        assert "main" in functions and runs, f"{path.relative_to(ROOT)}: library code belongs into a folder"


DOORS = ("finetune.data", "finetune.training")
TRY_DOORS = """
import importlib, sys
doors = [importlib.import_module(name) for name in sys.argv[1:]]
heavy = {"torch", "transformers", "trl", "datasets", "peft"} & set(sys.modules)
assert not heavy, heavy  # a module behind a door stays as light as it is
for door in doors:
    for name in door.__all__:
        assert getattr(door, name).__module__.startswith(door.__name__), name
"""


def test_a_door_has_every_name_that_it_promises_and_loads_none_before_it_is_asked():
    done = subprocess.run([sys.executable, "-c", TRY_DOORS, *DOORS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_documents_import_from_the_doors_alone():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        if path.name not in ("CHANGELOG.md", "log.md"):  # history keeps the names of its time
            behind = re.findall(rf"from (?:{'|'.join(DOORS)})\.\w+ import", path.read_text(encoding="utf-8"))
            assert not behind, f"{path.relative_to(ROOT)}: {behind}"


def test_no_folder_is_a_drawer():
    for room in (GROUND, *ROOMS):
        for folder in {path.parent for path in python_files(room)}:
            files = [path.name for path in folder.glob("*.py")]
            assert len(files) <= 16, f"{folder.relative_to(ROOT)} holds {len(files)} files; give it folders"


def test_the_ground_imports_no_room():
    for path in python_files(GROUND):
        rooms = {name.split(".")[0] for name in imported_modules(path)} & set(ROOMS)
        # the console hands over to what its commands do, when one of them runs; `serve` brings its own flags
        assert rooms <= (
            {"modeling_pisces", "pisces_demo", "pisces_serving"} if path.name == "console.py" else set()
        ), path


def test_what_an_export_carries_is_flat_and_imports_its_siblings_by_name():
    carried = code_files(with_decoder=True)
    assert {path.parent for path in carried} == {PACKAGE}, "sub-packages do not travel to the Hub"
    assert carried == sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / "__init__.py"}), (
        "a file beside __init__.py travels; others belong into a folder"
    )
    assert len(carried) <= 13, "a reader of an exported folder meets all of them: give new code a home in one"
    for path in carried:
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\s*(from\s+\.\S*|import\s+\.|from\s+modeling_pisces\b)", line)
            is_plain = match is None or re.match(r"\s*from \.\w+ import ", line)
            assert is_plain or ">>>" in line, (
                f"{path.name}: {line.strip()!r}; the Hub's loader follows only `from .name import X`"
            )


def test_the_package_needs_only_what_the_hub_loader_may_assume():
    allowed = HUB_IMPORTS | set(sys.stdlib_module_names) | {GROUND}
    carried = code_files(with_decoder=True)
    for path in python_files("modeling_pisces"):
        if path in carried:
            assert GROUND not in {name.split(".")[0] for name in imported_modules(path)}, f"{path} travels without it"
        known = allowed | ({"diffusers"} if path.name.startswith(DIFFUSERS_FILES) else set())
        wrong = {name for name in imported_modules(path, top_level_only=True) if name.split(".")[0] not in known}
        assert not wrong, f"{path.name} needs {wrong}; guard it with try, or keep it out of the package"


IMPORT_ALL = """
import importlib, pkgutil, sys
import torch, transformers, diffusers, peft, trl, datasets  # only this project is on trial
from diffusers import AutoencoderKL, DiffusionPipeline
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import of it fails, as on Windows
count = 0
for room in sys.argv[1:]:
    for found in pkgutil.walk_packages([room], f"{room}."):
        if found.name.rpartition(".")[2] != "__main__" and "lmms_eval_plugin" not in found.name:
            importlib.import_module(found.name)
            count += 1
print(count)
"""


def test_every_module_of_every_room_imports_where_the_system_is_windows():
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, GROUND, *ROOMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 150


def test_files_are_written_in_one_place():
    """Results of commands go through `pisces_commands.writing`; what stands here writes inside a folder of it, or a log."""
    inside = {  # each of them is given a folder that appears whole
        "modeling_pisces/hub/export.py",
        "modeling_pisces/pipeline_pisces.py",
        "pisces_demo/space.py",
        "pisces_commands/writing.py",
        "finetune/parts/assemble.py",
        "finetune/parts/captioned.py",
        "evaluation/study/steps.py",  # the log of a step
        "evaluation/understanding/harness.py",  # logs of the harness
        "benchmarks/assemble.py",  # in a temporary folder
        "examples/emoji/make_data.py",
        "benchmarks/curation.py",  # in a temporary folder
        "benchmarks/material/curation_faults.py",  # in that folder
        "benchmarks/real_parts.py",  # in its work folder
        "benchmarks/look.py",  # in a whole folder
        "benchmarks/search.py",  # in a folder for its index
        "examples/emoji/judge_network.py",
    }
    writing = re.compile(
        r"write_text\(|write_bytes\(|open\(\"[wax]|, \"[wax]b?\"|json\.dump\(|savefig\(path|\.save\((path|folder)"
    )
    for room in (GROUND, "modeling_pisces", "pisces_demo", "finetune", "evaluation", "benchmarks", "demo", "examples"):
        for path in python_files(room):
            if (name := path.relative_to(ROOT).as_posix()) not in inside:
                found = writing.findall(path.read_text(encoding="utf-8"))
                assert not found, f"{name} writes with {found}: take pisces_commands.writing"


def test_a_head_is_asked_what_it_does_and_its_names_stand_in_one_table():
    from modeling_pisces import PiscesConfig
    from modeling_pisces.modeling_pisces_heads import GEN_HEADS

    assert set(GEN_HEADS) == set(get_args(inspect.get_annotations(PiscesConfig)["gen_head_type"]))
    own = {PACKAGE / "modeling_pisces_heads.py", PACKAGE / "configuration_pisces.py"}
    asks = re.compile(r"gen_head_type\b[^=\n]{0,3}(?:==|!=|\bin\b)|\"mlp\", \"linear\"")
    for room in ROOMS:
        for path in set(python_files(room)) - own:
            found = asks.findall(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found}; ask gen_head.is_stochastic, offer GEN_HEADS"


def test_nothing_imports_torchvision():
    for room in (GROUND, *ROOMS, "tests"):
        for path in python_files(room):
            assert not any(name.split(".")[0] == "torchvision" for name in imported_modules(path)), path


def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, modeling_pisces; print('diffusers' in sys.modules, 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("room", [GROUND, *ROOMS, "tests"])
def test_every_module_opens_with_what_lives_in_it(room):
    for path in python_files(room):
        source = path.read_text(encoding="utf-8")
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no opening paragraph"


# ---- what may stand in a file


def test_no_file_names_a_machine():
    """Paths and hosts of one machine mean nothing to the next reader."""
    words = ["/work" + "/", "/opt" + "/venv", "/opt" + "/pypi", "/opt" + "/wheels", "/root" + "/", "/home" + "/"]
    words += ["download.pytorch" + ".org", "pypi" + ".org/simple", "extra-index" + "-url"]
    for path in project_files():
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 2**20:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [word for word in words if word in text]
        assert not found, f"{path.relative_to(ROOT)} contains {found}"


def test_checkpoint_fits_in_a_git_repository():
    folder = ROOT / "pisces-tiny"
    if not folder.is_dir():
        pytest.skip("pisces-tiny is not in this checkout")
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert num_bytes <= 30 * 2**20, f"pisces-tiny has {num_bytes / 2**20:.1f} MiB, the limit is 30"


# ---- frame


def test_versions_agree():
    import modeling_pisces

    project = read_toml()["project"]
    assert project["version"] == modeling_pisces.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tested_versions_lie_inside_the_ranges():
    project = read_toml()["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text)
        for text in [*project["dependencies"], *(line for list_ in extras.values() for line in list_)]
    ]
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    ]
    for requirement in wanted:
        if requirement.name == "modeling-pisces":
            continue
        versions = [next(iter(pin.specifier)).version for pin in pins if pin.name.lower() == requirement.name.lower()]
        assert versions, f"constraints.txt does not pin {requirement.name}"
        for version in versions:
            assert version in requirement.specifier, (
                f"{requirement.name}=={version} is outside {requirement.specifier}"
            )


def test_the_project_names_the_pythons_it_is_for():
    project = read_toml()["project"]
    named = [line.rpartition(" :: ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named == ["3.10", "3.11", "3.12", "3.13", "3.14"] and project["requires-python"] == ">=3.10"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_python_has_one_tested_version_of_each_package(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    valid = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(set(valid)) == len(valid), f"two versions for Python {python}"
    assert set(valid) == {pin.name for pin in pins}, f"no version for Python {python}"


def test_commands_of_the_documents_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert target in targets, f"{name}: make {target}"


def test_files_that_the_readme_links_to_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), f"README.md links to {link}"


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_holds_only_the_package_and_works_in_an_empty_environment(tmp_path):
    """Installed next to nothing but its dependencies, whose folder the new environment borrows from this one."""
    run = lambda *command: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # noqa: E731
    source = tmp_path / "source"  # a copy: building leaves folders beside what it builds
    for name in ("modeling_pisces", "pisces_demo", GROUND, "pisces_serving"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "pisces_vllm_plugin.py"):
        shutil.copy(ROOT / name, source)
    for name in ("finetune", "tests"):  # what must not get in
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source))
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "modeling_pisces",
        "pisces_demo",
        GROUND,
        "pisces_serving",
        "pisces_vllm_plugin.py",
    }

    assert run(sys.executable, "-m", "venv", "empty").returncode == 0
    python = tmp_path / "empty" / "bin" / "python"
    installed = run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr
    site = next((tmp_path / "empty").rglob("site-packages"))
    import torch

    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    code = "import modeling_pisces; print(modeling_pisces.__file__)"
    imported = run(str(python), "-c", code)
    assert imported.stdout.startswith(str(site)), imported.stdout + imported.stderr
    code = (
        "from importlib.metadata import entry_points as e; import sys; (p,) = e(group='vllm.general_plugins', name='pisces'); "
        "p.load()(); print('torch' in sys.modules, 'modeling_pisces' in sys.modules)"
    )
    plugin = run(str(python), "-c", code)
    assert plugin.stdout.split() == ["False", "False"], plugin.stdout + plugin.stderr
    command = run(str(tmp_path / "empty" / "bin" / "pisces"), "info", "nowhere")
    assert command.returncode == 2 and command.stderr.startswith("pisces: error: nowhere: no such folder")
