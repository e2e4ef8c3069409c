"""Looks at training data before a run does: counts, sizes, lengths, a preview, and every bad record by its place.

    python -m finetune.check_data --data photos captions.jsonl "{path: 'shards-{000..012}.tar', max_rows: 100}"
    python -m finetune.check_data --data data.yaml --checkpoint pisces-tiny --max_length 512 --sheet preview.png

With a checkpoint that draws, ten of the pictures that shall be drawn are encoded and decoded by it: what comes back is
the best that finetuning can reach without training the decoder. Every record is read and every picture decoded, as
training would. Exit code 0: all records can be used; 1: some cannot, or no row is short enough; 2: nothing could be
checked. What is counted is in `finetune.data.report`, what data may look like in `docs/data.md`.
"""

import argparse
import json
import sys
from collections import Counter, deque
from dataclasses import replace
from typing import Any

from tqdm import tqdm
from transformers import AutoProcessor

import modeling_pisces  # noqa: F401  # registers the processor
from finetune.data.load import load_source
from finetune.data.mixture import mix_rows
from finetune.data.packing import token_lengths
from finetune.data.report import SourceReport, plural
from finetune.data.schema import BadRecord, DataError, printable
from finetune.data.spec import DataSpec, parse_specs
from finetune.guard.ceiling import (
    MAX_PICTURES,
    ceiling_sections,
    ceiling_sentences,
    describe_ceiling,
    find_ceiling,
)
from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint
from modeling_pisces.checkpoint.loading import load_pipeline, quiet_libraries
from modeling_pisces.console.contact_sheet import make_contact_sheet
from pisces_commands.arguments import LineParser, whole_number
from pisces_commands.ending import EXIT_FAILED, EXIT_OK, CommandEnd, one_line_ending
from pisces_commands.writing import write_whole


