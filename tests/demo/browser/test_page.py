"""The page as a whole: what it loads, what it answers to posts by hand, how its command starts and ends."""

import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from pisces_demo.examples import example_pictures
from pisces_demo.page import build_page
from pisces_demo.pieces import drawing_seconds
from tests.demo.browser.visitor import is_drawn, serve


ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
START_S = 400  # of a process that reads torch and gradio, with thirty others on two cores


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_page_names_no_other_machine_to_connect_to(visitor):
    """Not even a hint to the browser; what it fetches is asserted when the visitor leaves."""
    for tab in ("Draw", "Edit", "Adapter", "Chat"):
        visitor.go_to(tab)
        visitor.page.wait_for_timeout(300)
    links = visitor.page.eval_on_selector_all(
        "link[href], script[src], img[src]", "all => all.map(e => e.href || e.src)"
    )
    assert len(links) > 5 and all(link.startswith((visitor.url, "data:")) for link in links), links
    assert len(visitor.requests) > 20
    assert "fonts.g" not in visitor.page.content()


def test_the_examples_outlive_the_cleaning_that_takes_the_pictures_of_yesterday(model):
    from gradio.route_utils import delete_files_created_by_app

    page = build_page(model)
    names = {f"{name}.png" for name in example_pictures()}
    kept = [path for block in page.blocks.values() for path in block.keep_in_cache if Path(path).name in names]
    assert len(kept) == 2 * len(names)  # of the chat and of the edits
    old = Path(kept[0]).with_name("old.png")
    old.write_bytes(b"")
    for block in page.blocks.values():
        block.temp_files.update([*kept, str(old)])  # as when a visitor clicks them
    delete_files_created_by_app(page, None)
    assert all(Path(path).is_file() for path in kept) and not old.exists()


def test_it_listens_on_this_machine_alone(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)


def post(address, name, values):
    """What the server answers to a post by hand; a client of gradio would upload a file of its own first."""
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{name}",
        data=json.dumps({"data": values}).encode(),
        headers={"Content-Type": "application/json"},
    )
    event = json.loads(urllib.request.urlopen(request).read())["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}").read().decode()


@pytest.mark.parametrize("path", ["/etc/hostname", "../../pyproject.toml", str(ROOT / "examples/images/000003.png")])
def test_files_of_the_machine_are_neither_read_nor_given_out(address, path):
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    said = post(address, "edit", [given, "make it red", 0, 0, 2, 1])
    assert said.startswith("event: error") and "event: complete" not in said, said
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x.png", "http://[::1]:{port}/x.png"])
def test_an_address_in_place_of_a_picture_is_not_fetched_from_this_machine(address, url):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        url = url.format(port=listener.getsockname()[1])
        given = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
        said = post(address, "edit", [given, "make it red", 0, 0, 2, 1])
        assert said.startswith("event: error"), said
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([None, 1, 0, 2, 1], "The prompt is empty. Say what to draw."),
        (["a red circle", 1, -5, 2, 1], "The seed is -5: expected a whole number from 0 to 4294967295."),
        (["a red circle", 99, 0, 2, 1], "Value 99 is greater than maximum value 8."),  # gradio's own words
    ],
)
def test_posts_by_hand_are_refused_like_clicks(address, values, says):
    said = post(address, "draw", values)
    assert said.startswith("event: error") and says in said, said


def test_each_run_asks_for_a_lent_gpu_for_a_time_that_its_own_values_give(model):
    """`spaces.GPU` has this form; on ZeroGPU it calls `duration` with the values of the run."""
    asked = []

    def lend(duration):
        def decorate(function):
            def run(*values):
                asked.append((function.__name__, duration(*values)))
                yield from function(*values)

            return run

        return decorate

    picture = ROOT / "examples" / "images" / "000003.png"
    with serve(model, on_gpu=lend) as address:
        assert "event: complete" in post(address, "draw", ["a red circle", 2, 0, 3, 1])
        from gradio_client import Client, handle_file

        values = (handle_file(str(picture)), "make the cross red", 0, 0, 2, 1)
        Client(address, verbose=False).predict(*values, api_name="/edit")
    assert asked == [
        ("drawing", drawing_seconds("a red circle", 2, 0, 3, 1)),
        ("editing", drawing_seconds("", 1, 0, 2, 1)),
    ]


@pytest.fixture
def command():
    started = []

    def start(*arguments):
        command = [sys.executable, str(ROOT / "demo" / "app.py"), *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_serves_the_page_on_the_port_that_it_is_told_and_ends_on_an_interrupt(command):
    port = free_port()
    process = command("--port", port, "--model", ROOT / "pisces-tiny")
    for _ in range(5 * START_S):
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}").read()
            break
        except OSError:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
    assert b"Pisces" in page
    other = command("--port", port, "--model", ROOT / "pisces-tiny")
    _, err = other.communicate(timeout=START_S)
    assert other.returncode == 2 and err.splitlines()[-1].startswith("app: error: cannot listen at 127.0.0.1: "), err
    assert "Traceback" not in err
    process.send_signal(2)
    _, err = process.communicate(timeout=START_S)
    assert process.returncode in (0, 130) and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere"], "app: error: nowhere: no such folder."),
        (["--adapter", "nowhere"], "app: error: nowhere: no such folder."),
        (["--port", "70000"], "app: error: argument --port: '70000': expected a whole number from 1 to 65535"),
    ],
)
def test_a_wrong_flag_is_one_line(command, arguments, says):
    process = command(*(["--model", str(ROOT / "pisces-tiny")] if "--model" not in arguments else []), *arguments)
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 2 and err.splitlines()[-1].startswith(says), err
    assert "Traceback" not in err


# ---- screenshots of the documents


def take(visitor, name):
    path = DOCS / f"demo_{name}.png"
    visitor.page.mouse.move(5, 5)
    visitor.page.evaluate("window.scrollTo(0, 0)")
    visitor.page.wait_for_timeout(800)
    data = visitor.page.screenshot(animations="disabled", clip={"x": 90, "y": 0, "width": 1020, "height": 900})
    Image.open(io.BytesIO(data)).convert("RGB").save(path, optimize=True)
    assert 5_000 < path.stat().st_size < 200_000
    return path


def test_screenshots_of_the_documents_are_taken_from_the_page_at_work(visitor):
    visitor.page.locator("#chat-examples").get_by_text("Describe the picture.").click()
    visitor.page.locator("#message img").first.wait_for()
    visitor.page.locator("#message .submit-button").click()
    visitor.page.wait_for_function("document.querySelector('#chat .bot-row')?.innerText.includes('bottom right')")
    visitor.ask("draw two red hearts on a dark background")
    visitor.wait_for_pictures("chat", 2)
    visitor.page.locator("#message textarea:not([disabled])").wait_for()
    take(visitor, "chat")
    visitor.go_to("Draw")
    visitor.fill("prompt", "a yellow heart left of a purple square")
    visitor.click("draw")
    visitor.wait_for_text("draw-status", "4 pictures, seeds 0 to 3, in ")
    visitor.wait_for_pictures("gallery", 4)
    assert all(is_drawn(pixels) for pixels in visitor.pictures("gallery"))
    take(visitor, "draw")
    visitor.go_to("Edit")
    visitor.page.locator("#edit-examples").get_by_text("make the star red").click()
    visitor.wait_for_pictures("source", 1)
    visitor.click("edit")
    visitor.wait_for_pictures("slider", 2)
    take(visitor, "edit")
