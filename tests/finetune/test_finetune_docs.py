"""The walk through docs/finetune.md, from pictures to a pushed adapter: its own commands, at toy size."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from finetune import check_data, lora_generation
from pisces_commands import console
from tests.finetune.lora_fixtures import make_picture
from tests.hub_server import HubServer


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
WALK = PAGE[PAGE.index("## Fifty pictures") : PAGE.index("## Four recipes")]
COMMANDS = {"finetune.check_data": check_data.main, "finetune.lora_generation": lora_generation.main}
TOY = ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "True", "--disable_tqdm", "True"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pisces-tiny").symlink_to(ROOT / "pisces-tiny")
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    captions = ["file_name,caption"]
    for number in range(1, 6):
        make_picture(number).resize((64, 64)).save(pictures / f"{number:03}.png")
        captions.append(f"{number:03}.png,a green moon above a red square")
    (pictures / "metadata.csv").write_text("\n".join(captions) + "\n")
    return tmp_path


def run_command(line: str):
    python, dash_m, module, *arguments = shlex.split(line)
    assert (python, dash_m) == ("python", "-m")
    return COMMANDS[module](arguments + (TOY if "lora" in module else []))


def test_the_walk_from_pictures_to_a_pushed_adapter(folder, monkeypatch, capsys):
    check, dry_run, train, push = re.findall(r"```bash\n(.*?)\n```", WALK, flags=re.S)
    assert run_command(check) == 0 and (folder / "look.png").stat().st_size > 0
    assert "5 of your pictures encoded and decoded: PSNR" in capsys.readouterr().out
    assert run_command(dry_run) is None and not (folder / "runs").exists()
    assert "5 (5 generation)" in capsys.readouterr().out
    run_command(train)
    table = re.findall(r"^\| (`.*?) \|", WALK, flags=re.M)
    for name in re.findall(r"`([^`]+)`", " ".join(table)):
        assert list((folder / "runs/mine").glob(name)), f"{name} of the page's table is not in the folder"

    (use,) = re.findall(r"```python\n(.*?)```", WALK, flags=re.S)
    (folder / "use.py").write_text(use)
    runpy.run_path(str(folder / "use.py"))
    assert (folder / "moon.png").stat().st_size > 0

    record = (folder / "runs/mine/run.yaml").read_bytes()
    assert run_command(train) is None  # finished: trained once, not twice
    monkeypatch.setenv("HF_TOKEN", "none")
    with HubServer() as hub:
        hub.redirect(monkeypatch)
        words = shlex.split(push)
        assert words[0] == "pisces" and console.main(words[1:]) == 0
        files = hub.commits("me/my-pictures")[-1].files
    assert (folder / "runs/mine/run.yaml").read_bytes() == record
    assert files["adapter_model.safetensors"] == (folder / "runs/mine/adapter_model.safetensors").read_bytes()
    assert b"base_model: me/pisces-tiny" in files["README.md"]
