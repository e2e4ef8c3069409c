"""Makes a folder for the Hub out of a checkpoint: weights in shards of 5 GB, the code, a card with the licenses.

`python -m conversion.export --checkpoint PISCES --output FOLDER [--push OWNER/NAME]`. The folder is loaded once in a
fresh process where this package cannot be imported (`load_export.py`) before it appears under its name. A push is one
commit, to a private repository unless `--public` is given. Writing, checking and sending are `modeling_pisces`' own;
here they are put in order, and the card learns from `provenance.json` what may be done with the weights.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard

from conversion.storage.command import make_parser, run_command
from conversion.storage.output_folder import check_output, new_folder
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_config, read_json
from modeling_pisces.hub.cards import check_card, default_card
from modeling_pisces.hub.checks import check_repo_id
from modeling_pisces.hub.export import PushReport, export_to_folder, push_folder


PARTS_HEADING = "## Parts and their licenses"
CHILD = Path(__file__).parent / "checks" / "load_export.py"


def export(
    checkpoint: str | Path,
    output: str | Path,
    revision: str | None = None,
    card: str | Path | None = None,
    license: str | None = None,
    push: str | None = None,
    private: bool = True,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> PushReport | None:
    """Write the folder, load it elsewhere, and with `push` publish it.

    Args:
        checkpoint: folder or Hub id.
        output: folder to write; whole, checked and loaded once, or not there.
        revision: branch, tag or commit of a Hub id.
        card: Markdown file; None takes the checkpoint's README.md, or a short one.
        license: for the card's metadata; None keeps the card's own, or takes the license that all parts share.
        push: repository to push to; its card must then be complete.
        private: whether a repository that the push creates is private.
        token: access token; None takes the one of `hf auth login`.
        max_shard_size: largest weight file.
        overwrite: replace an earlier result.

    Returns:
        what the push did, if there was one.

    Raises:
        ValueError: before anything is sent: the checkpoint, the card or the name cannot be published, or the folder
            does not load without this package.
        ConnectionError: the Hub refused or the connection broke; `output` is there, and `push_folder` can send it.
    """
    if push is not None:
        check_repo_id(push)
    check_output(output, overwrite)
    source = find_checkpoint(str(checkpoint), revision)
    check_checkpoint(source)
    text = build_card(source, None if card is None else Path(card), license)
    with new_folder(output, overwrite) as held:
        folder = held / "export"
        export_to_folder(source, None, folder, max_shard_size=max_shard_size)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if push is not None or card is not None:
            check_card(folder / "README.md")
        if (source / "provenance.json").is_file():
            shutil.copyfile(source / "provenance.json", folder / "provenance.json")
        loaded = load_elsewhere(folder)
        for path in sorted(folder.iterdir()):
            path.rename(held / path.name)
        folder.rmdir()
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in loaded.items())
    print(f"{output}: exported; loaded without this package in a fresh process: {shapes}")
    if push is None:
        return None
    try:
        report = push_folder(output, push, private=private, token=token)
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error  # an OSError: one line and exit code 1
    print(f"pushed: {report}")
    return report


def build_card(source: Path, card: Path | None, license: str | None) -> str:
    """The card's text, with a license in its metadata and a table of parts as far as they are known."""
    own = card or source / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else default_card(read_config(source))
    if card is not None and not own.is_file():
        raise ValueError(f"{card}: not found. Give the Markdown file of the card.")
    record = source / "provenance.json"
    parts = read_json(record).get("parts", {}) if record.is_file() else {}
    if parts:
        text = _without_section(text, PARTS_HEADING).rstrip() + "\n\n" + _parts_table(parts)
    if license is not None:
        return _with_license(text, license, replace=True)
    shared = common_license(parts)
    return text if shared is None else _with_license(text, shared, replace=False)


def common_license(parts: dict[str, dict[str, Any]]) -> str | None:
    """The license that all parts share, "other" if they differ, None if one is not known."""
    licenses = {part.get("license") for part in parts.values()}
    if not licenses or None in licenses:
        return None
    return str(licenses.pop()) if len(licenses) == 1 else "other"


def _parts_table(parts: dict[str, dict[str, Any]]) -> str:
    rows = [PARTS_HEADING, "", "| part | from | revision | license |", "|---|---|---|---|"]
    for role, part in sorted(parts.items()):
        license = part.get("license") or "not stated"
        rows.append(f"| {role} | {part.get('name')} | {part.get('revision') or 'local'} | {license} |")
    rows += ["", "Use of the whole is bound by all of them. `provenance.json` says it tensor by tensor.", ""]
    return "\n".join(rows)


def _without_section(text: str, heading: str) -> str:
    return re.sub(rf"(?ms)^{re.escape(heading)}$.*?(?=^## |\Z)", "", text)


def _with_license(text: str, license: str, replace: bool) -> str:
    try:
        card: Any = ModelCard(text)
    except Exception:  # not readable as a card: `check_card` says why, where a card is asked for
        return text
    if card.data.license is not None and not replace:
        return text
    card.data.license = license
    if license == "other" and card.data.get("license_name") is None:
        card.data.license_name = "several-parts"
    return str(card)


def load_elsewhere(folder: Path) -> dict[str, list[int]]:
    """Load the folder in a fresh process without this package; returns the shapes of what it computed there.

    Raises:
        ValueError: it does not load or compute; with the last line that the process wrote.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
    }
    with TemporaryDirectory() as work:  # its own cache for the folder's code, and no cache of models
        env = kept | {"HF_HOME": work, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{work}/modules"}
        command = [sys.executable, "-I", str(CHILD), str(folder.resolve())]
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{folder.name}: does not load in a process without this package ({reason}).")
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser("export", "Make a folder for the Hub out of a checkpoint, and push it if asked.")
    parser.add_argument("--checkpoint", required=True, metavar="PISCES", help="folder or Hub id of a checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--card", metavar="FILE", help="model card (default: the checkpoint's README.md, or a short one)"
    )
    parser.add_argument("--license", metavar="ID", help="license for the card (default: the one that all parts share)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository to push to, created if it does not exist")
    seen_by = parser.add_mutually_exclusive_group()
    seen_by.add_argument("--private", action="store_true", default=True, help="a new repository is private (default)")
    seen_by.add_argument("--public", dest="private", action="store_false", help="a new repository is public")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    export(**vars(make_arguments().parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
