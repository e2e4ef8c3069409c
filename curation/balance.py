"""Caps each source, licence, tag or cluster of look-alikes, and shows every group before and after.

python -m curation.balance --index work/index --by source --cap 20000
python -m curation.balance --index work/index --by cluster --clusters 256 --cap 2000
python -m curation.balance --index work/index --by field:tag --cap 500
"""

import argparse
import sys

from curation.shards.index import Index
from curation.shards.options import end, make_parser
from curation.stages.balancing import DEFAULTS, balance_settings, count_groups, run_balance
from pisces_commands.arguments import COUNT, SEED


SHOWN = 20


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("balance", __doc__.splitlines()[0])
    parser.add_argument("--by", required=True, help="source, license, cluster, or field:NAME of the records")
    parser.add_argument("--cap", type=COUNT, required=True, help="most rows of one group")
    parser.add_argument("--clusters", type=COUNT, default=DEFAULTS["clusters"], help="number of clusters")
    parser.add_argument(
        "--seed", type=SEED, default=DEFAULTS["seed"], help="of the choice of rows and of the clusters"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        index = Index(options.index)
        run_balance(index, balance_settings({name: getattr(options, name) for name in DEFAULTS}, "flags"))
        groups = count_groups(index)
        print(f"{sum(after for _, _, after in groups)} of {sum(before for _, before, _ in groups)} rows are kept")
        for group, before, after in groups[:SHOWN]:
            print(f"  {before:8d} -> {after:8d}  {group}")
        if len(groups) > SHOWN:
            print(f"  and {len(groups) - SHOWN} smaller groups")

    return end(work, "balance")


if __name__ == "__main__":
    sys.exit(main())