EXIT_BAD_DATA = EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m finetune.check_data", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SPEC",
        help='file, folder, hf:owner/name, YAML file, or keys in braces: "{path: photos, side: both}"',
    )
    parser.add_argument(
        "--checkpoint",
        help="folder or Hub id: its processor counts tokens, its decoder shows what it can draw",
    )
    parser.add_argument(
        "--reconstructions",
        type=whole_number(0),
        default=MAX_PICTURES,
        help="drawn pictures of each source to encode and decode; 0 loads no model",
    )
    parser.add_argument(
        "--max_length", type=whole_number(), help="tokens; longer rows are listed (default: what the tokenizer takes)"
    )
    parser.add_argument("--limit", type=whole_number(), help="records to read of each source (default: all)")
    parser.add_argument("--sheet", metavar="FILE", help="write sample pictures with their words as one PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def open_source(spec: DataSpec) -> tuple[Any, list[BadRecord]]:
    """The source, however many of its records are bad; None and the records if all of them are.

    Raises:
        DataError: the source itself cannot be read.
    """
    try:
        return load_source(replace(spec, max_bad_records=1.0)), []
    except DataError as error:
        if not error.bad_records:
            raise
        return None, error.bad_records


def check_source(
    spec: DataSpec,
    source: Any,
    processor: Any = None,
    max_length: int | None = None,
    limit: int | None = None,
    previews: bool = False,
    num_samples: int = 0,
) -> SourceReport:
    """Read one source from begin to end.

    Args:
        spec: names the source.
        source: from `open_source`.
        processor: counts tokens; None leaves lengths out.
        max_length: rows with more tokens are reported as too long.
        limit: records to read; None for all.
        previews: keep sample pictures.
        num_samples: drawn pictures to keep in full, for the decoder.
    """
    report = SourceReport(spec.label, max_length=max_length, num_samples=num_samples)
    records = tqdm(source.iter_checked(), desc=spec.label, unit=" records", delay=2, leave=False, disable=None)
    rows = report.read(records, limit, previews, processor)
    if processor is None:
        deque(rows, maxlen=0)
    else:
        report.lengths = token_lengths(rows, processor)
    report.unused = Counter(source.unused)
    return report


def load_processor(checkpoint: str) -> Any:
    """The processor of a checkpoint.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        return AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise DataError(f"--checkpoint {checkpoint}: no processor ({' '.join(str(error).split())[:200]})") from error


def check(args: argparse.Namespace) -> int:
    """Check what the arguments name, print it, and return the exit code."""
    for name in ("limit", "max_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise DataError(f"--{name} {value}: expected at least 1.")
    specs = parse_specs(args.data)
    processor = load_processor(args.checkpoint) if args.checkpoint else None
    max_length = args.max_length or (processor.tokenizer.model_max_length if processor else None)
    if args.max_length and processor is None:
        raise DataError("--max_length needs --checkpoint, whose processor counts the tokens.")
    opened = [open_source(spec) for spec in specs]
    num_samples = args.reconstructions if args.checkpoint else 0
    reports = [
        check_source(spec, source, processor, max_length, args.limit, bool(args.sheet), num_samples)
        if source is not None
        else SourceReport(spec.label, bad_records=bad_records)
        for spec, (source, bad_records) in zip(specs, opened, strict=True)
    ]
    if any(report.samples for report in reports):
        reconstruct_samples(reports, args.checkpoint)
    print_reports(reports, mixture_shares(specs, [source for source, _ in opened]), args.json)
    code = judge(reports)
    if args.sheet and (code == EXIT_OK or any(report.previews for report in reports)):
        write_sheet(reports, args.sheet)
    elif args.sheet:
        print(f"check_data: {args.sheet} was not written: no record can be shown", file=sys.stderr)
    return code


def reconstruct_samples(reports: list[SourceReport], checkpoint: str) -> None:
    """Let the checkpoint's decoder draw the samples of each report; without a decoder there is nothing to compare.

    Raises:
        DataError: there is a decoder, and it cannot be loaded.
    """
    try:
        folder = find_checkpoint(checkpoint)
        if not (folder / "model_index.json").is_file():
            return
        check_checkpoint(folder, with_decoder=True)
        with quiet_libraries():
            pipeline = load_pipeline(folder)
    except ValueError as error:
        raise DataError(f"--checkpoint {checkpoint}: {error} --reconstructions 0 leaves the decoder out.") from error
    pipeline.set_progress_bar_config(disable=True)
    for report in (report for report in reports if report.samples):
        found = find_ceiling(pipeline, report.samples)
        report.decoder = describe_ceiling(found)
        report.decoder_lines = ceiling_sentences(report.decoder)
        report.decoder_sections = ceiling_sections(found, report.name)


def mixture_shares(specs: list[DataSpec], sources: list[Any]) -> dict[str, dict[str, Any]]:
    """What share of the rows each of several sources gets; empty for one source, or if one cannot be used."""
    if len(sources) < 2 or None in sources:
        return {}
    return mix_rows(sources, [spec.weight for spec in specs]).shares()


def write_sheet(reports: list[SourceReport], path: str) -> None:
    """Write the previews of all sources as one picture.

    Raises:
        DataError: there is nothing to show.
        WriteError: the file cannot be written.
    """
    try:
        write_whole(path, make_contact_sheet([section for report in reports for section in report.sections()]).save)
    except ValueError as error:
        raise DataError(f"--sheet {path}: {error}") from error


def print_reports(reports: list[SourceReport], shares: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        numbers = {"sources": [report.as_dict() for report in reports], "mixture": shares}
        text = json.dumps(numbers, indent=1, ensure_ascii=False)
        print(text.encode("utf-8", "backslashreplace").decode())  # half of a surrogate pair, as JSON writes it
        return
    print(_writable("\n\n".join(report.as_text() for report in reports)))
    if shares:
        print("\nmixture")
        for name, numbers in shares.items():
            rounds = f", {numbers['rows_per_epoch']} rows per epoch" if "rows_per_epoch" in numbers else ""
            print(f"  {numbers['share']:6.1%}  {name}{rounds}")


def _writable(text: str) -> str:
    """Ids and names come from somebody's data: without what a terminal obeys and what UTF-8 cannot say."""
    return "\n".join(map(printable, text.split("\n")))


def judge(reports: list[SourceReport]) -> int:
    """The exit code, with the reason on stderr."""
    num_bad = sum(len(report.bad_records) for report in reports)
    if num_bad:
        print(f"check_data: {plural(num_bad, 'bad record')}", file=sys.stderr)
        return EXIT_BAD_DATA
    for report in reports:
        if report.lengths and len(report.too_long) == report.num_rows:
            print(
                f"check_data: error: {report.name}: all {report.num_rows} rows have more than {report.max_length} "
                f"tokens (the shortest {min(report.lengths)}). Raise --max_length or shorten them.",
                file=sys.stderr,
            )
            return EXIT_BAD_DATA
    return EXIT_OK


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        with one_line_ending("check_data: error: "):
            return check(args)
    except CommandEnd as end:
        return end.code


if __name__ == "__main__":
    sys.exit(main())
