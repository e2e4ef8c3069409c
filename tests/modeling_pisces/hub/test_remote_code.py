"""An exported folder works where the package is not installed: same text, vectors and pictures, bit for bit.

One process does everything for one source, because importing the libraries costs more than all the rest. It runs
`tests/remote_code_child.py` isolated, in an empty directory, with the import of the package blocked.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("diffusers")

from modeling_pisces import PiscesForConditionalGeneration, PiscesProcessor
from modeling_pisces.hub.export import push_folder
from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.hub_folders import write_export, write_picture
from tests.hub_server import HubServer
from tests.remote_code_child import compute


pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's own call of httpx
REPO_ID = "someone/pisces-random"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder `export` and a picture beside it."""
    place = tmp_path_factory.mktemp("remote_code")
    write_export(place / "export")
    write_picture(place / "picture.png")
    return place


@pytest.fixture(scope="module")
def expected(place):
    """What the installed package makes of the same folder."""
    folder = place / "export"
    pipe = PiscesPipeline.from_pretrained(folder)
    model = PiscesForConditionalGeneration.from_pretrained(folder)
    results = compute(model, PiscesProcessor.from_pretrained(folder), pipe, str(place / "picture.png"))
    return results | {"state": model.state_dict()}


def run_child(source: str, place: Path, work: Path, **env) -> dict:
    """Run the child for one source and return its results; its standard output and errors are in the failure."""
    work.mkdir()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
    }
    env = kept | {"HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules"), **env}
    child = Path(__file__).parents[2] / "remote_code_child.py"
    command = [sys.executable, "-I", child, source, place / "picture.png", work, torch.get_num_threads()]
    done = subprocess.run(
        [str(part) for part in command], cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(work / "results.pt", weights_only=True) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def from_folder(place):
    return run_child(str(place / "export"), place, place / "from_folder", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def from_hub(place, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        push_folder(place / "export", REPO_ID, token="none")
        return run_child(REPO_ID, place, place / "from_hub", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")


@pytest.fixture(params=["from_folder", "from_hub"])
def results(request):
    return request.getfixturevalue(request.param)


def assert_same(found: dict, expected: dict):
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name], name


def test_the_package_cannot_be_imported_there(results):
    assert results["import"] == "No module named 'modeling_pisces'"


def test_every_class_comes_from_the_folder(results):
    modules = ["configuration", "modeling", "processing", "modeling", "modeling", "pipeline", "modeling", "processing"]
    for found, module in zip(results["classes"], modules, strict=True):
        library = "diffusers_modules" if module == "pipeline" else "transformers_modules"
        assert found.startswith(f"{library}.") and f".{module}_pisces." in found


def test_without_trust_nothing_runs(results):
    assert "trust_remote_code=True" in results["untrusted"]


def test_text_vectors_and_pictures_are_those_of_the_package(results, expected):
    assert_same(results["first"], expected)
    assert results["first"]["vectors"].std() > 0 and results["first"]["drawn"].std() > 0


def test_every_weight_arrives_in_every_class(results, expected):
    for state in results["states"]:
        assert list(state) == list(expected["state"])
        assert_same(state, expected["state"])
    assert_same({f"model.{name}": value for name, value in results["backbone"].items()}, expected["state"])


def test_loading_is_complete_and_quiet(results):
    for report in results["reports"]:
        assert not any(report.values()), report
    assert "LOAD REPORT" not in results["stderr"]


def test_what_remote_code_saves_loads_again_with_the_same_outputs(results):
    assert {"modeling_pisces.py", "processing_pisces.py", "configuration_pisces.py"} <= set(results["again_files"])
    assert_same(results["second"], results["first"])
