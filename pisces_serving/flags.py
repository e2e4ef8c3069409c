"""The flags of `pisces serve`; read before any heavy library."""

import argparse
import re
from typing import Any

from pisces_commands.arguments import COUNT, finite_number, whole_number

from .settings import Settings


DEFAULTS = Settings()
EXAMPLES = """\
examples:
  pisces serve --model ./pisces-tiny
  pisces serve --model owner/name --adapter emoji=runs/emoji --host 0.0.0.0 --api_key "$KEY"

Listens on this machine alone unless --host says otherwise. docs/serve.md has requests to try.
"""
LIMITS: dict[str, tuple[Any, str]] = {
    "max_body_mib": (whole_number(1, 1024), "largest body of a request, in MiB (413)"),
    "max_pixels": (COUNT, "pixels of a picture that is sent (400)"),
    "max_draw_pixels": (COUNT, "pixels of a picture that is drawn (400)"),
    "max_images": (COUNT, "pictures that one request shows (400)"),
    "max_prompt_tokens": (COUNT, "tokens of a chat's messages (400)"),
    "max_tokens": (COUNT, "tokens of an answer (400)"),
    "max_n": (COUNT, "pictures drawn for one request (400)"),
    "max_steps": (COUNT, "denoising steps (400)"),
    "max_inputs": (COUNT, "texts and pictures of one request for embeddings (400)"),
    "max_queue": (COUNT, "requests that may wait (429)"),
    "max_batch": (COUNT, "rows that run together; 1 draws each picture as if alone, to the bit"),
    "batch_wait_ms": (finite_number(0, 10_000), "how long the first request of a batch waits for others"),
    "deadline_s": (finite_number(above=0, most=86_400), "longest wait for an answer (504)"),
    "grace_s": (finite_number(0, 3600), "how long running requests may go on after SIGTERM (503)"),
}


def add_serve(commands: Any, formatter: Any) -> None:
    """Add the sub-command `serve` to the parser of `pisces`."""
    summary = "answer requests of OpenAI's clients over HTTP"
    parser = commands.add_parser(
        "serve",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: chat about pictures, draw, edit, embed. Runs until it is "
        "stopped; a serving process that dies is started again.",
        epilog=EXAMPLES,
        formatter_class=type("_Raw", (formatter, argparse.RawDescriptionHelpFormatter), {}),
    )
    parser.add_argument("--model", metavar="CHECKPOINT", help="folder or Hub id (default: ./pisces-tiny)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=named_adapter,
        metavar="NAME=FOLDER_OR_ID",
        help="serve an adapter as MODEL:NAME beside the base; give it several times for several",
    )
    parser.add_argument("--served_name", type=served_name, metavar="NAME", help="of the base (default: CHECKPOINT's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to run")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="number format of the weights")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the checkpoint brings")
    parser.add_argument("--host", default=DEFAULTS.host, help="address to listen on; 0.0.0.0 is every network")
    parser.add_argument("--port", type=whole_number(0, 65535), default=DEFAULTS.port, help="0 takes a free one")
    parser.add_argument(
        "--api_key", help="what clients must send (default: the variable PISCES_API_KEY; without both no key is asked)"
    )
    parser.add_argument(
        "--allow_urls",
        action="store_true",
        help="fetch pictures from http addresses that clients name, inside your network too",
    )
    limits = parser.add_argument_group("limits")
    for name, (kind, words) in LIMITS.items():
        limits.add_argument(f"--{name}", type=kind, default=getattr(DEFAULTS, name), metavar="N", help=words)
    parser.add_argument("--verbose", action="store_true", help="one line per request, and library messages")
    parser.set_defaults(json=False)


def named_adapter(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FOLDER_OR_ID, the name of letters, digits, . _ -")
    return name, folder


def served_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, . _ / -")
    return text


__all__ = ["LIMITS", "add_serve", "named_adapter"]
