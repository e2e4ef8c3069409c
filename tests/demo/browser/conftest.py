"""The page of pisces-tiny on a server, and a real browser in front of it; `make test-web` has both installed."""

import importlib.util
from pathlib import Path

import pytest


if not all(importlib.util.find_spec(name) for name in ("gradio", "playwright")):
    collect_ignore_glob = ["test_*.py"]  # of an environment for something else

TINY = Path(__file__).parents[3] / "pisces-tiny"


@pytest.fixture(scope="session")
def browser():
    from tests.demo.browser.visitor import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def model():
    from pisces_demo.model import DemoModel

    return DemoModel.load(str(TINY))


@pytest.fixture(scope="session")
def address(model):
    from tests.demo.browser.visitor import serve

    with serve(model) as url:
        yield url


@pytest.fixture
def new_visitor(browser, address):
    """Opens the page for one more person. At the end nobody saw an error or asked another machine for anything."""
    from tests.demo.browser.visitor import Visitor

    visitors = []

    def arrive(url=address):
        visitors.append(Visitor(browser, url))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def visitor(new_visitor):
    return new_visitor()
