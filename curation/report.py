"""Shows what an index holds: counts, percentiles, histograms, and pictures on both sides of every threshold.

    python -m curation.report --index work/index
    python -m curation.report --index work/index --sheet work/sheet.png --examples 10

Run it after a scan to choose thresholds, and after a filter to see what they do. The sheet has the pictures nearest to
each threshold: what would be dropped next, and what would be kept next.
"""

import argparse
import json
import sys

from curation.shards.index import Index
from curation.shards.options import end, make_parser
from curation.stages.reporting import Report
from modeling_pisces.console.contact_sheet import make_contact_sheet
from pisces_commands.arguments import COUNT
from pisces_commands.writing import write_whole


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("report", __doc__.splitlines()[0])
    parser.add_argument("--sheet", metavar="FILE", help="write the pictures nearest to each threshold as one PNG")
    parser.add_argument("--examples", type=COUNT, default=10, help="pictures on each side of a threshold")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        index = Index(options.index)
        index.require("export")
        report = Report(index, options.examples)
        if options.sheet:
            sections = report.sections()
            if not any(section.tiles for section in sections):
                raise ValueError("--sheet: there is no threshold to show yet. Run python -m curation.filter first.")
            write_whole(options.sheet, make_contact_sheet(sections, tile_side=128, columns=10).save)
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=1) if options.json else report.as_text())

    return end(work, "report")


if __name__ == "__main__":
    sys.exit(main())
