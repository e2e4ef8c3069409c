"""Keeps one serving process alive: starts it, starts it again when it dies, ends it when asked to.

The supervisor holds the listening socket, so clients that connect while a process is replaced wait instead of being
refused. It loads no model, so nothing of the model's can take it down. The child learns its settings, the key among
them, from its standard input, and ends when that closes: it never outlives its supervisor.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pisces_commands.arguments import UsageError
from pisces_commands.ending import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK

from .settings import Settings


NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
READY = "ready"  # the child's one line on standard output
MOST_RESTARTS, WITHIN_S = 5, 300
KILL_AFTER_S = 15  # beyond the grace of running requests


def serve(args: argparse.Namespace) -> int:
    """Run `pisces serve` and return its exit code.

    Raises:
        UsageError: a package is missing, or nothing can listen at this address.
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"serving needs {', '.join(missing)}. Install what is missing: pip install 'modeling-pisces[serve]'."
        )
    if args.model is None and not Path("pisces-tiny").is_dir():
        raise UsageError("no folder ./pisces-tiny here. Name a checkpoint: --model FOLDER or --model OWNER/NAME.")
    return Supervisor(settings_of(args)).run()


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags mean.

    Raises:
        UsageError: two adapters of one name, or a key that no header can carry.
    """
    names = [name for name, _ in args.adapter]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--adapter {min(twice)}=... is given twice. Give each adapter a name of its own.")
    key = os.environ.get("PISCES_API_KEY") or None if args.api_key is None else args.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() and key):
        raise UsageError("the API key is blank, or holds characters that a header cannot carry. Use plain ASCII.")
    given = {**vars(args), "model": args.model or "pisces-tiny", "adapters": tuple(args.adapter), "api_key": key}
    return Settings.from_json(given)


class Supervisor:
    """One listening socket and one child after the other."""

    command = (sys.executable, "-m", "pisces_serving")

    def __init__(self, settings: Settings):
        self.settings = settings
        self.listener = listen(settings.host, settings.port)
        self.port = self.listener.getsockname()[1]
        self.child: subprocess.Popen | None = None
        self.asked_to_end: int | None = None  # the signal
        self.restarts: list[float] = []

    def run(self) -> int:
        """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, else that of a child that never became ready."""
        ends = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]
        before = {number: signal.signal(number, self._end) for number in ends}
        try:
            while True:
                was_ready, code = self._one_child()
                if self.asked_to_end is not None:
                    return EXIT_OK if self.asked_to_end == signal.SIGTERM else EXIT_INTERRUPTED
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                if not was_ready:
                    return code if code > 0 else self._say(f"the serving process ended with {how} before it was ready")
                now = time.monotonic()
                self.restarts = [then for then in self.restarts if now - then < WITHIN_S] + [now]
                if len(self.restarts) > MOST_RESTARTS:
                    return self._say(f"the serving process ended {len(self.restarts)} times in {WITHIN_S} s ({how})")
                self._say(f"the serving process ended with {how}; it is started again")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.listener.close()

    def _one_child(self) -> tuple[bool, int]:
        """Start a child and wait for its end: whether it was ready, and its exit code."""
        is_posix = os.name == "posix"
        settings = {**self.settings.as_json(), "listener": self.listener.fileno() if is_posix else None}
        settings["port"] = self.port
        options: dict[str, Any] = {"start_new_session": True, "pass_fds": [self.listener.fileno()]} if is_posix else {}
        if not is_posix:
            self.listener.close()  # the child opens it itself
        self.child = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.child.stdin and self.child.stdout
        if self.asked_to_end is not None:  # between the last child and this one
            self.child.terminate()
        was_ready = False
        try:
            self.child.stdin.write(json.dumps(settings) + "\n")
            self.child.stdin.flush()
            for line in self.child.stdout:
                if line.strip() != READY:
                    print(line, end="", file=sys.stderr, flush=True)  # uvicorn's line per request, with --verbose
                    continue
                was_ready = True
                self._say(f"ready at http://{_shown_host(self.settings.host)}:{self.port}/v1")
        except BrokenPipeError:
            pass  # it died before it read its settings; its own line says why
        code = self.child.wait()
        self.child.stdout.close()
        try:
            self.child.stdin.close()
        except BrokenPipeError:
            pass
        return was_ready, code

    def _end(self, number: int, frame: Any) -> None:
        self.asked_to_end = self.asked_to_end or number
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            killer = threading.Timer(self.settings.grace_s + KILL_AFTER_S, self.child.kill)
            killer.daemon = True
            killer.start()

    def _say(self, words: str) -> int:
        print(f"pisces: {words}", file=sys.stderr, flush=True)
        return EXIT_FAILED


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that a child may inherit.

    Raises:
        UsageError: the address is taken, or no address of this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror}). Take another port; 0 is a "
            "free one."
        ) from error
    return listener


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


__all__ = ["READY", "Supervisor", "listen", "serve", "settings_of"]
