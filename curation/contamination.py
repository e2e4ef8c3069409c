"""Finds pictures and prompts of benchmarks in what is kept, lists each hit, and drops it from the training set.

    python -m curation.contamination --index work/index --pictures bench/ --prompts evaluation_metadata.jsonl --strict

Pictures are found when they were encoded again or resized; crops are not looked for. A prompt of at least four words
is found where it stands in a caption; of a prompt longer than eight words, any eight in a row.
"""

import argparse
import sys

from curation.shards.index import Index
from curation.shards.options import end, make_parser, tell_unfinished
from curation.stages.benchmarks import DEFAULTS, contamination_settings, run_contamination
from pisces_commands.arguments import finite_number, whole_number
from pisces_commands.ending import EXIT_FAILED
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("contamination", __doc__.splitlines()[0])
    parser.add_argument("--pictures", nargs="+", default=[], metavar="FOLDER", help="folders of benchmark pictures")
    parser.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE", help=".txt, .jsonl or .json of a benchmark"
    )
    parser.add_argument("--phash_bits", type=whole_number(0, 16), default=DEFAULTS["phash_bits"], help="of 64")
    parser.add_argument(
        "--thumb_distance", type=finite_number(0, 255), default=DEFAULTS["thumb_distance"], help="grey levels"
    )
    parser.add_argument("--min_words", type=whole_number(1, 100), default=DEFAULTS["min_words"], help="of a prompt")
    parser.add_argument("--ngram", type=whole_number(1, 100), default=DEFAULTS["ngram"], help="words in a row")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if anything was found")
    add_workers(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> int | None:
        settings = contamination_settings({name: getattr(options, name) for name in DEFAULTS}, "flags")
        index = Index(options.index)
        if not run_contamination(index, settings, workers_of(options)):
            tell_unfinished("contamination", len(index.missing("contamination")), index.num_shards)
            return None
        hits = [row for row in index.iter_rows("caption", ("id",)) if (row["rule"] or "").startswith("benchmark_")]
        for row in hits:
            print(f"{row['id']}: {row['detail']}")
        print(f"{len(hits)} rows stand in a benchmark")
        return EXIT_FAILED if hits and options.strict else None

    return end(work, "contamination")


if __name__ == "__main__":
    sys.exit(main())
