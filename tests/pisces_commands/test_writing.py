"""Claims about `pisces_commands.writing`: whole or nothing under every kind of failure, and errors that name the file."""

import errno
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pisces_commands import writing
from pisces_commands.writing import (
    WriteError,
    append_line,
    held_output,
    scratch_folder,
    whole_files,
    whole_folder,
    write_json,
    write_whole,
)


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def half_then(error):
    def write(path):
        path.write_text("ha")
        raise error

    return write


@pytest.fixture(params=["with locks", "as on Windows"])
def locks(request, monkeypatch):
    if request.param == "as on Windows":
        monkeypatch.setattr(writing, "fcntl", None)


# ---- a file


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_text("new")])
def test_bytes_text_and_functions_are_written_and_nothing_else_is_left(content, locks, tmp_path):
    path = write_whole(tmp_path / "a" / "b.txt", content)
    assert path.read_text() == "new" and names_in(tmp_path) == ["a", "a/b.txt"]


def test_text_is_utf8_with_plain_line_ends_and_json_ends_in_one(tmp_path):
    write_json(tmp_path / "x.json", {"word": "Ü"})
    assert (tmp_path / "x.json").read_bytes() == '{\n "word": "Ü"\n}\n'.encode()


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_is_raised_while_writing_the_old_file_stays_and_no_other(error, locks, tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(type(error)):
        write_whole(tmp_path / "x.txt", half_then(error))
    assert (tmp_path / "x.txt").read_text() == "old" and names_in(tmp_path) == ["x.txt"]


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)
def test_a_full_disk_names_the_file_and_what_to_do(error, locks, tmp_path):
    with pytest.raises(WriteError) as stop:
        write_whole(tmp_path / "x.bin", half_then(error))
    expected = f"{tmp_path / 'x.bin'}: cannot be written (No space left on device). Free some space and run again."
    assert str(stop.value) == expected and stop.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


def test_a_disk_that_is_full_only_when_it_is_synced_leaves_nothing(monkeypatch, tmp_path):
    def full(descriptor):
        raise NO_SPACE

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"x\.txt: cannot be written \(No space left on device\)"):
        write_whole(tmp_path / "x.txt", "new")
    assert names_in(tmp_path) == []


def test_an_error_about_a_file_that_was_read_keeps_its_own_words(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "locked").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "x.txt", lambda part: part.write_bytes((tmp_path / "other" / "locked").read_bytes()))
    assert names_in(tmp_path) == ["other", "other/locked"]


def test_a_full_disk_while_copying_names_the_copy_and_not_its_source(tmp_path):
    (tmp_path / "source").write_text("x")
    with pytest.raises(WriteError, match=r"copy: cannot be written"):
        write_whole(
            tmp_path / "deep" / "copy",
            half_then(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "source"))),
        )


def test_what_is_in_the_way_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"this is a folder\. Give the name of a file to write"):
        write_whole(tmp_path, "new")
    with pytest.raises(
        WriteError, match=r"x\.txt: cannot be written \((File exists|Not a directory)\)\. Choose anoth"
    ):
        write_whole(tmp_path / "file" / "x.txt", "new")


