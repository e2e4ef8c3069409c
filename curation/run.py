"""All of it from one YAML file: scan, filter, dedup, contamination, caption, balance, export.

    python -m curation.run --config curation/configs/drawing.yaml --data raw/ --output curated/

The index lies in `curated.index` beside the output unless `--index` names another folder. Stop, kill and repeat at
will: what is done is not done again, and the output is the same byte for byte. With `--shard i/n` each part does its
share of the stages that go shard by shard and stops where all shards are needed; repeat until it says that it is done.
"""

import argparse
import sys
from pathlib import Path

from curation.records.exporting import tell_export
from curation.shards.options import end, make_parser, read_yaml
from curation.stages.flow import check_config, run_all
from modeling_pisces.records.sources import ROWS_PER_SHARD, sources_of
from pisces_commands.arguments import COUNT
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("run", __doc__.splitlines()[0], index=False)
    parser.add_argument(
        "--config", required=True, help="YAML file with a group per stage; a stage left out is not run"
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="folders, files, patterns of shards")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="training set to write or to go on with")
    parser.add_argument("--index", metavar="FOLDER", help="index folder (default: OUTPUT.index)")
    parser.add_argument("--license", help="of records that name none themselves")
    parser.add_argument(
        "--rows_per_shard", type=COUNT, default=ROWS_PER_SHARD, help="records of a folder or text file"
    )
    add_workers(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        config = check_config(read_yaml(options.config, "--config"), options.config)
        output = Path(options.output)
        index = options.index or output.with_name(f"{output.name}.index")
        sources = sources_of(options.data, options.license)
        result = run_all(config, sources, index, output, workers_of(options), options.rows_per_shard)
        print(f"run: {result}" if isinstance(result, str) else tell_export(result))

    return end(work, "run")


if __name__ == "__main__":
    sys.exit(main())
