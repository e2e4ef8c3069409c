"""Every example of docs/data.md is written, loaded and run."""

import re
from pathlib import Path

import pytest
import yaml

from finetune.check_data import main
from finetune.data.formats import FORMATS
from finetune.data.load import load_data
from finetune.data.schema import side_of
from finetune.data.spec import DataSpec
from tests.checkpoint_folder import write_checkpoint
from tests.finetune.data.data_files import picture, prompt, write_pictures, write_tar


TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(?:`([\w./]+)`\n)?```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
FILES = {name: body for name, _, body in BLOCKS if name}


def blocks(language: str) -> list[str]:
    """Code blocks that are no files."""
    return [body for name, found, body in BLOCKS if not name and found == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page, and the pictures, tables and shards that they speak of."""
    import datasets

    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, "cat.png", "dog.png")
    write_pictures(tmp_path / "photos", "cat.png", "dog.png")
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    table = {"image": [{"bytes": picture(), "path": "inside.png"}], "description": ["Miso"]}
    features = datasets.Features({"image": datasets.Image(), "description": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet("table.parquet")
    Path("owner/name").mkdir(parents=True)  # `datasets` reads a folder of that name instead of asking the Hub
    Path("table.parquet").rename("owner/name/train.parquet")
    Path("table.parquet").write_bytes(Path("owner/name/train.parquet").read_bytes())
    for shard in range(2):
        write_tar(Path(f"shards/data-00{shard}.tar"), {"000017.jpg": picture(format="JPEG"), "000017.txt": "Rex"})
    words = {"before": datasets.Image(), "words": datasets.Value("string"), "after": datasets.Image()}
    edit = {"before": [{"bytes": picture()}], "words": ["make it night"], "after": [{"bytes": picture()}]}
    Path("edits").mkdir()
    datasets.Dataset.from_dict(edit, features=datasets.Features(words)).to_parquet("edits/part-0.parquet")
    write_checkpoint(tmp_path / "pisces-tiny")
    return tmp_path


def test_the_page_shows_the_files_that_it_talks_about():
    assert set(FILES) == {
        "photos/metadata.csv",
        "rows.jsonl",
        "captions.jsonl",
        "questions.csv",
        "llava.json",
        "mixture.yaml",
        "edits.yaml",
        "broken.jsonl",
    }


def test_the_page_names_every_key_and_format():
    for name in DataSpec.__dataclass_fields__:
        assert f"`{name}`" in TEXT, name
    for name in ("auto", *FORMATS):
        assert f"`{name}`" in TEXT, name


def test_each_file_gives_the_rows_that_the_page_promises(folder):
    assert [side_of(row) for row in load_data("rows.jsonl")] == ["understanding", "generation", "both", "text"]
    assert [prompt(row) for row in load_data("photos")] == ["a photo of Miso the cat", "a photo of Rex the dog"]
    assert [side_of(row) for row in load_data("captions.jsonl")] == ["generation", "generation"]
    assert [side_of(row) for row in load_data("llava.json")] == ["understanding", "understanding", "generation"]
    assert prompt(load_data("llava.json")[1]) == "and : who is who?"


def test_a_streamed_table_of_edits_is_read_by_its_columns(folder):
    row = next(iter(load_data("edits.yaml")))
    assert side_of(row) == "both" and row["messages"][0]["content"][1]["text"] == "make it night"


def test_each_spec_can_be_loaded(folder):
    specs = [yaml.safe_load(block) for block in blocks("yaml")]
    assert [spec["path"] for spec in specs] == [
        "questions.csv",
        "table.parquet",
        "hf:owner/name",
        "shards/data-{000..001}.tar",
    ]
    prompts = []
    for spec in specs:
        if spec["path"].startswith("hf:"):  # the stand-in for the Hub has the column of table.parquet, and no commits
            spec |= {"columns": {"prompt": "description"}, "revision": None}
        prompts.append(prompt(next(iter(load_data(spec)))))
    assert prompts == ["Who is this?", "Miso", "Miso", "Rex"]


def test_python_of_the_page_runs(folder, capsys):
    for block in blocks("python"):
        exec(block, {})
    size, path, error = capsys.readouterr().out.splitlines()
    assert size == "(8, 6)" and path == str(folder / "cat.png")
    assert error.startswith("broken.jsonl: 2 of 3 records are bad") and "broken.jsonl, line 2: not JSON" in error
    assert "broken.jsonl, line 3: picture 0: '../secret.png' leads out of the data folder" in error


def test_commands_of_the_page_run(folder, capsys):
    commands = [line for block in blocks("") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        words = command.split()
        assert words[:3] == ["python", "-m", "finetune.check_data"]
        assert main(words[3:]) == 0, capsys.readouterr().err
    assert (folder / "preview.png").is_file()
