"""Stopping a run of the page: at its next piece, also while it waits, and never the next one. No gradio is needed."""

import threading
from types import SimpleNamespace

import pytest

from pisces_demo.pieces import Stops, adapter_text, drawing_seconds, page_error, picture_file, stoppable, until


class PageError(Exception):
    def __init__(self, message, print_exception):
        assert print_exception is False
        super().__init__(message)


GRADIO = SimpleNamespace(Error=PageError, Request=object)
ANNA, BERT = SimpleNamespace(session_hash="anna"), SimpleNamespace(session_hash="bert")


class Counting:
    """Pieces 1, 2, 3, ... that note whether they were closed."""

    def __init__(self, length=1000):
        self.length, self.is_closed = length, False

    def __call__(self):
        try:
            yield from range(1, self.length + 1)
        finally:
            self.is_closed = True


def test_pieces_pass_until_the_sign_is_up_and_the_last_word_follows():
    sign, pieces = threading.Event(), Counting()
    seen = []
    for piece in until(sign, "stopped", pieces()):
        seen.append(piece)
        if piece == 3:
            sign.set()
    assert seen == [1, 2, 3, "stopped"] and pieces.is_closed


def test_a_run_that_ends_by_itself_has_no_last_word():
    assert list(until(threading.Event(), "stopped", Counting(2)())) == [1, 2]


def test_pieces_are_closed_when_the_visitor_is_gone():
    pieces = Counting()
    run = until(threading.Event(), "stopped", pieces())
    next(run)
    run.close()
    assert pieces.is_closed


def test_a_visitor_stops_their_own_run_and_the_next_one_runs():
    stops = Stops()
    run = stoppable(GRADIO, Counting(3), stops, "stopped")
    annas, berts = run(ANNA), run(BERT)
    assert (next(annas), next(berts)) == (1, 1)
    stops.stop("anna")
    assert list(annas) == ["stopped"] and list(berts) == [2, 3]
    assert list(run(ANNA)) == [1, 2, 3]
    assert stops.signs == {}


def test_a_run_that_waits_in_the_queue_can_be_stopped_before_it_begins():
    stops, pieces = Stops(), Counting()
    stops.announce("anna")
    stops.stop("anna")
    assert list(stoppable(GRADIO, pieces, stops, "stopped")(ANNA)) == ["stopped"]
    assert list(stoppable(GRADIO, Counting(1), stops, "stopped")(ANNA)) == [1]


def test_a_second_click_while_one_runs_leaves_the_sign_of_the_first():
    stops = Stops()
    run = stoppable(GRADIO, Counting(), stops, "stopped")(ANNA)
    next(run)
    stops.announce("anna")
    stops.stop("anna")
    assert list(run) == ["stopped"]


def test_stopping_where_nothing_runs_does_nothing():
    stops = Stops()
    stops.stop("anna")
    assert list(stoppable(GRADIO, Counting(1), stops, "stopped")(ANNA)) == [1]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no such\n picture: <b>x</b>"), "no such picture: &lt;b&gt;x&lt;/b&gt;"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_an_error_is_one_line_without_markup_and_the_next_run_runs(error, says, capsys):
    def fails():
        yield 1
        raise error

    stops = Stops()
    run = stoppable(GRADIO, fails, stops, "stopped")(ANNA)
    assert next(run) == 1
    with pytest.raises(PageError) as shown:
        next(run)
    assert str(shown.value) == says.strip() and stops.signs == {}
    has_traceback = "Traceback" in capsys.readouterr().err
    assert has_traceback == (not isinstance(error, ValueError))  # the log has what the page does not show


def test_a_long_error_is_cut():
    assert len(str(page_error(GRADIO, "x" * 5000))) == 600


def test_a_picture_is_written_once_and_never_again_while_somebody_reads_it(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    path = picture_file(picture, str(tmp_path))
    before = open(path, "rb").read()
    with open(path, "ab") as file:
        file.write(b"seen")  # what a second writing would take away
    assert picture_file(picture.copy(), str(tmp_path)) == path
    assert open(path, "rb").read() == before + b"seen"
    assert picture_file(Image.new("RGB", (2, 3), (1, 2, 3)), str(tmp_path)) != path  # the same bytes, another shape


def test_a_lent_gpu_is_asked_for_by_pictures_and_steps_and_odd_values_ask_for_little():
    assert drawing_seconds("a", 1, 0, 50, 3) < drawing_seconds("a", 4, 0, 50, 3) < 120
    for count, steps in ((None, None), ("8", "x"), (-3, -1), (10**9, 10**9)):
        assert 15 <= drawing_seconds("a", count, 0, steps, 3) <= 300


def test_names_of_adapters_are_no_markup():
    side = {"type": "LORA", "num_parameters": 1200, "num_bytes": 2**20}
    text = adapter_text([{"name": "runs/<img src=x>", "base": None, "sides": {"decoder": side}}])
    assert "**&lt;img src=x&gt;**, trained on a base that it does not name" in text
    assert "- decoder: LORA, 1,200 parameters, 1.00 MiB" in text
