"""Decides picture by picture: size, shape, flat, blurred, words, and scores of models that you name.

    python -m curation.filter --index work/index --config curation/configs/drawing.yaml

The rules and their thresholds stand in the YAML file; a rejected picture keeps its row, with the rule and the number.
"""

import argparse
import sys

from curation.rules.thresholds import check_settings
from curation.shards.index import Index
from curation.shards.options import end, make_parser, read_yaml, tell_rules, tell_unfinished
from curation.stages.filtering import run_filter
from curation.stages.flow import STAGE_GROUPS
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("filter", __doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file with groups of rules (others in it are not read)")
    add_workers(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        config = read_yaml(options.config, "--config")
        rules = {group: values for group, values in config.items() if group not in STAGE_GROUPS}
        index = Index(options.index)
        if run_filter(index, check_settings(rules, options.config), workers_of(options)):
            print(tell_rules(index, "dedup"))
        else:
            stage = "scores" if index.missing("scores") and "scores" in index.stages else "filter"
            tell_unfinished(stage, len(index.missing(stage)), index.num_shards)

    return end(work, "filter")


if __name__ == "__main__":
    sys.exit(main())
