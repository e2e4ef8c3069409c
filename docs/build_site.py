"""The site of the documents: `make docs` gathers every page, adds the reference of the public classes, runs Sphinx.

Pages stay where they are read in the repository. Here they are copied side by side, links between them follow,
pictures come along, and links to code become plain words, since the site has no code to show. A warning of Sphinx ends
the build, so a link to a page or a heading that is not there cannot get in.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from pisces_commands.arguments import LineParser


ROOT = Path(__file__).resolve().parents[1]
FRONT = {"README.md": "index.md"}
OTHERS = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_card.md")
PICTURES = {".png", ".svg", ".jpg"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
NAVIGATION = {
    "Start": ["architecture.md"],
    "Use and train": [
        *("finetune.md", "from_scratch.md", "data.md", "curation.md", "edit.md"),
        *("demo.md", "serve.md", "search.md", "many.md"),
        *("preferences.md", "scale.md", "speed.md", "memory.md"),
    ],
    "Build": ["assemble.md", "compatibility.md"],
    "Score": ["evaluate.md", "evaluate_understanding.md", "evaluate_drawing.md", "model_card.md"],
    "Reference": ["reference.md"],
}
CONFIG = """\
import sys
sys.path.insert(0, {root!r})
project, author = "Pisces", "The Pisces authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", "Pisces"
myst_heading_anchors = 4
autodoc_member_order, autodoc_inherit_docstrings = "bysource", False
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
"""


def find_pages() -> dict[Path, str]:
    """Every page of the repository, and its name on the site."""
    pages = {ROOT / name: new for name, new in FRONT.items()}
    pages |= {ROOT / name: name for name in OTHERS}
    return pages | {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}


def move_links(text: str, page: Path, pages: dict[Path, str]) -> tuple[str, set[Path]]:
    """The text of a page with links that fit the site, and the pictures that it shows.

    Raises:
        ValueError: a link names a file that is not in the repository.
    """
    pictures: set[Path] = set()

    def moved(match: re.Match) -> str:
        mark, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve()
        if not path.exists():
            raise ValueError(f"{page.name} links to {target}, which does not exist.")
        if path in pages:
            return f"{mark}[{words}]({pages[path]}{'#' + anchor if anchor else ''})"
        if path.suffix in PICTURES:
            pictures.add(path)
            return f"{mark}[{words}](pictures/{path.name})"
        return words if words.startswith("`") else f"`{words}`"

    return LINK.sub(moved, text), pictures


def write_pages(folder: Path) -> None:
    """All pages, their pictures and the reference, in one folder."""
    pages = find_pages()
    for path, name in pages.items():
        text, pictures = move_links(path.read_text(encoding="utf-8"), path, pages)
        (folder / name).write_text(text, encoding="utf-8")
        for picture in pictures:
            (folder / "pictures").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / "pictures" / picture.name)
    (folder / "reference.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    """A page with every public name of the package, as directives that Sphinx fills from the docstrings."""
    sys.path.insert(0, str(ROOT))
    import modeling_pisces

    lines = ["# Reference", "", "The public names of the package, from their docstrings.", "", "```{eval-rst}"]
    for name in sorted(modeling_pisces.__all__):
        value = getattr(modeling_pisces, name)
        kind = "autoclass" if isinstance(value, type) else "autofunction" if callable(value) else "autodata"
        lines += [f".. {kind}:: modeling_pisces.{name}", *["   :members:"] * (kind == "autoclass"), ""]
    return "\n".join([*lines, "```", ""])


def table_of_contents() -> str:
    """The navigation, for the end of the first page."""
    listed = {name for names in NAVIGATION.values() for name in names}
    rest = sorted(set(find_pages().values()) - listed - {"index.md"})
    trees = {**NAVIGATION, "For the curious": rest}
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```\n"
        for title, names in trees.items()
    )


def main(arguments: list[str] | None = None) -> None:
    parser = LineParser(prog="python docs/build_site.py", description=__doc__)
    parser.add_argument("--output", default="build/site", metavar="FOLDER", help="folder of the site (build/site)")
    output = Path(parser.parse_args(arguments).output).resolve()
    pages = output.with_name(output.name + "_pages")
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    write_pages(pages)
    (pages / "conf.py").write_text(CONFIG.format(root=str(ROOT)), encoding="utf-8")
    with open(pages / "index.md", "a", encoding="utf-8") as file:
        file.write(table_of_contents())
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", str(pages), str(output)]
    raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
