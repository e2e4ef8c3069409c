"""Starts the page: reads the flags, loads the model, serves it on this machine. `demo/app.py` is its door.

A Space has an `app.py` of its own, written by `pisces_demo/space.py`, which goes the same way without flags.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pisces_commands.arguments import LineParser, UsageError, add_adapter_flag, whole_number
from pisces_commands.ending import one_line_ending


PORT = 7860  # gradio's own


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = LineParser(
        description="Chat, draw, edit and compare an adapter in the browser, on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="pisces-tiny", help="checkpoint folder or Hub id")
    add_adapter_flag(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code of the checkpoint; only for a source you trust",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets the network in")
    parser.add_argument("--port", type=whole_number(1, 65535), help=f"default: {PORT}, or the next one that is free")
    parser.add_argument("--share", action="store_true", help="also open a public address through gradio's server")
    parser.add_argument("--open", action="store_true", help="open the page in your browser")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Load the model and serve the page until it is interrupted."""
    args = parse_arguments(arguments)
    with one_line_ending("app: error: ", interrupted="stopped"):
        serve(args)


def open_page(
    model: str,
    adapters: Sequence[str] = (),
    on_gpu: Callable[..., Any] | None = None,
    label: str | None = None,
    **loading: Any,
) -> Any:
    """Load a model and build its page; `launch` of `pisces_demo.page` serves it.

    Args:
        model, adapters: folders or Hub ids.
        on_gpu: as `build_page` takes it.
        label: what the page calls the model; None: its name.
        loading: device, dtype and trust_remote_code.

    Raises:
        ValueError: something of it cannot be found or used.
    """
    from modeling_pisces.checkpoint.loading import quiet_libraries

    from .model import DemoModel
    from .page import build_page

    with quiet_libraries():
        loaded = DemoModel.load(model, adapters, label=label, **loading)
        page = build_page(loaded, on_gpu)
    print(f"loaded {loaded.title()}", flush=True)
    return page


def serve(args: argparse.Namespace) -> None:
    """Load what the flags name and serve it.

    Raises:
        ImportError: gradio is missing.
        ValueError: a model that cannot be used, or an address that is taken.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the page needs gradio ({error}). Run `make web`, or pip install "modeling-pisces[demo]" in an '
            "environment of its own."
        ) from error
    from .page import launch

    if args.host not in ("127.0.0.1", "localhost", "::1") or args.share:
        print("warning: everybody who reaches this address can use the model", file=sys.stderr)
    loading = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    page = open_page(args.model, args.adapter, **loading)
    try:
        launch(page, server_name=args.host, server_port=args.port, share=args.share, inbrowser=args.open)
    except OSError as error:  # gradio's own words about ports and addresses
        raise UsageError(f"cannot listen at {args.host}: {error}") from error
