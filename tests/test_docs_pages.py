"""What the pages say of the repository is true: files and names in them are there, and tables fit a terminal."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
HISTORY = ("CHANGELOG.md", "log.md")  # keep the names of their time
PAGES = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.name not in HISTORY]
WIDTH = 112  # of a line as it stands in the file
# pages whose tables are wider yet: take a name out when they fit, and put none in
WIDE = ("edit.md", "tiny.md", "assemble.md", "data.md", "serve.md", "many.md", "search.md", "demo.md")
ROOMS = (
    "benchmarks conversion curation demo docs evaluation examples finetune modeling_pisces pisces_commands tests"
).split()
NOT_OURS = re.compile(r"NAME|\*")  # stands for a name that the reader chooses, or for several


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [path for path in PAGES if path.name not in WIDE], ids=lambda path: path.name)
def test_tables_fit_a_terminal(page):
    words = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in words.splitlines() if line.startswith("|") and len(line) > WIDTH]
    assert not wide, (
        f"{page.name}: {len(wide)} lines of more than {WIDTH}; split the cells, or write a list: {wide[0]}"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_of_the_repository_that_a_page_names_are_there(page):
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./*-]*)`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not NOT_OURS.search(name) and not (ROOT / name).exists()]
    assert not missing, f"{page.name}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_modules_that_a_page_starts_are_there(page):
    for name in set(re.findall(rf"python -m ((?:{'|'.join(ROOMS)})[\w.]*\w)", page.read_text(encoding="utf-8"))):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name}: python -m {name}"


def test_the_tests_that_pages_name_as_examples_are_there():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in sources, f"{page.name}: {name}"


def rows_of_the_way_in(name):
    """The rows of the table that says where to start: what is added, and the file."""
    table = read(name).split("| to add or change | start in |\n|---|---|\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| (.+?) \| `([^`]+)`", table, flags=re.MULTILINE))


def test_the_two_tables_of_where_to_start_agree_and_their_files_are_there():
    rows = rows_of_the_way_in("CONTRIBUTING.md")
    assert rows == rows_of_the_way_in("docs/architecture.md") and len(rows) > 10
    assert all((ROOT / path).exists() for path in rows.values())


def test_what_contributing_says_to_touch_is_in_the_files_that_it_names():
    """Of each paragraph: every name in code marks that is no file stands in one of its files, or in the row's."""
    text = read("CONTRIBUTING.md").split("What else belongs to each")[1].split("### Rooms")[0]
    paragraphs = re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- \*\*|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    rows = rows_of_the_way_in("CONTRIBUTING.md")
    assert len(paragraphs) >= len(rows) - 1  # the benchmarks share one
    for title, words in paragraphs:
        start = [path for what, path in rows.items() if what.lower().startswith(title.lower()[:14])]
        marked = re.findall(r"`([^`]+)`", words)
        files = [ROOT / mark for mark in (*start, *marked) if "/" in mark]
        assert start and all(path.exists() for path in files), (title, start)
        texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
        inside = [child.name for path in files if path.is_dir() for child in path.iterdir()]
        for name in (mark for mark in marked if "/" not in mark and mark not in ("pisces", *inside)):
            assert any(re.search(rf"\b{name}\b", text) for text in texts), f"{title}: {name} is in none of its files"
