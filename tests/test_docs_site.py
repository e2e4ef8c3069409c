"""The site of the documents: every page is in it, and no link of a page leads nowhere."""

import importlib.util
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)
PAGES = site.find_pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_the_pages_lead_to_files_and_headings(page):
    text, pictures = site.move_links(page.read_text(encoding="utf-8"), page, PAGES)
    assert all(picture.is_file() for picture in pictures)
    names = {name: path for path, name in PAGES.items()}
    for _, _, target in site.LINK.findall(text):
        if target.startswith(("http:", "https:", "pictures/", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        wanted = names[name] if name else page
        assert not anchor or anchor in headings(wanted.read_text(encoding="utf-8")), f"{page.name}: {target}"


def headings(text):
    """The anchors that GitHub and the site make of a page's headings."""
    found = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_a_link_to_nothing_is_named():
    with pytest.raises(ValueError, match=r"README\.md links to docs/nowhere\.md, which does not exist"):
        site.move_links("[this](docs/nowhere.md)", ROOT / "README.md", PAGES)


def test_links_to_code_become_words_and_links_to_pages_stay():
    text, _ = site.move_links("[a](docs/data.md) [b](finetune) [c](https://x.y)", ROOT / "README.md", PAGES)
    assert text == "[a](data.md) `b` [c](https://x.y)"


def test_every_page_is_in_the_navigation():
    listed = {name for names in site.NAVIGATION.values() for name in names}
    assert listed <= {*PAGES.values(), "reference.md"}
    shown = set(re.findall(r"[\w-]+\.md", site.table_of_contents()))
    assert shown == {*PAGES.values(), "reference.md"} - {"index.md"}


def test_the_reference_names_every_public_class():
    import modeling_pisces

    text = site.reference()
    assert all(f":: modeling_pisces.{name}\n" in text for name in modeling_pisces.__all__)
