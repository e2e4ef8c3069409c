"""A person at the page: clicks, types, drops files and looks at pixels, in a real browser."""

import io
import shutil
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright


WAIT_MS = 120_000  # a machine with many other tests on it
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser():
    """The system's Chromium, else playwright's own (`playwright install chromium`)."""
    path = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def serve(model, on_gpu=None):
    """The page of a loaded model on a free port of this machine."""
    from pisces_demo.page import build_page, launch

    page = build_page(model, on_gpu)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    try:
        yield url.rstrip("/")
    finally:
        page.close(verbose=False)


@contextmanager
def slowed(module, seconds):
    """Inside the block each call of a part of the model takes that much longer."""
    hook = module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def is_free(model, timeout_s=60):
    """Whether nobody uses the model any more, soon."""
    if model.lock.acquire(timeout=timeout_s):
        model.lock.release()
        return True
    return False


class Visitor:
    """One person with a browser window of their own, who notes every request and every error of the console."""

    def __init__(self, browser, url):
        self.url, self.requests, self.problems = url, [], []
        self.context = browser.new_context(viewport={"width": 1200, "height": 980})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.arrive()

    def arrive(self):
        self.page.goto(self.url)
        self.page.wait_for_selector("#chat")
        self.page.locator("#message textarea").wait_for()

    def reload(self):
        """Load the page again; gradio's own complaint that its stream is cut off by this is no error of the page."""
        before = list(self.problems)
        self.page.reload()
        self.page.locator("#message textarea").wait_for()
        cut_off = ("AbortError: BodyStreamBuffer was aborted", "Unexpected error Connection errored out")
        later = self.problems[len(before) :]
        self.problems[:] = before + [problem for problem in later if not problem.startswith(cut_off)]

    def leave(self):
        self.context.close()
        elsewhere = [url for url in self.requests if not url.startswith((f"{self.url}/", "data:", "blob:"))]
        assert elsewhere == [], f"asked other machines: {elsewhere}"
        assert self.problems == [], f"errors in the console: {self.problems}"

    def go_to(self, tab):
        self.page.get_by_role("tab", name=tab).click()

    def fill(self, name, value):
        self.page.locator(f"#{name} textarea, #{name} input[type=number], #{name} input[type=text]").first.fill(
            str(value)
        )
        self.page.keyboard.press("Tab")

    def click(self, name):
        self.page.locator(f"#{name}").click()

    def upload(self, name, path):
        self.page.locator(f"#{name} input[type=file]").first.set_input_files(path)

    def wait_for_text(self, name, text):
        self.page.wait_for_function(
            "([id, text]) => document.getElementById(id)?.innerText.includes(text)", arg=[name, text]
        )

    def text(self, name):
        return self.page.locator(f"#{name}").inner_text().strip()

    def toast(self):
        """The message that pops up; it is closed then."""
        shown = self.page.locator(".toast-body").first
        shown.wait_for()
        text = shown.inner_text()
        shown.locator("button.toast-close").click()
        return text

    # ---- pictures

    def sources(self, name):
        return [image.get_attribute("src") for image in self.page.locator(f"#{name} img").all()]

    def wait_for_pictures(self, name, count):
        self.page.wait_for_timeout(300)  # the text beside them may have come first
        self.page.wait_for_function(
            "([id, count]) => { const all = [...document.querySelectorAll(`#${id} img`)];"
            " return all.length >= count && all.every(one => one.complete && one.naturalWidth > 0); }",
            arg=[name, count],
        )

    def pictures(self, name):
        """The files behind the pictures, as arrays; PNG, so they are what the model drew."""
        return [self.download(source) for source in self.sources(name)]

    def download(self, source):
        response = self.page.request.get(source)
        assert response.ok and response.headers["content-type"] == "image/png", source
        return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"))

    def seen(self, name):
        """What the screen shows of an element, as an array."""
        data = self.page.locator(f"#{name}").screenshot()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    # ---- chat

    def ask(self, text, files=()):
        for path in files:
            self.attach(path)
        self.page.locator("#message textarea").fill(text)
        self.page.locator("#message .submit-button").click()

    def attach(self, path):
        """A picture chosen by the clip beside the field."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#message .upload-button").click()
        chooser.value.set_files(path)
        self.page.locator("#message .thumbnail-item").first.wait_for()

    def answers(self):
        return [row.inner_text().strip() for row in self.page.locator("#chat .bot-row").all()]

    def wait_for_answer(self, text):
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('#chat .bot-row')].some(row => row.innerText.trim() === text)",
            arg=text,
        )


def is_drawn(pixels):
    """No blank picture: many colours, and a wide range of them."""
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and pixels.astype(int).std() > 10
