"""A short run over changed checkpoints, and proof that the hook sees what it is there for."""

import os
import subprocess
import time

import numpy as np
import pytest

from tests.fuzz import checkpoint
from tests.fuzz.checkpoint import Case, check, make_case, run
from tests.fuzz.outcomes import Wrong
from tests.fuzz.planted import PLANTED, code, template, write


pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_checkpoint_answers_as_before_or_is_refused_in_one_line(seed):
    case = make_case(np.random.default_rng(seed))
    try:
        case.call()
        assert not case.must
    except ValueError as error:
        assert str(error).startswith("pisces: error: ") and str(error).isprintable()


@pytest.mark.parametrize("name", ["pickles beside", "auto_map of config.json", "template: globals"])
def test_planted_code_is_never_run(name):
    plant, must = PLANTED[name]
    if must:
        with pytest.raises(ValueError, match="pisces: error: "):
            check(Case(name, plant, must=must))
    else:
        check(Case(name, plant, must=must))


def test_the_hook_sees_programs_code_of_the_folder_and_files_outside(monkeypatch):
    def misbehave(folder):
        watch = checkpoint.Watch(folder)
        subprocess.run(["true"], check=True)
        compiled = compile("1", str(folder / "planted.py"), "exec")
        exec(compiled)
        (folder.parents[1] / "outside").write_text("x")
        open(folder.parents[1] / "secret").close()
        watch.is_on = False
        return checkpoint.Result(0, "", "", watch.found)

    monkeypatch.setattr(checkpoint, "use", misbehave)
    found = " ".join(run(Case("bad", code("planted.py"))).found)
    assert "subprocess.Popen" in found and "ran " in found and "wrote " in found and "read " in found


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda folder: os._exit(3), "died"),
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: time.sleep(30), "hangs: took more than 1 s"),
    ],
)
def test_a_child_that_dies_raises_or_hangs_is_a_failure(monkeypatch, use, words):
    monkeypatch.setattr(checkpoint, "use", use)
    if "hangs" in words:
        monkeypatch.setattr(checkpoint, "MAX_WAIT", 1)
    with pytest.raises(Wrong, match=words):
        run(Case("bad", write("notes.txt", "x")))


def test_another_answer_without_a_word_is_a_failure():
    with pytest.raises(Wrong, match="without a word"):
        check(
            Case(
                "another template",
                template(
                    "hello {{ messages[0]['content'][0]['type'] }}{% for p in messages[0]['content'] if p.type == 'image' %}<|image|>{% endfor %}<|gen_start|>"
                ),
            )
        )
