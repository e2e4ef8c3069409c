"""Drops copies: the same file, the same pixels, re-encoded, resized, cropped; or what a model cannot tell apart.

    python -m curation.dedup --index work/index
    python -m curation.dedup --index work/index --phash_bits 4 --model openai/clip-vit-base-patch32 --cosine 0.96

The largest of a group stays; every other row names the rule, the distance and the picture that stays for it.
"""

import argparse
import sys

from curation.shards.index import Index
from curation.shards.options import end, make_parser, tell_rules
from curation.stages.copies import CopyRules
from curation.stages.deduplication import KEEP, copy_rules, run_dedup
from pisces_commands.arguments import SHARE, finite_number, whole_number


def build_parser() -> argparse.ArgumentParser:
    rules = CopyRules()
    parser = make_parser("dedup", __doc__.splitlines()[0])
    parser.add_argument("--phash_bits", type=whole_number(0, 16), help=f"of 64 (default: {rules.phash_bits})")
    parser.add_argument(
        "--thumb_distance", type=finite_number(0, 255), help=f"grey levels (default: {rules.thumb_distance})"
    )
    parser.add_argument("--crop_distance", type=finite_number(0, 255), help=f"default: {rules.crop_distance}")
    parser.add_argument("--cosine", type=SHARE, help=f"default: {rules.cosine}, with --model 0.96")
    parser.add_argument("--no_crops", action="store_true", help="do not look for crops: time grows with the square")
    parser.add_argument("--mirrored", action="store_true", help="a mirrored picture is a copy; mind left and right")
    parser.add_argument("--keep", choices=KEEP, help="which one stays (default: largest)")
    parser.add_argument("--model", help="Pisces checkpoint, CLIP or SigLIP whose vectors replace the crop search")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        names = ("phash_bits", "thumb_distance", "crop_distance", "cosine", "keep", "model")
        settings = {name: value for name in names if (value := getattr(options, name)) is not None}
        settings |= {"crops": not options.no_crops, "mirrored": options.mirrored}
        index = Index(options.index)
        run_dedup(index, *copy_rules(settings, "flags"))
        print(tell_rules(index, "contamination"))

    return end(work, "dedup")


if __name__ == "__main__":
    sys.exit(main())
