"""Claims about `pisces_commands.ending`: one line, one exit code, no traceback for what users and machines cause."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pisces_commands.ending import CommandEnd, CommandFailed, one_line_ending, run_command
from pisces_commands.writing import write_error


ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--n 0:\n expected at least 1."), 2, "error: --n 0: expected at least 1."),
        (OSError("nope is not a folder"), 2, "error: nope is not a folder"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: [Errno 2] No such file or directory: 'x'"),
        (write_error("x", FULL), 1, "error: x: cannot be written (No space left on device). Free some space and run again."),
        (FULL, 1, "error: [Errno 28] No space left on device. Free some space and run again."),
        (ConnectionError("the Hub refused"), 1, "error: the Hub refused"),
        (ChildProcessError("it failed"), 1, "error: it failed"),
        (CommandFailed("differs by 1"), 1, "error: differs by 1"),
        (ImportError("no peft"), 1, "error: no peft"),
        (FloatingPointError("NaN"), 1, "error: NaN"),
        (SafetensorError("header too large"), 1, "error: SafetensorError: header too large"),
        (MemoryError(), 1, "error: not enough memory. Take smaller batches or pictures, and run again."),
        (KeyboardInterrupt(), 130, "error: interrupted; it goes on"),
        (ValueError(), 2, "error: ValueError without a message"),
    ],
)  # fmt: skip
def test_each_error_has_its_line_and_its_exit_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, interrupted="interrupted; it goes on")
    assert stop.value.code == code and str(stop.value) == line
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError("x")])
def test_a_bug_keeps_its_traceback_unless_every_error_is_asked_for(error, capsys):
    with pytest.raises(type(error)), one_line_ending():
        raise error
    with pytest.raises(CommandEnd, match=type(error).__name__) as stop, one_line_ending(every_error=True):
        raise error
    assert stop.value.code == 1 and "Traceback" not in capsys.readouterr().err
    with pytest.raises(CommandEnd), one_line_ending(every_error=True, verbose=True):
        raise error
    assert "Traceback" in capsys.readouterr().err


def test_another_exit_passes_and_success_returns():
    with pytest.raises(SystemExit) as stop, one_line_ending():
        sys.exit(3)
    assert stop.value.code == 3
    assert run_command(lambda word: word, "done") is None


SCRIPT = """
import sys
from pisces_commands.ending import run_command

def main():
    if sys.argv[1] == "bar":
        from tqdm import tqdm
        bars.append(tqdm(total=10))
        bars[0].update(3)
        raise ValueError("it ended")
    for _ in range(int(sys.argv[1])):
        print("x" * 50)

bars = []
run_command(main)
"""


def run_script(word, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, word], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_progress_bar_that_is_still_open_does_not_share_the_errors_line():
    _, err = run_script("bar").communicate()
    assert err.endswith("\nerror: it ended\n") and "3/10" in err


@pytest.mark.parametrize("lines", ["1", "100000"])
def test_a_reader_that_leaves_ends_the_command_in_silence(lines):
    process = run_script(lines, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_does_not_fit_is_named(unbuffered):
    with open("/dev/full", "w") as full:
        process = run_script("1", stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
        _, err = process.communicate()
    expected = "error: standard output: cannot be written (No space left on device). Free some space and run again.\n"
    assert err == expected and process.returncode == 1
