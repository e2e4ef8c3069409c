"""Checks that every part of a checkpoint computes inside it what the public part computes alone.

`python -m conversion.verify --checkpoint PISCES [--part ROLE=FOLDER_OR_HUB_ID[@COMMIT] ...]`. Parts default to those
that `provenance.json` names with a commit. Each is loaded with its own stock class, run on the same input as the whole
model, and the largest difference goes into a table; the command fails if one is too large. How a role is run is in
`verify_parts.py`.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conversion.assembly.parts import Part, open_part
from conversion.checks.parts import COMPARISONS, WholeModel
from conversion.storage.command import run_command
from conversion.storage.hub_files import looks_local
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_json
from pisces_commands.arguments import LineParser, finite_number
from pisces_commands.ending import CommandFailed


# Equal weights give equal numbers up to where they lie in memory; worst of the tiny parts, fp32: 0.0
TOLERANCE = 1e-5
PASSED, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"


@dataclass(frozen=True)
class Row:
    """One line of the table: `difference` is relative to the largest value; None where nothing could be compared."""

    part: str
    compared: str
    difference: float | None
    tolerance: float | None
    verdict: str


def verify(
    checkpoint: str | Path,
    parts: Mapping[str, str] | None = None,
    revision: str | None = None,
    tolerance: float = TOLERANCE,
) -> list[Row]:
    """Compare every part with the checkpoint, on the CPU, in fp32 after rounding to the checkpoint's dtype.

    Args:
        checkpoint: folder or Hub id.
        parts: role -> folder, or Hub id@commit; added to those that `provenance.json` names.
        revision: branch, tag or commit of the checkpoint on the Hub.
        tolerance: largest relative difference of computed numbers. Tokens must be equal.

    Raises:
        ValueError: an unknown role, no part at all, or a part or checkpoint that cannot be opened.
    """
    folder = find_checkpoint(str(checkpoint), revision)
    check_checkpoint(folder)
    if read_json(folder / "config.json").get("quantization_config"):
        raise ValueError(
            f"{checkpoint}: is quantized, so no part can be equal. Verify the checkpoint it was made from."
        )
    named = recorded_parts(folder) | {role: str(name) for role, name in (parts or {}).items()}
    if unknown := sorted(named.keys() - COMPARISONS.keys()):
        raise ValueError(f"part {unknown[0]!r}: expected one of {', '.join(COMPARISONS)}.")
    if not any(named.values()):
        raise ValueError(
            f"{checkpoint}: no part to compare with. Name them: --part language_model=FOLDER; provenance.json "
            f"{'has no Hub ids' if named else 'names none'}."
        )
    opened = {role: _open(role, named[role]) for role in COMPARISONS if named.get(role)}
    whole = WholeModel.load(folder)
    rows = [row for role, part in opened.items() for row in _compare(role, part, whole, tolerance)]
    # projectors, head and rows of new tokens have no other place to compare with
    lacking = [role for role, name in named.items() if not name]
    return rows + [Row(role, f"give it with --part {role}=FOLDER", None, None, NOT_CHECKED) for role in lacking]


def recorded_parts(folder: Path) -> dict[str, str]:
    """Role -> Hub id@commit of what `provenance.json` names; an empty string for a part that was a local folder."""
    record = folder / "provenance.json"
    parts = read_json(record).get("parts", {}) if record.is_file() else {}
    return {
        role: f"{part['name']}@{part['revision']}" if part.get("revision") else ""
        for role, part in parts.items()
        if role in COMPARISONS
    }


def _open(role: str, name: str) -> Part:
    if Path(name).expanduser().exists() or looks_local(name):
        hub_id, commit = name, ""
    else:
        hub_id, _, commit = name.partition("@")
    return open_part(hub_id, commit or None, "raw" if role == "llava" else role)


def _compare(role: str, part: Part, whole: WholeModel, tolerance: float) -> list[Row]:
    rows = []
    for compared, difference in COMPARISONS[role](part, whole):
        allowed = 0.0 if compared == "tokens" else tolerance
        rows.append(Row(role, compared, difference, allowed, PASSED if difference <= allowed else FAILED))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns under a heading."""
    lines = [("part", "compared", "largest difference", "tolerance", "verdict")]
    for row in rows:
        difference, tolerance = ("-" if value is None else f"{value:.1e}" for value in (row.difference, row.tolerance))
        lines.append((row.part, row.compared, difference, tolerance, row.verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def make_arguments() -> ArgumentParser:
    parser = LineParser(
        prog="python -m conversion.verify",
        description="Check that every part computes inside a checkpoint what it computes alone. Needs memory for the "
        "checkpoint and one part in fp32.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PISCES", help="folder or Hub id of a checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        metavar="ROLE=PART",
        help=f"a folder, or a Hub id@commit; roles: {', '.join(COMPARISONS)} (default: as provenance.json says)",
    )
    parser.add_argument(
        "--tolerance",
        type=finite_number(0, 1000),
        default=TOLERANCE,
        help="largest relative difference (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_arguments().parse_args(arguments)
    if wrong := [text for text in options.part if "=" not in text]:
        raise ValueError(f"--part {wrong[0]}: expected ROLE=PART, such as language_model=FOLDER.")
    parts = dict(text.split("=", 1) for text in options.part)
    rows = verify(options.checkpoint, parts, options.revision, options.tolerance)
    failed = [row for row in rows if row.verdict == FAILED]
    if options.json:
        print(json.dumps({"passed": not failed, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(format_table(rows))
    if failed:
        raise CommandFailed(
            f"{options.checkpoint}: {failed[0].part}, {failed[0].compared}: differs by {failed[0].difference:.1e}, "
            f"more than {failed[0].tolerance:g} ({len(failed)} of {len(rows)} comparisons failed)."
        )


if __name__ == "__main__":
    run_command(main)
