"""`pisces embed` and `pisces search`: what is found, what an index says of itself, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from modeling_pisces.console import many, search_index
from modeling_pisces.console.search_index import SearchIndex, search_exact, write_index
from tests.checkpoint_folder import write_checkpoint
from tests.fixtures import make_model
from tests.modeling_pisces.console.test_many import lines, run, tree


NUM_PICTURES = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("diffusers")
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_PICTURES):
        noise = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def index(capsys, tmp_path, checkpoint, pictures):
    output = tmp_path / "index"
    code, out, err = run(capsys, "embed", pictures, "--output", output, "--model", checkpoint, "--rows_per_shard", "3")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{output}: 7 results in 3 of 3 shards",
        "index: 7 pictures, gen_grid, 48 numbers each",
    ]
    return output


def search(capsys, index, *flags):
    code, out, err = run(capsys, "search", index, *flags, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)["results"]


# ---- what is found


def test_a_picture_finds_itself_first_also_when_it_was_saved_again(capsys, tmp_path, index, pictures):
    again = tmp_path / "again.jpg"
    Image.open(pictures / "4.png").save(again, quality=90)
    results = search(capsys, index, "--image", pictures / "2.png", "--image", again, "--top", "3")
    assert [result["hits"][0]["image"] for result in results] == ["2.png", "4.png"]
    assert results[0]["hits"][0]["score"] > 0.999 and results[0]["hits"][0]["id"] == "2"
    for result in results:
        scores = [hit["score"] for hit in result["hits"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_words_find_what_the_model_would_draw_for_them(capsys, index, checkpoint):
    from pathlib import Path

    from modeling_pisces.checkpoint.loading import load_model
    from modeling_pisces.console.embedding import embed_texts

    result = search(capsys, index, "--text", "a red circle", "--top", "9")[0]
    query = embed_texts(*load_model(Path(checkpoint), "cpu"), ["a red circle"])
    scores = np.asarray(SearchIndex(index).vectors, np.float32) @ query[0]
    assert [hit["row"] for hit in result["hits"]] == np.argsort(-scores).tolist()  # 9 were asked for, 7 are there
    assert result["hits"][0]["score"] == pytest.approx(scores.max(), abs=1e-4)


def test_results_are_lines_of_query_score_and_picture(capsys, index, pictures):
    code, out, _ = run(capsys, "search", index, "--image", pictures / "2.png", "--text", "a\nstar", "--top", "1")
    first, second = (line.split("\t") for line in out.splitlines())
    assert code == 0 and [first[0], first[2]] == [str(pictures / "2.png"), "2.png"] and second[0] == "a star"
    assert float(first[1]) == pytest.approx(1, abs=1e-3)  # float16


def test_the_index_says_who_made_it_and_is_memory_mapped(index, checkpoint):
    found = SearchIndex(index)
    assert found.head["model"]["name"] == checkpoint and len(found.head["model"]["digest"]) == 16
    assert (found.kind, len(found), found.head["errors"]) == ("gen_grid", NUM_PICTURES, 0)
    assert isinstance(found.vectors, np.memmap) and found.vectors.dtype == np.float16
    assert np.allclose(np.linalg.norm(np.asarray(found.vectors, np.float32), axis=1), 1, atol=2e-3)


def test_a_picture_that_cannot_be_read_is_told_and_left_out(capsys, tmp_path, checkpoint, pictures):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((pictures / name).read_bytes())
    (folder / "0b.png").write_bytes(b"nothing")
    code, out, err = run(capsys, "embed", folder, "--output", tmp_path / "index", "--model", checkpoint)
    assert code == 1 and "2 results" in out and "pisces: error: 0b: 0b.png: " in err and err.count("\n") == 1
    assert SearchIndex(tmp_path / "index").head["errors"] == 1
    hits = search(capsys, tmp_path / "index", "--image", folder / "1.png")[0]["hits"]
    assert [hit["image"] for hit in hits] == ["1.png", "0.png"]  # rows follow what was embedded


# ---- stopping and repeating


def test_a_stopped_run_has_no_index_and_goes_on(capsys, tmp_path, checkpoint, pictures, index, monkeypatch):
    flags = ["embed", pictures, "--model", checkpoint, "--rows_per_shard", "3", "--output", tmp_path / "two"]
    assert run(capsys, *flags, "--shard", "1/2")[0] == 0
    code, _, err = run(capsys, "search", tmp_path / "two", "--text", "x")
    assert code == 2 and "not finished; run pisces embed again" in err and err.count("\n") == 1
    assert run(capsys, *flags)[0] == 0
    assert tree(tmp_path / "two") == tree(index)
    monkeypatch.setattr(many, "work_on", lambda *_: pytest.fail("a shard was made again"))
    monkeypatch.setattr(search_index, "write_whole", lambda *_: pytest.fail("the index was written again"))
    assert run(capsys, *flags)[0] == 0


def test_new_pictures_join_the_index_and_the_old_files_of_it_go(capsys, tmp_path, checkpoint, pictures):
    folder = tmp_path / "raw"
    folder.mkdir()
    flags = ["embed", folder, "--model", checkpoint, "--rows_per_shard", "2", "--output", tmp_path / "index"]
    for count in (3, 5):
        for number in range(count):
            target = folder / f"{number}.png"
            if not target.exists():
                target.write_bytes((pictures / target.name).read_bytes())
        assert run(capsys, *flags)[0] == 0
        assert len(SearchIndex(tmp_path / "index")) == count
        assert len(list((tmp_path / "index").glob("vectors-*"))) == 1
    assert len(lines(tmp_path / "index")) == 5


# ---- what is refused


def test_another_model_than_that_of_the_index_is_refused_and_a_copy_is_not(capsys, tmp_path, index, checkpoint):
    other = write_checkpoint(tmp_path / "other")
    make_model(seed=1, gen_head_type="flow").save_pretrained(other)
    code, _, err = run(capsys, "search", index, "--text", "x", "--model", other)
    assert code == 2 and err.count("\n") == 1
    assert "was made by" in err and "is another model" in err and "cannot be compared" in err
    copy = write_checkpoint(tmp_path / "copy")
    assert run(capsys, "search", index, "--text", "x", "--model", copy)[0] == 0
    code, _, err = run(capsys, "embed", tmp_path, "--output", index, "--model", other, "--rows_per_shard", "3")
    assert code == 2 and "holds the results of another job (model:" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to look for. Give --image FILE, --text WORDS"),
        (["--text", "x", "--top", "0"], "argument --top: '0': expected a whole number of at least 1"),
        (["--image", "gone.png"], "gone.png"),
        (["--text", "x", "--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_query_that_cannot_be_is_one_line(capsys, index, flags, words):
    code, out, err = run(capsys, "search", index, *flags)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_kinds_that_know_no_words_say_so(capsys, tmp_path, checkpoint, pictures):
    flags = ["embed", pictures, "--output", tmp_path / "index", "--model", checkpoint, "--kind"]
    assert run(capsys, *flags, "tower")[0] == 0
    code, _, err = run(capsys, "search", tmp_path / "index", "--text", "x")
    assert code == 2 and "of kind 'tower', which know pictures only" in err
    code, _, err = run(capsys, *flags, "clip")
    assert code == 2 and "embedding kind 'clip' is not known" in err


def test_what_is_no_index_or_damaged_is_refused(capsys, tmp_path, index, checkpoint):
    for folder, words in ((tmp_path / "gone", "no index there"), (tmp_path, "no index there")):
        code, _, err = run(capsys, "search", folder, "--text", "x")
        assert code == 2 and words in err and "pisces embed DATA --output INDEX" in err and err.count("\n") == 1
    vectors = next(index.glob("vectors-*"))
    vectors.write_bytes(vectors.read_bytes()[:-7])
    code, _, err = run(capsys, "search", index, "--text", "x")
    assert code == 2 and "this index cannot be read" in err and err.count("\n") == 1
    (index / "index.json").write_text("[]")
    assert run(capsys, "search", index, "--text", "x")[0] == 2


def test_an_index_of_nothing_is_not_made(capsys, tmp_path, checkpoint):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(b"nothing")
    code, _, err = run(capsys, "embed", tmp_path / "raw", "--output", tmp_path / "index", "--model", checkpoint)
    assert code == 2 and "no picture could be embedded, so there is no index" in err and "a: a.png: " in err
    assert not (tmp_path / "index" / "index.json").exists()


# ---- exact and approximate


def unit_rows(count, width, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [1, 7, 50, 10_000])
def test_blocks_find_what_one_sort_finds(block, monkeypatch):
    vectors, queries = unit_rows(50, 8).astype(np.float16), unit_rows(5, 8, 1)
    vectors[30:40] = vectors[3]  # equal scores: the smaller row first
    monkeypatch.setattr(search_index, "BLOCK_VALUES", block * 8)
    for query, (rows, scores) in zip(queries, search_exact(vectors, queries, 20), strict=True):
        wanted = vectors.astype(np.float32) @ query
        assert rows.tolist() == np.lexsort((np.arange(50), -wanted.round(6)))[:20].tolist()
        assert np.allclose(scores, wanted[rows], atol=1e-6)


def test_fewer_rows_than_asked_for_are_all_of_them():
    assert [len(rows) for rows, _ in search_exact(unit_rows(3, 4), unit_rows(2, 4, 1), 10)] == [3, 3]


def write_random(folder, count, graph=False):
    folder.mkdir(exist_ok=True)
    np.save(folder / "part.npy", unit_rows(count, 16).astype(np.float16))
    rows = [{"id": str(number)} for number in range(count)]
    about = {"model": {"name": "m", "digest": "d"}, "kind": "gen_grid"}
    return write_index(folder, "key", about, [(folder / "part.npy", rows)], graph)


def test_a_part_with_too_few_vectors_is_refused_by_name(tmp_path):
    np.save(tmp_path / "part.npy", unit_rows(3, 4).astype(np.float16))
    with pytest.raises(ValueError, match=r"part\.npy: this shard cannot be read .* 4 pictures"):
        write_index(tmp_path, "key", {}, [(tmp_path / "part.npy", [{"id": "x"}] * 4)], False)


def test_queries_of_another_width_are_refused(tmp_path):
    write_random(tmp_path, 5)
    with pytest.raises(ValueError, match="queries are 8 wide, this index 16"):
        SearchIndex(tmp_path).search(unit_rows(1, 8), 3)


def test_the_graph_finds_what_exact_search_finds_with_the_same_scores(tmp_path):
    pytest.importorskip("usearch")
    write_random(tmp_path, 3000, graph=True)
    index, queries = SearchIndex(tmp_path), unit_rows(20, 16, 1)
    assert index.graph is not None
    near, exact = index.search(queries, 10), index.search(queries, 10, approximate=False)
    shared = sum(len({hit.row for hit in a} & {hit.row for hit in b}) for a, b in zip(near, exact, strict=True))
    assert shared >= 190  # of 200; 199 measured with usearch 2.26
    assert all(a[0] == b[0] for a, b in zip(near, exact, strict=True))


def test_without_usearch_the_graph_says_how_to_get_it(capsys, tmp_path, index, pictures, checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    code, _, err = run(capsys, "embed", pictures, "--output", tmp_path / "o", "--model", checkpoint, "--approximate")
    assert code == 2 and "pip install 'modeling-pisces[search]'" in err and err.count("\n") == 1
    head = json.loads((index / "index.json").read_text())
    head["files"]["graph"] = "nearest.usearch"
    (index / "index.json").write_text(json.dumps(head))
    code, _, err = run(capsys, "search", index, "--text", "x")
    assert code == 2 and "or search with --exact" in err
    assert run(capsys, "search", index, "--text", "x", "--exact")[0] == 0
