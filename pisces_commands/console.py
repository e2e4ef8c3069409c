"""The console command `pisces`: its arguments, its exit codes, and one line for every error.

`main` is the entry point of the installed package. What the commands do is in
`modeling_pisces/console/commands.py`, imported only when a command runs, so that `--help` and a wrong argument answer
before the heavy libraries are read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from pisces_commands.arguments import COUNT, SEED, LineParser, add_adapter_flag, finite_number
from pisces_commands.console_many import add_embed, add_many, add_search, check_many, loosened
from pisces_commands.ending import EXIT_OK, CommandEnd, one_line_ending


DEFAULT_MODEL = "pisces-tiny"

DESCRIPTION = "Ask a Pisces model about pictures, and let it draw."
EPILOG = f"""\
examples:
  pisces describe photo.png
  pisces describe pictures/ --question "How many objects are there?" --question "What color is the star?"
  pisces draw "a red circle" "two blue stars" --num_images 4 --seed 7 --output drawings --sheet drawings/sheet.png
  pisces edit photo.png "make the circle red" --then "add a star at the top" --output edited
  pisces reconstruct photo.png --output photo_again.png
  pisces embed photos/ --output index
  pisces search index --text "a red circle" --image photo.png
  pisces describe --data photos.tar --output described --shard 0/16
  pisces info ./{DEFAULT_MODEL} --json
  pisces push runs/mine --repo me/my-emoji --license cc-by-4.0
  pisces serve --port 8000
  pisces space my_space --model me/my-pisces

checkpoints:
  --model takes a folder or a Hub id (owner/name). Without it the folder ./{DEFAULT_MODEL} is used.
  --adapter puts a trained adapter on it; an adapter given as --model brings its base along.

exit codes:
  0  everything was done
  1  something failed while running, or some of the pictures or prompts could not be used
  2  nothing was done: wrong arguments, an unusable checkpoint, or no usable picture or prompt
  130  interrupted

