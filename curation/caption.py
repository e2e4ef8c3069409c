"""Writes short and detailed captions, by our own model or any server with OpenAI's chat API, and checks them.

    python -m curation.caption --index work/index --styles short detailed --model pisces-tiny
    python -m curation.caption --index work/index --server http://127.0.0.1:8000/v1 --server_model NAME

Refusals, loops, empty praise and answers that were cut are not used; the row keeps its caption and the reason. Writer,
request and sampling stand in every row.
"""

import argparse
import sys
from collections import Counter

from curation.models.captioning import DEFAULTS, STYLES, caption_settings, run_captions
from curation.shards.index import Index
from curation.shards.options import end, make_parser, tell_unfinished
from pisces_commands.arguments import COUNT, finite_number
from pisces_commands.shards import add_workers, workers_of


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("caption", __doc__.splitlines()[0])
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="which captions to write")
    parser.add_argument("--model", help="folder of a Pisces checkpoint")
    parser.add_argument("--server", metavar="URL", help="root of an OpenAI-compatible API; key from OPENAI_API_KEY")
    parser.add_argument("--server_model", help="the server's name for its model")
    parser.add_argument("--short", default=DEFAULTS["short"], help="request for a short caption")
    parser.add_argument("--detailed", default=DEFAULTS["detailed"], help="request for a detailed one")
    parser.add_argument("--max_new_tokens", type=COUNT, default=DEFAULTS["max_new_tokens"], help="of one caption")
    parser.add_argument("--agreement", metavar="MODEL", help="compares words and picture, before and after")
    parser.add_argument("--max_loss", type=finite_number(0), help="a new caption may agree less by this much")
    add_workers(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        settings = caption_settings({name: getattr(options, name) for name in DEFAULTS}, "flags")
        index = Index(options.index)
        if not run_captions(index, settings, workers_of(options)):
            tell_unfinished("caption", len(index.missing("caption")), index.num_shards)
            return
        print(summarize(index, settings["styles"]))

    return end(work, "caption")


def summarize(index: Index, styles: list[str]) -> str:
    """How many captions of each style are used, and why others are not."""
    names = [f"{kind}_{style}" for style in styles for kind in ("caption", "refused")]
    rows = [row for row in index.iter_rows("balance", (*names, "captioner")) if row["captioner"]]
    lines = []
    for style in styles:
        used = sum(row[f"caption_{style}"] is not None for row in rows)
        reasons = Counter((row[f"refused_{style}"] or "").split(":")[0].split(" (")[0] for row in rows)
        reasons.pop("", None)
        refused = "".join(f"\n  {count:8d}  {reason}" for reason, count in reasons.most_common())
        lines.append(f"{style}: {used} of {len(rows)} captions are used{refused}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
