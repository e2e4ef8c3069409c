"""Records for inference: prompts alone, names of pictures, and files that need no pyarrow.

What can be wrong with a record is tried in tests/curation/test_records.py.
"""

import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from modeling_pisces.records.reading import read_input
from modeling_pisces.records.shapes import to_sample
from modeling_pisces.records.sources import plan_inputs, sources_of
from modeling_pisces.records.tar import tar_bytes


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def read(tmp_path, data, **options):
    sources = sources_of([str(data)])
    count = plan_inputs(tmp_path / "plan", sources, 2, head="inputs.json")
    assert json.loads((tmp_path / "plan" / "inputs.json").read_text())["num_shards"] == count
    files = sorted((tmp_path / "plan" / "input").iterdir())
    return [sample for file in files for sample in read_input(sources, file, **options)]


def test_a_prompt_without_a_picture_is_a_record_where_words_alone_are_wanted():
    assert "neither a picture nor a conversation" in to_sample({"prompt": "a star"}, "x", "y").problem
    found = to_sample({"prompt": "a star"}, "x", "y", words_alone=True)
    assert found.problem is None and found.captions == ["a star"]
    assert to_sample({"other": 1}, "x", "y", words_alone=True).problem


def test_prompts_of_lines_tables_and_tar_files_are_read_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jsonl").write_text('{"id": "1", "prompt": "a"}\n{"prompt": "b"}\n\n{"prompt": "c"}\n')
    (tmp_path / "b.csv").write_text("id,prompt\n1,a\n2,b\n")
    (tmp_path / "c.tar").write_bytes(tar_bytes([("1.json", b'{"prompt": "a"}'), ("2.txt", b"b")]))
    for name, words in (("a.jsonl", "abc"), ("b.csv", "ab"), ("c.tar", "ab")):
        assert [sample.captions for sample in read(tmp_path, tmp_path / name, words_alone=True)] == [
            [w] for w in words
        ]
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"d\.parquet: Parquet needs pyarrow .*pip install 'modeling-pisces\[curation"
    ):
        read(tmp_path, tmp_path / "d.parquet")


def test_each_picture_keeps_the_name_that_its_record_has_for_it(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "rows.jsonl").write_text('{"images": ["a.png", "b.png"], "caption": "x"}\n{"image": "gone.png"}\n')
    two, gone = read(tmp_path, tmp_path / "rows.jsonl")
    assert two.names == ["a.png", "b.png"] and gone.names == ["gone.png"]
    assert isinstance(gone.pictures[0], ValueError)
    (tmp_path / "c.tar").write_bytes(
        tar_bytes([("1.jpg", png()), ("1.txt", b"x"), ("2.0.png", png()), ("2.1.png", png())])
    )
    assert [sample.names for sample in read(tmp_path, tmp_path / "c.tar")] == [["1.jpg"], ["2.0.png", "2.1.png"]]


def test_a_table_keeps_the_names_beside_its_bytes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"id": "1", "image": {"bytes": png(), "path": "one.png"}, "caption": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (sample,) = read(tmp_path, tmp_path / "t.parquet")
    assert sample.names == ["one.png"] and isinstance(sample.pictures[0], bytes)


def test_the_same_members_give_the_same_tar_on_any_day(monkeypatch):
    members = [("a.png", png()), ("a.json", b"{}")]
    before = tar_bytes(members)
    monkeypatch.setattr("time.time", lambda: 0)
    assert tar_bytes(members) == before
    with tarfile.open(fileobj=io.BytesIO(before)) as tar:
        assert [(member.name, member.mtime) for member in tar] == [("a.png", 0), ("a.json", 0)]
