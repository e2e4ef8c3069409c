"""One processor, several threads, different padding and truncation in each: what a server does."""

import copy
import multiprocessing
import sys
import threading

import pytest

from modeling_pisces import processing_pisces
from tests.fixtures import make_processor


@pytest.fixture
def eager_switching():
    """Let threads interrupt each other between any two steps; at the usual 5 ms a race may hide for hours."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work, num_threads: int = 8) -> list:
    """`work(i)` in every thread at once; errors are results too."""
    results: list = [None] * num_threads
    start = threading.Barrier(num_threads)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except Exception as error:  # whatever went wrong in a thread is what the test wants to see
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_each_thread_gets_its_own_padding_and_truncation(eager_switching):
    processor = make_processor()

    def tokens(index: int) -> list:
        options = {"padding_side": ("left", "right")[index % 2], "padding": "max_length", "max_length": 20 + index}
        options["truncation"] = index % 3 == 0
        return processor(text=["hi " * (index + 1), "a longer row"], **options)["input_ids"]

    alone = [tokens(index) for index in range(8)]
    assert len({len(rows[0]) for rows in alone}) == 8  # the settings differ, so a mix-up shows
    found = in_threads(lambda index: [tokens(index) for _ in range(40)])
    assert found == [[rows] * 40 for rows in alone]


def test_each_thread_gets_its_own_chat(eager_switching):
    processor = make_processor()

    def chat(index: int) -> list:
        rows = [[{"role": "user", "content": text}] for text in ("hi " * (index + 1), "a longer question")]
        options = {"padding": index % 2 == 0, "padding_side": ("left", "right")[index // 2 % 2]}
        return processor.apply_chat_template(rows, tokenize=True, return_dict=True, **options)["input_ids"]

    alone = [chat(index) for index in range(8)]
    found = in_threads(lambda index: [chat(index) for _ in range(20)])
    assert found == [[rows] * 20 for rows in alone]


def test_reading_tokens_back_waits_for_the_tokenizer(eager_switching):
    processor = make_processor()
    ids = processor(text="two blue stars")["input_ids"]

    def read_or_write(index: int) -> list:
        if index % 2:
            return [processor(text=["a", "bbbb"], padding=True, padding_side="left")["input_ids"] for _ in range(40)]
        return [(processor.decode(ids[0]), processor.batch_decode(ids)) for _ in range(40)]

    alone = [read_or_write(index)[0] for index in range(8)]
    assert in_threads(read_or_write) == [[one] * 40 for one in alone]


def test_the_lock_hinders_neither_copies_nor_saving(tmp_path):
    processor = copy.deepcopy(make_processor())
    processor.save_pretrained(tmp_path)
    assert processor(text="hi")["input_ids"] == make_processor()(text="hi")["input_ids"]


def tokenize_in_child(processor, queue) -> None:
    queue.put(processor(text="hi")["input_ids"])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_worker_forked_while_another_thread_tokenizes_does_not_hang():
    processor = make_processor()
    expected = processor(text="hi")["input_ids"]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with processing_pisces.TOKENIZER_LOCK:
            held.set()
            done.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(timeout=10)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=tokenize_in_child, args=(processor, queue))
    child.start()
    try:
        assert queue.get(timeout=30) == expected
    finally:
        done.set()
        holder.join()
        child.join(timeout=5)
        if child.is_alive():
            child.kill()