Answers go to standard output, everything else to standard error. `pisces COMMAND --help` tells more.
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to know."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(LineParser):
    judged_later = ("--question", "--then")

    def parse_known_args(self, args=None, namespace=None):
        with loosened(self, args):
            namespace, rest = super().parse_known_args(args, namespace)
        check_many(self, namespace)
        return namespace, rest


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; `args.command` names the subcommand."""
    parser = _Parser(
        prog="pisces", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"pisces {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_describe(commands)
    _add_draw(commands)
    _add_edit(commands)
    _add_reconstruct(commands)
    _add_info(commands)
    _add_push(commands)
    _add_serve(commands)
    add_embed(partial(_add_command, commands))
    add_search(partial(_add_command, commands))
    _add_space(commands)
    return parser


def _add_command(commands, name: str, summary: str, description: str, runs_model: bool = True) -> LineParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {description}",
        formatter_class=_HelpFormatter,
    )
    common = parser.add_argument_group("common options")
    common.add_argument("--model", metavar="CHECKPOINT", help=f"folder or Hub id (default: ./{DEFAULT_MODEL})")
    common.add_argument("--revision", help="branch, tag or commit of a Hub id")
    add_adapter_flag(common)
    if runs_model:
        common.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to run")
        common.add_argument(
            "--dtype",
            choices=["auto", "float32", "bfloat16", "float16"],
            default="auto",
            help="number format of the weights; auto is the checkpoint's own",
        )
        common.add_argument(
            "--trust_remote_code",
            action="store_true",
            help="run Python code that the checkpoint brings; only for a source you trust",
        )
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_argument("--verbose", action="store_true", help="show library messages, and the traceback of an error")
    return parser


def _add_describe(commands) -> None:
    parser = _add_command(
        commands,
        "describe",
        "answer questions about pictures",
        "Prints one line per picture and question; writes no file unless --sheet is given.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture file, URL, or a folder of pictures")
    parser.add_argument(
        "--question",
        action="append",
        dest="questions",
        help="asked about every picture; give it several times for several questions (default: Describe the picture.)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=COUNT,
        help="longest answer, in tokens (default: the checkpoint's, or 128)",
    )
    _add_sheet(parser)
    add_many(parser, ("images",), chats=True)


def _add_draw(commands) -> None:
    parser = _add_command(
        commands,
        "draw",
        "draw pictures from prompts",
        "Writes PNG files and prints their paths. Picture k of a prompt uses seed SEED + k, whatever else is drawn "
        "with it, so the same prompt and seed give the same picture again.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("--num_images", type=COUNT, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=SEED, default=0, help="start of the random numbers")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="draw everything twice, without and with the adapters, and write the sheet (default: OUTPUT/compare.png)",
    )
    _add_drawing_options(parser)
    _add_output(parser)
    _add_sheet(parser)
    add_many(parser, ("prompts",))


def _add_edit(commands) -> None:
    parser = _add_command(
        commands,
        "edit",
        "change a picture as an instruction says",
        "The model sees the picture and draws it anew, changed; the vectors between the two keep what is shown, not "
        "every pixel of it. Only a checkpoint that was trained on edits follows instructions. Each turn uses the same "
        "seed. Writes a PNG file for each turn and prints their paths.",
    )
    parser.add_argument("image", metavar="IMAGE", help="picture file or URL")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to change")
    parser.add_argument(
        "--then",
        action="append",
        metavar="INSTRUCTION",
        help="change the result of the turn before; give it several times for several turns",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="start of the random numbers")
    _add_drawing_options(parser)
    parser.add_argument(
        "--strength",
        type=finite_number(-1000, 1000),  # as the one above
        help="start from the picture itself, with this share of the noise, above 0 and at most 1; a small one keeps "
        "more of the pixels (default: start from noise)",
    )
    _add_output(parser, "With a file name and several turns only the last picture is written")
    _add_sheet(parser)
    add_many(parser, ("image", "instruction"), edits=True)


def _add_reconstruct(commands) -> None:
    parser = _add_command(
        commands,
        "reconstruct",
        "encode pictures into vectors and decode them again",
        "Shows what the generation encoder and the decoder keep, without the language model. Writes PNG files and "
        "prints their paths.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture file, URL, or a folder of pictures")
    parser.add_argument("--seed", type=SEED, default=0, help="start of the random numbers")
    _add_drawing_options(parser)
    _add_output(parser)
    _add_sheet(parser)


def _add_info(commands) -> None:
    parser = _add_command(
        commands,
        "info",
        "show what a checkpoint holds",
        "Parts, parameters, number formats, vectors per image, tokens and decoder, read from the configuration and "
        "the file headers; no weight is loaded.",
        runs_model=False,
    )
    parser.add_argument("checkpoint", nargs="?", help="the same as --model")


def _add_push(commands) -> None:
    summary = "publish a checkpoint or an adapter on the Hub"
    parser = commands.add_parser(
        "push",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. One commit, all of it or nothing; the repository is private "
        "unless --public is given. A push that broke off goes on with the same command.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint, exported checkpoint or adapter")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; made when missing")
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that is made now")
    parser.add_argument("--license", help="for the card, for example apache-2.0 (default: what the card says)")
    parser.add_argument("--data", metavar="TEXT", help="what it was trained on, in a sentence for the card")
    parser.add_argument("--base", metavar="OWNER/NAME", help="of an adapter: its base, as others find it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--verbose", action="store_true", help="show library messages, and the traceback of an error")


def _add_serve(commands) -> None:
    from pisces_serving.flags import add_serve

    add_serve(commands, _HelpFormatter)


def _add_space(commands) -> None:
    summary = "write a folder for a Hugging Face Space"
    parser = commands.add_parser(
        "space",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: the page with chat, drawing, editing and adapters, the code "
        "it needs and a card. Nothing is uploaded. `python OUTPUT/app.py` starts it here, where gradio is installed.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("output", metavar="OUTPUT", help="new folder")
    parser.add_argument(
        "--model",
        metavar="CHECKPOINT",
        default=DEFAULT_MODEL,
        help="folder, which is copied into the Space, or Hub id, which the Space downloads",
    )
    add_adapter_flag(parser)
    parser.add_argument("--title", metavar="TEXT", help="of the Space (default: made of the model's name)")
    parser.add_argument("--license", default="apache-2.0", help="of the code and of a checkpoint that is copied")
    parser.add_argument(
        "--hardware", help="what the card suggests (default: cpu-basic for a small folder, else zero-a10g)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--verbose", action="store_true", help="show library messages, and the traceback of an error")


def _add_drawing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=COUNT, help="denoising steps (default: the pipeline's)")
    parser.add_argument(
        "--guidance_scale",
        type=finite_number(-1000, 1000),  # the pipeline knows which of these it takes
        help="how strongly the decoder follows the vectors; 1 is off (default: the pipeline's)",
    )


def _add_output(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--output",
        default="outputs",
        metavar="PATH",
        help="folder for the pictures, made when missing; or one file name ending in .png, .jpg or .webp for a single "
        "picture. Files of the same name are replaced" + (f". {more}" if more else ""),
    )


def _add_sheet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sheet", metavar="FILE", help="also write all pictures with captions as one PNG")


def _version() -> str:
    try:
        return version("modeling-pisces")
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for what a user can cause."""
    try:
        args = build_parser().parse_args(argv)
        ending = {"every_error": True, "verbose": args.verbose, "tell": partial(_tell, args)}
        with one_line_ending("pisces: error: ", **ending):
            return _run(args)
    except CommandEnd as end:
        return end.code
    except SystemExit as stop:  # --help, --version and wrong arguments
        return EXIT_OK if stop.code is None else int(stop.code)


def _run(args: argparse.Namespace) -> int:
    if args.command == "serve":  # the process that serves reads the heavy libraries; this one watches it
        from pisces_serving.supervisor import serve

        return serve(args)
    try:
        if args.command == "space":
            from pisces_demo.space import run_space

            return run_space(args)
        from modeling_pisces.console.commands import run_command
    except ImportError as error:
        raise ImportError(f"{error}. Install the missing package and try again.") from error
    return run_command(args)


def _tell(args: argparse.Namespace, message: str, code: int) -> None:
    if args.json:
        print(json.dumps({"command": args.command, "error": message}))


if __name__ == "__main__":
    sys.exit(main())
