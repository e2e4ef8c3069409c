"""Claims about words that a small checkpoint was never trained on: `pisces draw` names them."""

from pathlib import Path

import pytest

from modeling_pisces.console.known_words import split_words, unknown_words, write_known_words
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint


pytest.importorskip("diffusers")
TINY = Path(__file__).parents[3] / "pisces-tiny"


def test_words_are_told_apart_whatever_their_case_and_marks(tmp_path):
    assert split_words("A red cat's e-mail_2, \u732b!") == ["a", "red", "cat", "s", "e", "mail", "2", "\u732b"]
    assert unknown_words(tmp_path, ["a dragon"]) == []  # no list, nothing to say
    write_known_words(tmp_path, ["a red star.", "Two stars"])
    assert (tmp_path / "known_words.txt").read_text() == "a\nred\nstar\nstars\ntwo\n"
    assert unknown_words(tmp_path, ["A dragon, a RED star", "the dragon"]) == ["dragon", "the"]


def test_draw_names_what_the_checkpoint_never_learned_and_draws_all_the_same(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    write_known_words(folder, ["a red star"])
    assert main(["draw", "a red dragon", "--model", str(folder), "--output", str(tmp_path / "a.png")]) == 0
    assert f"warning: {folder} knows none of: dragon ({folder / 'known_words.txt'})" in capsys.readouterr().err
    assert main(["draw", "a red star", "--model", str(folder), "--output", str(tmp_path / "b.png")]) == 0
    assert "knows none of" not in capsys.readouterr().err


def test_pisces_tiny_knows_the_words_of_its_scenes_and_no_dragon():
    assert unknown_words(TINY, ["two green triangles left of a large yellow heart", "a dragon"]) == ["dragon"]
