"""Work in a thread: what it says comes out in order, leaving stops it, and the lock is free afterwards."""

import gc
import threading

import pytest

from pisces_demo.work import run_in_steps


WAIT_S = 20  # far longer than any of this takes


def is_freed(lock):
    if lock.acquire(timeout=WAIT_S):
        lock.release()
        return True
    return False


def endless(started):
    """Work that goes on until it is told to stop, and says a number again and again."""

    def work(say, stop):
        number = 0
        while not stop.wait(0.001):
            number += 1
            started.set()
            say(number)

    return work


def test_everything_that_the_work_says_comes_out_in_order_and_the_lock_is_free_after_it():
    lock = threading.Lock()
    seen = []
    for piece in run_in_steps(lock, lambda say, stop: [say(number) for number in range(100)]):
        seen.append(piece)
    assert seen == list(range(100)) and is_freed(lock)


def test_the_lock_is_held_while_the_work_runs():
    lock, inside, go_on = threading.Lock(), threading.Event(), threading.Event()

    def work(say, stop):
        inside.set()
        go_on.wait(WAIT_S)
        say("done")

    steps = run_in_steps(lock, work)
    reader = threading.Thread(target=lambda: list(steps))
    reader.start()
    assert inside.wait(WAIT_S) and lock.locked()
    go_on.set()
    reader.join(WAIT_S)
    assert is_freed(lock)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_who_leaves_in_the_middle_stops_the_work_and_frees_the_lock(how):
    lock = threading.Lock()
    steps = run_in_steps(lock, endless(threading.Event()))
    assert next(steps) == 1
    if how == "closed":
        steps.close()
    del steps  # a page that a user has left closes nothing
    gc.collect()
    assert is_freed(lock)


def test_leaving_does_not_wait_for_work_that_ends_slowly():
    lock, go_on = threading.Lock(), threading.Event()

    def work(say, stop):
        say(1)
        go_on.wait(WAIT_S)

    steps = run_in_steps(lock, work)
    next(steps)
    steps.close()
    assert lock.locked()  # still at it, and nobody had to wait
    go_on.set()
    assert is_freed(lock)


def test_work_that_nobody_waits_for_any_more_is_never_begun():
    lock, began = threading.Lock(), []
    first = run_in_steps(lock, endless(threading.Event()))
    next(first)
    second = run_in_steps(lock, lambda say, stop: began.append(1))
    reader = threading.Thread(target=lambda: list(second))
    reader.start()  # waits behind the first
    first.close()
    reader.join(WAIT_S)
    assert began == [1]  # it had its turn, and not before
    assert is_freed(lock)


def test_what_the_work_raises_is_raised_where_it_is_read_and_the_lock_is_free():
    lock = threading.Lock()

    def work(say, stop):
        say("first")
        raise ValueError("no such picture")

    steps = run_in_steps(lock, work)
    assert next(steps) == "first"
    with pytest.raises(ValueError, match=r"^no such picture$"):
        next(steps)
    assert is_freed(lock)
