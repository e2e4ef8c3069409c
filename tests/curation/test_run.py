"""`python -m curation.run` from a folder to a training set, and what happens when it is stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.run import main as run
from curation.shards.index import Index
from finetune.check_data import main as check_data
from tests.curation.curation_fixtures import column_of, encode, photo, tree, write_collection, write_config


ROOT = Path(__file__).parents[2]


@pytest.fixture
def collection(tmp_path):
    """Nine good pictures, and one each of what a collection has besides."""
    pictures = {f"good{n}.png": encode(photo(n)) for n in range(9)}
    pictures["copy.png"] = pictures["good0.png"]
    pictures["again.jpg"] = encode(photo(1), "JPEG", quality=85)
    pictures["cut.png"] = pictures["good2.png"][:900]
    pictures["tiny.png"] = encode(photo(20, (24, 24)))
    return write_collection(tmp_path / "raw", pictures)


def run_there(tmp_path, collection, name="out", *flags, **groups):
    config = write_config(tmp_path / "config.yaml", **groups)
    command = ["--config", str(config), "--data", str(collection), "--output", str(tmp_path / name)]
    return run([*command, "--rows_per_shard", "4", *flags])


def rules_of(folder):
    rows = [row for path in sorted((folder / "index").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: row["rule"] for row in rows}, rows


def test_a_collection_becomes_a_training_set_that_finetune_reads_without_a_flag(tmp_path, collection, capsys):
    assert run_there(tmp_path, collection, "out", "--processes", "1") == 0
    assert "9 of 13 rows exported" in capsys.readouterr().out
    assert check_data(["--data", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["num_rows"] == 9
    assert column_of(tmp_path / "out", "caption") == [f"a picture called good{n}" for n in range(9)]


def test_rejected_rows_are_kept_with_the_rule_the_number_and_the_picture_that_stays(tmp_path, collection):
    run_there(tmp_path, collection, "out", "--processes", "1")
    rules, rows = rules_of(tmp_path / "out")
    dropped = {name: rule for name, rule in rules.items() if rule}
    assert dropped == {"copy": "copy_file", "again": "copy_near", "cut": "unreadable", "tiny": "size"}
    by_id = {row["id"]: row for row in rows}
    assert by_id["copy"]["duplicate_of"] == "good0" and by_id["again"]["duplicate_of"] == "good1"
    assert by_id["tiny"]["detail"] == "short_side 24, kept from at least 32 (pixels)"
    assert "damaged" in by_id["cut"]["detail"]
    assert len(by_id["good3"]["file_sha256"]) == 64 and by_id["good3"]["exported"]


def test_pictures_are_exported_as_the_files_that_they_were(tmp_path, collection):
    run_there(tmp_path, collection, "out", "--processes", "1")
    table = pq.read_table(sorted((tmp_path / "out" / "data").glob("*.parquet"))[0]).to_pylist()
    assert table[0]["image"]["bytes"] == (collection / "good0.png").read_bytes()


def test_tar_shards_are_read_too(tmp_path, collection, capsys):
    assert run_there(tmp_path, collection, "out", "--processes", "1", export={"format": "tar"}) == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3 and not (tmp_path / "out" / "data").exists()
    capsys.readouterr()
    assert check_data(["--data", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["num_rows"] == 9


def test_a_second_run_makes_nothing_again_and_changes_no_byte(tmp_path, collection):
    run_there(tmp_path, collection, "out", "--processes", "1")
    before = tree(tmp_path / "out") | tree(tmp_path / "out.index")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.index" / "scan").iterdir()}
    run_there(tmp_path, collection, "out", "--processes", "1")
    assert tree(tmp_path / "out") | tree(tmp_path / "out.index") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.index" / "scan").iterdir()} == times


def test_another_threshold_makes_new_decisions_but_decodes_nothing_again(tmp_path, collection):
    run_there(tmp_path, collection, "out", "--processes", "1")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.index" / "scan").iterdir()}
    run_there(tmp_path, collection, "out", "--processes", "1", size={"short_side": 16})
    assert rules_of(tmp_path / "out")[0]["tiny"] is None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.index" / "scan").iterdir()} == times
    for stage in ("filter", "dedup"):  # and nothing of the earlier decision stays
        assert len(list((tmp_path / "out.index" / stage).iterdir())) == 4
    assert len(list((tmp_path / "out" / "index").iterdir())) == 4


def test_a_picture_that_changed_is_scanned_again_and_only_its_shard(tmp_path, collection):
    run_there(tmp_path, collection, "out", "--processes", "1")
    before = {path.name for path in (tmp_path / "out.index" / "scan").iterdir()}
    (collection / "good8.png").write_bytes(encode(photo(50)))
    run_there(tmp_path, collection, "out", "--processes", "1")
    after = {path.name for path in (tmp_path / "out.index" / "scan").iterdir()}
    assert len(before & after) == 3 and len(after) == 4


def test_parts_of_the_work_give_the_same_bytes(tmp_path, collection, capsys):
    run_there(tmp_path, collection, "whole", "--processes", "1")
    for _ in range(4):  # as a job array that is repeated: scan, filter, export; parts in any order
        for part in ("1/2", "0/2"):
            assert run_there(tmp_path, collection, "parts", "--processes", "1", "--shard", part) == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert capsys.readouterr().out.count("9 of 13 rows exported") >= 1


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path, collection):
    run_there(tmp_path, collection, "one", "--processes", "1")
    assert run_there(tmp_path, collection, "two", "--processes", "2") == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert tree(tmp_path / "two.index") == tree(tmp_path / "one.index")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    raw = write_collection(tmp_path / "raw", {f"{n:03d}.png": encode(photo(n, (300, 200))) for n in range(60)})
    run_there(tmp_path, raw, "whole", "--processes", "1")
    config, output = tmp_path / "config.yaml", tmp_path / "killed"
    command = [sys.executable, "-m", "curation.run", "--config", config, "--data", raw, "--output", output]
    command += ["--rows_per_shard", "4", "--processes", "1"]
    randoms, kills = random.Random(3), 0
    while kills < 8:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while not output.with_name("killed.index").exists() and process.poll() is None:
            time.sleep(0.01)  # importing libraries is most of a short run, and nothing happens in it
        time.sleep(randoms.random() * 0.5 * (time.monotonic() - started if kills == 0 else 1))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills, "the run was over before it could be killed"
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert tree(output) == tree(tmp_path / "whole")


# ---- what a user can get wrong


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"colour": {}}, "no group 'colour', expected some of scan, dedup"),
        ({"size": {"short": 3}}, "size: no key 'short', expected some of short_side, long_side, aspect"),
        ({"size": {"short_side": "big"}}, "size: short_side: found 'big', expected a number or null"),
        ({"size": 512}, "size: found 512, expected keys short_side, long_side, aspect, or null"),
        ({"dedup": {"bits": 4}}, "dedup: no key 'bits', expected some of cosine"),
        ({"dedup": {"phash_bits": 40}}, "dedup: phash_bits: found 40, expected a whole number from 0 to 16, or null"),
        ({"dedup": {"cosine": 2}}, "dedup: cosine: found 2, expected a number from 0 to 1"),
        ({"dedup": {"crops": 1}}, "dedup: crops: found 1, expected true or false"),
        ({"dedup": {"keep": "best"}}, "dedup: keep: found 'best', expected one of largest, first"),
        ({"export": {"format": "zip"}}, "export: format: found 'zip', expected one of parquet, tar"),
        ({"export": {"keep_short": 2}}, "export: keep_short: found 2, expected a share from 0 to 1"),
        ({"export": {"shards": 2}}, "export: no key 'shards', expected some of format, keep_short, seed"),
        ({"scan": {"max_size": 2}}, "scan: found {'max_size': 2}, expected the key max_pixels"),
    ],
)
def test_a_wrong_configuration_is_one_line_before_anything_is_read(tmp_path, collection, capsys, groups, message):
    assert run_there(tmp_path, collection, "out", "--processes", "1", **groups) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.index").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "2/2"], "--shard '2/2': expected part/parts counted from 0, as 0/16 to 15/16"),
        (["--shard", "first"], "--shard 'first': expected part/parts"),
        (["--address", "auto"], "--address has no effect without --engine ray"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "no*where"], "no*where: nothing fits this pattern"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, collection, capsys, flags, message):
    assert run_there(tmp_path, collection, "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_with_other_things_is_left_alone(tmp_path, collection, capsys):
    for name in ("out", "out.index"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "thesis.txt").write_text("years of work")
        assert run_there(tmp_path, collection, "out", "--processes", "1") == 2
        assert f"{name} is not empty and is no" in capsys.readouterr().err
        (tmp_path / name / "thesis.txt").unlink()


def test_nothing_left_to_train_on_says_which_rule_took_it(tmp_path, collection, capsys):
    assert run_there(tmp_path, collection, "out", "--processes", "1", size={"short_side": 5000}) == 1
    assert "nothing is left to train on (12 size, 1 unreadable)" in capsys.readouterr().err


def test_a_damaged_shard_of_the_index_is_named_with_the_next_step(tmp_path, collection, capsys):
    run_there(tmp_path, collection, "out", "--processes", "1")
    path = Index(tmp_path / "out.index").path("scan", 1)
    path.write_bytes(path.read_bytes()[:100])
    assert run_there(tmp_path, collection, "out", "--processes", "1", size={"short_side": 16}) == 2
    assert "this shard cannot be read" in (error := capsys.readouterr().err)
    assert "Delete it and run the stage again" in error and str(path) in error
