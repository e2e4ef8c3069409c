"""Writes the training set: Parquet or tar shards, an index with the provenance of every row, and a data card.

    python -m curation.export --index work/index --output curated/
    python -m finetune.check_data --data curated/

Picture files are copied as they are. A shard that is there is not written again; the same index gives the same bytes.
"""

import argparse
import sys

from curation.records.exporting import DEFAULTS, export_settings, run_export, tell_export
from curation.records.writing import FORMATS
from curation.shards.index import Index
from curation.shards.options import end, make_parser
from pisces_commands.arguments import SEED, SHARE
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("export", __doc__.splitlines()[0])
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write or to go on with")
    parser.add_argument("--format", choices=FORMATS, default=DEFAULTS["format"], help="tar: for reading as a stream")
    parser.add_argument(
        "--keep_short", type=SHARE, default=DEFAULTS["keep_short"], help="share of rows that keep their short caption"
    )
    parser.add_argument("--seed", type=SEED, default=DEFAULTS["seed"], help="of the choice between captions")
    add_workers(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        settings = {name: getattr(options, name) for name in DEFAULTS}
        numbers = run_export(
            Index(options.index), options.output, export_settings(settings, "flags"), workers_of(options)
        )
        print(tell_export(numbers) if numbers else "export: other --shard parts write the rest")

    return end(work, "export")


if __name__ == "__main__":
    sys.exit(main())
