"""`pisces serve` as a process: what it says before anything is loaded, and what becomes of a child that dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from pisces_commands.console import build_parser, main
from pisces_serving.settings import Settings
from pisces_serving.supervisor import Supervisor, settings_of


pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and inherited sockets")
# stands in for the serving process: reads its settings, gets ready, and does what the file of plans says next
CHILD = """
import json, os, pathlib, signal, sys, time
settings = json.loads(sys.stdin.readline())
plans = pathlib.Path(sys.argv[1])
plan, *rest = plans.read_text().split()
plans.write_text(" ".join(rest))
if plan == "fail":
    sys.exit(2)
print("a line of the log", flush=True)
print("ready", flush=True)
if plan == "killed":
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if plan == "obedient":
    os.kill(os.getppid(), signal.SIGTERM)
if plan == "interrupted":
    os.kill(os.getppid(), signal.SIGINT)
sys.stdin.read()
"""


def supervise(tmp_path, plans, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "plans").write_text(plans)
    monkeypatch.setattr(Supervisor, "command", (sys.executable, str(tmp_path / "child.py"), str(tmp_path / "plans")))
    return Supervisor(Settings(port=0))


def test_a_killed_child_is_started_again_on_the_same_socket(tmp_path, monkeypatch, capsys):
    supervisor = supervise(tmp_path, "killed killed obedient", monkeypatch)
    port = supervisor.listener.getsockname()[1]
    assert supervisor.run() == 0
    said = capsys.readouterr().err
    assert said.count("ended with signal 9; it is started again") == 2
    assert said.count(f"ready at http://127.0.0.1:{port}/v1") == 3
    assert said.count("a line of the log\n") == 3


def test_a_child_that_never_gets_ready_ends_the_command_with_its_code(tmp_path, monkeypatch):
    assert supervise(tmp_path, "fail", monkeypatch).run() == 2


def test_a_child_that_dies_again_and_again_ends_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pisces_serving.supervisor.MOST_RESTARTS", 1)
    assert supervise(tmp_path, "killed killed killed", monkeypatch).run() == 1
    assert "ended 2 times" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(tmp_path, monkeypatch):
    assert supervise(tmp_path, "interrupted", monkeypatch).run() == 130


def test_the_key_travels_by_standard_input_and_never_in_a_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PISCES_API_KEY", "secret")
    settings = settings_of(build_parser().parse_args(["serve", "--port", "0"]))
    assert settings.api_key == "secret" and "secret" not in repr(settings)
    assert "secret" not in " ".join(Supervisor.command)
    assert Settings.from_json(json.loads(json.dumps(settings.as_json()))) == settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--port 99999", "from 0 to 65535"),
        ("--adapter emoji", "expected NAME=FOLDER_OR_ID"),
        ("--adapter a/b=x", "expected NAME=FOLDER_OR_ID"),
        ("--max_queue 0", "at least 1"),
        ("--deadline_s nan", "expected a number"),
        ("--adapter a=x --adapter a=y", "given twice"),
        ("--api_key é", "plain ASCII"),
        ("--host 203.0.113.1 --port 0", "nothing can listen there"),
        ("--served_name é", "expected letters"),
    ],
)
def test_wrong_flags_end_in_one_line_before_anything_is_started(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pisces-tiny").mkdir()
    assert main(["serve", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(("pisces: error: ", "serve: error: ")) and error.count("\n") == 1


def test_a_taken_port_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pisces-tiny").mkdir()
    taken = Supervisor(Settings(port=0)).listener
    assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "nothing can listen there" in capsys.readouterr().err
    taken.close()


def test_without_a_checkpoint_or_the_extra_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve"]) == 2
    assert "Name a checkpoint: --model" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'modeling-pisces[serve]'" in error and "uvicorn" in error and error.count("\n") == 1


def test_help_reads_no_heavy_library():
    code = "import sys; from pisces_commands.console import build_parser; build_parser(); "
    code += "from pisces_serving import supervisor; print({'torch', 'fastapi', 'PIL', 'uvicorn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# ---- the real thing


class Process:
    """`pisces serve` on a free port, with what it says."""

    def __init__(self, model, *words):
        command = [
            sys.executable,
            "-m",
            "pisces_commands.console",
            "serve",
            "--model",
            str(model),
            "--port",
            "0",
            *words,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        self.said: list[str] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self.changed:
                self.said.append(line)
                self.changed.notify_all()

    def wait_for(self, words, times=1):
        with self.changed:
            found = self.changed.wait_for(lambda: sum(words in line for line in self.said) >= times, timeout=120)
        assert found, self.said
        return [line for line in self.said if words in line][-1]

    def post(self, path, body):
        base = self.wait_for("ready at").split()[-1]
        request = urllib.request.Request(
            base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def child(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


@pytest.mark.slow
def test_a_server_whose_process_is_killed_answers_again_and_ends_at_sigterm(checkpoint):
    pytest.importorskip("fastapi")
    served = Process(checkpoint)
    before = served.post("/images/generations", {"prompt": "red", "seed": 1})
    assert before[0] == 200
    os.kill(served.child(), signal.SIGKILL)
    served.wait_for("ended with signal 9; it is started again")
    after = served.post("/images/generations", {"prompt": "red", "seed": 1})  # connects while nobody is there yet
    assert after[1]["data"] == before[1]["data"]
    child = served.child()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow
def test_a_child_never_outlives_its_supervisor(checkpoint):
    pytest.importorskip("fastapi")
    served = Process(checkpoint)
    served.wait_for("ready at")
    child = served.child()
    served.process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_checkpoint_that_is_none_ends_the_command_with_one_line(tmp_path):
    pytest.importorskip("fastapi")
    served = Process(tmp_path)
    assert served.process.wait(120) == 2
    served.wait_for("pisces: error: ")
    assert len(served.said) == 1 and "config.json" in served.said[0]