@pytest.mark.skipif(os.name == "nt", reason="permission bits")
def test_permissions_are_those_that_open_gives_and_an_old_files_own(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", partial(save_file, {"a": torch.zeros(2)}))  # safetensors' own: 0600
        (tmp_path / "old").write_text("x")
        (tmp_path / "old").chmod(0o604)
        write_whole(tmp_path / "old", "y")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [0o640, 0o604]
    assert torch.equal(load_file(tmp_path / "new")["a"], torch.zeros(2))


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no /dev/null")
def test_a_device_is_written_to_and_stays_one():
    write_whole("/dev/null", "new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_pictures_are_found_by_their_ending_and_long_names_fit(locks, tmp_path):
    path = tmp_path / ("ü" * 120 + ".png")
    write_whole(path, Image.new("RGB", (4, 4), "red").save)
    assert Image.open(path).format == "PNG"


def exchanged(part, text):
    """Write as safetensors does: another file takes the place of the one that was asked for."""
    own = part.with_name(".own")
    own.write_text(text)
    own.replace(part)


def test_many_writers_of_one_file_never_mix(locks, tmp_path):
    texts = [str(number) * 50_000 for number in range(8)]
    fill = [lambda part, text=text: exchanged(part, text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(write_whole, tmp_path / "x.txt", content, False) for content in [*texts, *fill] * 4]
    assert all(done.result() for done in written)
    assert (tmp_path / "x.txt").read_text() in texts and names_in(tmp_path) == ["x.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pisces_commands.writing import write_whole

def half(path):
    path.write_text("ha")
    os.kill(os.getpid(), signal.SIGKILL)

write_whole(Path(sys.argv[1]), half)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x.txt")], cwd=Path(__file__).parents[2])
    assert (tmp_path / "x.txt").read_text() == "old" and names_in(tmp_path) == [
        ".x.partial",
        ".x.partial/x.txt",
        "x.txt",
    ]
    write_whole(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "new" and names_in(tmp_path) == ["x.txt"]


# ---- a log


class HalfFile:
    """A file that takes half of what it is given, then is full."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise NO_SPACE


def test_no_half_line_stays_in_a_log_and_the_error_names_it(monkeypatch, tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, json.dumps({"first": "Ü"}, ensure_ascii=False))
    monkeypatch.setattr(writing, "open", HalfFile, raising=False)
    for path in (log, tmp_path / "new.jsonl"):
        with pytest.raises(WriteError, match=rf"{path.name}: cannot be written .*Free some space and run again"):
            append_line(path, json.dumps({"second": 2}))
    assert log.read_text(encoding="utf-8") == '{"first": "Ü"}\n' and names_in(tmp_path) == ["log.jsonl"]


# ---- folders


def test_a_folder_is_there_when_its_block_ends_and_two_writers_do_not_meet(locks, tmp_path):
    output = tmp_path / "out"
    with whole_folder(output) as folder:
        (folder / "x.txt").write_text("new")
        assert not output.exists()
        with pytest.raises(ValueError, match=r"out: another process is writing it just now\. Wait for it, or stop it"):
            with whole_folder(output):
                pass
    assert names_in(tmp_path) == ["out", "out/x.txt"]


def test_a_folder_in_another_process_is_refused_too(locks, tmp_path):
    code = "import sys; from pisces_commands import writing as w\n"
    code += "" if writing.fcntl else "w.fcntl = None\n"
    code += "with w.whole_folder(sys.argv[1]): pass"
    with whole_folder(tmp_path / "out"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1 and "another process is writing it just now" in done.stderr
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_a_failed_folder_leaves_the_earlier_one(error, locks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(type(error)), whole_folder(tmp_path / "out") as folder:
        (folder / "x.txt").write_text("new")
        raise error
    assert names_in(tmp_path) == ["out", "out/old.txt"]


def test_a_full_disk_in_a_folder_names_the_folder_and_other_errors_keep_their_words(tmp_path):
    for error in (NO_SPACE, SafetensorError("Error while serializing: I/O error: ... (os error 28)")):
        with pytest.raises(WriteError, match=r"out: cannot be written \(No space left on device\)\. Free some space"):
            with whole_folder(tmp_path / "out"):
                raise error
    with pytest.raises(WriteError, match=r"^\S*out: cannot be written"), whole_folder(tmp_path / "out") as folder:
        write_whole(folder / "x.txt", half_then(NO_SPACE))
    for error in (FileNotFoundError(2, "No such file", "part"), SafetensorError("header too small")):
        with pytest.raises(type(error), match=r"No such file|header"), whole_folder(tmp_path / "out"):
            raise error
    assert names_in(tmp_path) == []


def test_a_scratch_folder_is_empty_gone_afterwards_and_held_by_one(locks, tmp_path):
    (tmp_path / ".mine.scratch.partial" / "left").mkdir(parents=True)  # by a kill
    with scratch_folder(tmp_path / "mine") as folder:
        assert folder.parent == tmp_path and not list(folder.iterdir())
        (folder / "x").write_text("x")
        with pytest.raises(ValueError, match=r"mine: another process is writing it just now"):
            with scratch_folder(tmp_path / "mine"):
                pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), scratch_folder(tmp_path / "mine"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_output_that_runs_go_on_with_has_one_writer_and_errors_keep_their_words(locks, tmp_path):
    (tmp_path / "out").mkdir()
    with held_output(tmp_path / "out"):
        with (
            pytest.raises(ValueError, match=r"out: another process is writing it just now"),
            held_output(tmp_path / "out"),
        ):
            pass
    assert names_in(tmp_path) == ["out"]
    with pytest.raises(OSError, match=r"No space left on device$"), held_output(tmp_path / "out"):
        raise NO_SPACE
    with held_output(tmp_path / "nowhere" / "out"):  # nobody writes there yet
        pass
    assert names_in(tmp_path) == ["out"]


def test_what_a_kill_left_in_an_output_that_runs_go_on_with_is_taken_away(tmp_path):
    for name in ("out/.rows-3.partial", "out/images/.7.partial", "out/.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half").write_text("x")
    with held_output(tmp_path / "out"):
        assert names_in(tmp_path / "out") == [".partial", ".partial/half", "images"]  # the last one is no file's


def test_files_of_a_folder_that_holds_others_appear_together(locks, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), whole_files(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        raise RuntimeError("stop")
    assert (tmp_path / "config.json").read_text() == "old"
    with whole_files(tmp_path) as folder:
        (folder / "vae").mkdir()
        for name in ("config.json", "vae/x.json"):
            (folder / name).write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["checkpoint-1", "config.json", "vae", "vae/x.json"]
    assert (tmp_path / "config.json").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="permission bits")
def test_weights_in_a_folder_are_as_readable_as_the_folder(tmp_path):
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "out") as folder:
            save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644
