"""Reads collected pictures: every file decoded, hashed and measured, one row per picture. Nothing is dropped.

    python -m curation.scan --data raw/ --index work/index
    python -m curation.scan --data photos more.jsonl 'shards/*.tar' --license CC0-1.0 --index work/index

A folder of pictures (captions in `metadata.csv`, `metadata.jsonl` or text files, or none yet), JSON Lines, JSON, CSV,
tar shards, Parquet. Stop and repeat at will: a shard that is there is not made again. `docs/curation.md` has the rest.
"""

import argparse
import sys

from curation.records.scanning import run_scan
from curation.shards.index import Index
from curation.shards.options import end, make_parser, tell_unfinished
from modeling_pisces.image_loading_pisces import DEFAULT_MAX_PIXELS
from modeling_pisces.records.sources import ROWS_PER_SHARD, sources_of
from pisces_commands.arguments import COUNT
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("scan", __doc__.splitlines()[0], index=False)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="folders, files, patterns of shards")
    parser.add_argument("--index", required=True, metavar="FOLDER", help="index folder to write or to go on with")
    parser.add_argument("--license", help="of records that name none themselves")
    parser.add_argument(
        "--rows_per_shard", type=COUNT, default=ROWS_PER_SHARD, help="records of a folder or text file"
    )
    parser.add_argument("--max_pixels", type=COUNT, default=DEFAULT_MAX_PIXELS, help="larger pictures are not decoded")
    add_workers(parser)
    return parser


def summarize(index: Index) -> str:
    """Counts of a finished scan, in words."""
    num_pictures = num_samples = num_bad = 0
    for row in index.iter_rows("scores", columns=("picture", "problem")):
        num_samples += row["picture"] <= 0
        num_pictures += row["picture"] >= 0
        num_bad += row["problem"] is not None
    return f"{num_samples} records with {num_pictures} pictures in {index.num_shards} shards; {num_bad} cannot be read"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        index = run_scan(
            options.index,
            sources_of(options.data, options.license),
            workers_of(options),
            options.rows_per_shard,
            options.max_pixels,
        )
        if missing := index.missing("scan"):
            tell_unfinished("scan", len(missing), index.num_shards)
        else:
            print(summarize(index))

    return end(work, "scan")


if __name__ == "__main__":
    sys.exit(main())
