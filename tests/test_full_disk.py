"""Commands on a disk that is full: one line that names a file, no half file, and the same command goes on afterwards.

A small disk in memory is mounted, which only root may do.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.evaluation.drawing.tiny_clip import write_clip


ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "pisces-tiny")
PICTURE = str(next((ROOT / "examples" / "images").glob("*.png"), ROOT / "missing.png"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"),
    pytest.mark.skipif(shutil.which("mount") is None, reason="no mount"),
]


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB, full but for 8 KB; `free()` makes its room and more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode:
        pytest.skip("this machine does not let root mount")

    def free():
        (folder / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=300m", str(folder)], check=True)

    (folder / "ballast").write_bytes(bytes(2**20 - 16 * 1024))
    try:
        yield folder, free
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run("finetune.scenes", "--output", folder, "--num_scenes", 24, "--split", "heldout")
    return folder


def run(module, *words):
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"ballast"}


def fails_and_goes_on(disk, module, words, finished, allowed=lambda name: False):
    """Run on the full disk, then with room.

    Args:
        words: of the command.
        finished: the file that says that a run is finished, in the disk's folder.
        allowed: whole files that a run may leave, from which it goes on.
    """
    folder, free = disk
    done = run(module, *words)
    lines = done.stderr.strip().replace("\r", "\n").splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: " in lines[-1] and str(folder) in lines[-1], lines[-3:]
    assert "No space left on device" in lines[-1] and "run again" in lines[-1]
    left = files_of(folder)
    assert finished not in left and not [name for name in left if not allowed(name)], left
    free()
    again = run(module, *words)
    assert again.returncode == 0, again.stderr[-2000:]
    assert finished in files_of(folder) and not [name for name in files_of(folder) if "partial" in name]


def test_new_concept(disk):
    words = ["--num_pictures", 6, "--num_replay", 6, "--num_heldout", 6, "--output", disk[0] / "out"]
    fails_and_goes_on(disk, "finetune.scenes.new_concept", words, "out/concept.json")


def test_scenes_of_finetune(disk):
    words = ["--num_scenes", 30, "--output", disk[0] / "out"]
    whole = lambda name: name.startswith("out/")  # noqa: E731  it goes on scene by scene
    folder, _ = disk
    done = run("finetune.scenes", *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in files_of(folder):
        check_whole(folder / name)
    fails_and_goes_on(disk, "finetune.scenes", words, "out/images/000029.png", whole)
    assert len((folder / "out" / "scenes.jsonl").read_text().splitlines()) == 30


def check_whole(path):
    from PIL import Image

    if path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        assert path.read_text().endswith("\n") and [json.loads(line) for line in path.read_text().splitlines()]


def test_export(disk):
    words = ["--checkpoint", TINY, "--output", disk[0] / "out"]
    fails_and_goes_on(disk, "conversion.export", words, "out/config.json")


def test_draw_of_the_console_command(disk):
    words = ["draw", "a red circle", "--model", TINY, "--steps", 2, "--num_images", 4, "--output", disk[0] / "out"]
    words += ["--sheet", disk[0] / "sheet.png"]
    fails_and_goes_on(disk, "pisces_commands.console", words, "sheet.png", lambda name: name.startswith("out/"))


def test_reconstruct_of_the_console_command(disk):
    big = disk[0] / "again.png"
    with suppress(OSError):  # to the last byte: the picture is small
        (disk[0] / "more").write_bytes(bytes(16 * 1024))
    folder, free = disk
    words = ["reconstruct", PICTURE, "--model", TINY, "--steps", 2, "--output", big]
    fails_and_goes_on((folder, free), "pisces_commands.console", words, "again.png", lambda name: name == "more")


def test_scenes_of_evaluation(disk, scenes):
    words = ["--model", TINY, "--data", scenes, "--num_questions", 20, "--num_reconstructions", 4]
    words += ["--num_prompts", 8, "--images_per_prompt", 1, "--output", disk[0] / "out.json"]
    kept = lambda name: name.startswith("out_unfinished/")  # noqa: E731
    fails_and_goes_on(disk, "evaluation.scenes", words, "out.json", kept)


def test_best_of_n(disk, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue stars\na green heart\n")
    words = ["--checkpoint", TINY, "--prompts", tmp_path / "prompts.txt", "--scorer", "tests.test_full_disk:count_red"]
    words += ["--n", 2, "--num_inference_steps", 2, "--pairs", "True", "--output", disk[0] / "out"]
    kept = lambda name: name.startswith("out/")  # noqa: E731
    fails_and_goes_on(disk, "finetune.best_of_n", words, "out/pairs.jsonl", kept)


def count_red(pictures, prompt):
    return [float(sum(picture.convert("RGB").histogram()[200:256])) for picture in pictures]


def test_picture_metrics(disk, tmp_path):
    (tmp_path / "clip").mkdir()
    write_clip(tmp_path / "clip")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a star"}\n')
    words = ["--model", TINY, "--prompts", f"own:{tmp_path / 'mine.jsonl'}", "--images_per_prompt", 2]
    drawn = run("evaluation.draw_prompts", *words, "--num_inference_steps", 2, "--output", tmp_path / "drawings")
    assert drawn.returncode == 0, drawn.stderr
    (disk[0] / "more").write_bytes(bytes(16 * 1024 - 4096))  # room for the facts of the run, not for vectors
    words = ["--drawings", tmp_path / "drawings", "--clip", tmp_path / "clip", "--output", disk[0] / "out.json"]
    kept = lambda name: name in ("more", "out_vectors/run.json")  # noqa: E731
    fails_and_goes_on(disk, "evaluation.picture_metrics", words, "out.json", kept)
