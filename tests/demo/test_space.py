"""`pisces space`: a folder that is a Space by its card, starts by itself, and is whole or not there."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import RepoCard, SpaceHardware

from pisces_commands.console import main
from pisces_demo import space
from pisces_demo.space import requirements, write_space
from tests.checkpoint_folder import write_checkpoint


pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
LABELS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # colours that the Hub takes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "my-pisces")


@pytest.fixture
def adapter(tmp_path):
    """The files that make a folder an adapter; their weights are never read here."""
    from safetensors.torch import save_file
    from torch import zeros

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"a": zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "checkpoint-3").mkdir()  # of the run that made it
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["space", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def card_of(folder):
    return RepoCard.load(folder / "README.md").data.to_dict()


def settings_of(folder):
    """The two names that app.py sets, read and not run."""
    tree = ast.parse((folder / "app.py").read_text(encoding="utf-8"))
    return {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def test_the_card_says_what_a_space_needs(checkpoint, tmp_path, capsys):
    code, out, err = run(capsys, tmp_path / "page", "--model", checkpoint)
    assert (code, out.strip(), err) == (0, str(tmp_path / "page"), "")
    card = card_of(tmp_path / "page")
    assert card["title"] == "Pisces: my-pisces" and len(card["emoji"]) == 1
    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", space.GRADIO, "app.py")
    assert card["license"] == "apache-2.0" and card["python_version"] == "3.12"
    assert card["suggested_hardware"] == "cpu-basic" in [hardware.value for hardware in SpaceHardware]
    assert {card["colorFrom"], card["colorTo"]} <= LABELS and len(card["short_description"]) <= 60
    assert "models" not in card  # it is in the folder, not on the Hub


def test_the_gradio_of_the_card_is_the_tested_one():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={space.GRADIO}" in pins


def test_a_checkpoint_that_lies_here_travels_with_the_code_and_nothing_else_does(checkpoint, tmp_path):
    folder = write_space(tmp_path / "page", str(checkpoint))
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "app.py",
        "requirements.txt",
        ".gitattributes",
        "model",
        *space.PACKAGES,
    }
    for name in ("config.json", "model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (folder / "model" / name).read_bytes() == (checkpoint / name).read_bytes()
    for package in space.PACKAGES:
        ours = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert {path.relative_to(folder) for path in (folder / package).rglob("*.py")} == ours
    assert not [path for path in folder.rglob("*") if "__pycache__" in path.name]
    assert settings_of(folder)["MODEL"] == "str(HERE / 'model')"


def test_what_is_on_the_hub_is_named_and_not_copied(tmp_path, capsys):
    names = ["--model", "me/my-pisces", "--adapter", "me/my-adapter"]
    code, out, _ = run(capsys, tmp_path / "page", *names, "--title", "Mine: 'all' \"quoted\"", "--json")
    assert code == 0 and json.loads(out) == {"command": "space", "path": str(tmp_path / "page")}
    card, settings = card_of(tmp_path / "page"), settings_of(tmp_path / "page")
    assert card["models"] == ["me/my-pisces", "me/my-adapter"] and card["suggested_hardware"] == "zero-a10g"
    assert card["title"] == "Mine: 'all' \"quoted\""
    assert (settings["MODEL"], settings["ADAPTERS"]) == ("'me/my-pisces'", "['me/my-adapter']")
    assert not (tmp_path / "page" / "model").exists()


def test_adapters_that_lie_here_travel_without_the_steps_of_their_runs(checkpoint, adapter, tmp_path):
    folder = write_space(tmp_path / "page", str(checkpoint), [str(adapter), "me/other"])
    assert settings_of(folder)["ADAPTERS"] == "[str(HERE / 'adapters/0_mine'), 'me/other']"
    assert {path.name for path in (folder / "adapters/0_mine").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert card_of(folder)["models"] == ["me/other"]


def test_the_space_installs_what_is_installed_here(checkpoint, tmp_path):
    folder = write_space(tmp_path / "page", str(checkpoint))
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == requirements()
    assert f"transformers=={version('transformers')}" in lines
    assert f"torch=={version('torch').partition('+')[0]}" in lines  # an index has no build of that name
    assert not any(line.startswith(("gradio", "pillow")) for line in lines)  # the Space's own gradio decides


def test_the_model_is_loaded_after_spaces_and_each_call_asks_for_a_gpu(checkpoint, tmp_path):
    source = (write_space(tmp_path / "page", str(checkpoint)) / "app.py").read_text(encoding="utf-8")
    first = next(node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import spaces"
    assert "on_gpu=spaces.GPU" in source


REFUSED = {
    "no such folder. Give a checkpoint folder or a Hub id like owner/name.": lambda t, c, a: [
        t / "new",
        "--model",
        "nowhere",
    ],
    "is an adapter. Give both: --model BASE --adapter": lambda t, c, a: [t / "new", "--model", a],
    "is there and not empty. Give a new folder.": lambda t, c, a: [t, "--model", c],
    "expected one line of 1 to 100 characters.": lambda t, c, a: [t / "new", "--model", c, "--title", "a\nb"],
    "a whole checkpoint: give it with --model": lambda t, c, a: [t / "new", "--model", c, "--adapter", c],
    "--hardware 'huge': expected one of cpu-basic": lambda t, c, a: [t / "new", "--model", c, "--hardware", "huge"],
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_become_a_space_is_refused_in_one_line_and_leaves_nothing(
    says, tmp_path, checkpoint, adapter, capsys
):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *REFUSED[says](tmp_path, checkpoint, adapter))
    assert code == 2 and out == ""
    assert err.startswith("pisces: error: ") and says in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_space_that_cannot_be_written_whole_is_not_there(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(space, "_readme", full)
    with pytest.raises(OSError):
        write_space(tmp_path / "page", str(checkpoint))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_that_is_there_already_is_filled(checkpoint, tmp_path):
    (tmp_path / "page").mkdir()
    assert (write_space(tmp_path / "page", str(checkpoint)) / "app.py").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", ["pisces-tiny"])
def test_the_written_folder_starts_and_draws_without_this_repository(source, tmp_path):
    """`python app.py` in a process that does not have this project, as on a Space."""
    if not find_spec("gradio") or not find_spec("spaces"):
        pytest.skip("needs gradio and spaces: make test-web")
    from gradio_client import Client

    folder = write_space(tmp_path / "page", str(ROOT / source))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": "", "PYTHONSAFEPATH": ""}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(1500):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}").read()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0][-2000:]
                time.sleep(0.3)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path))
        gallery, status = client.predict("a red circle", 1, 7, 6, 1, api_name="/draw")
        assert status.startswith("1 picture, seed 7, in ")
        from PIL import Image

        red, green, blue = Image.open(gallery[0]["image"]).convert("RGB").getpixel((32, 32))
        assert red > 150 and green < 90 and blue < 90
    finally:
        process.kill()
        said = process.communicate()[0]
    assert "loaded pisces-tiny, 7.4 million parameters, on cpu" in said
    shutil.rmtree(folder)
