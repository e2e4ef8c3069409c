"""Every line of docs/serve.md is run: curl and Python against a server of pisces-tiny, commands through the parser."""

import json
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from pisces_commands.console import build_parser
from pisces_serving.flags import LIMITS
from pisces_serving.settings import Settings


ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def blocks(language):
    return [body for name, body in BLOCKS if name == language]


def test_commands_are_understood_and_every_limit_stands_in_the_table_with_its_default():
    lines = [line for body in blocks("") for line in body.splitlines() if line.startswith("pisces ")]
    assert lines
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])
    rows = [row for row in TEXT.splitlines() if row.startswith("| `--")]
    for row in rows:
        flags, numbers = re.findall(r"`--(\w+)`", row), re.findall(r"[\d,]*\d", row.split("|")[2])
        assert [int(number.replace(",", "")) for number in numbers] == [getattr(Settings(), flag) for flag in flags]
    shown = {flag for row in rows for flag in re.findall(r"`--(\w+)`", row)}
    assert set(LIMITS) - shown == {"max_batch", "batch_wait_ms"}


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("diffusers")
    uvicorn = pytest.importorskip("uvicorn")
    from pisces_serving.app import create_app
    from tests.pisces_serving.serving_fixtures import Served

    served = Served(ROOT / "pisces-tiny", **{name: getattr(Settings(), name) for name in LIMITS})
    server = uvicorn.Server(uvicorn.Config(create_app(served.server), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield "http://127.0.0.1:%d" % server.servers[0].sockets[0].getsockname()[1]  # noqa: UP031
    server.should_exit = True
    thread.join(20)
    served.close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(min((ROOT / "examples/images").glob("*.png")), tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_every_curl_line_gets_what_it_asks_for(address, folder):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    answers = {}
    for line in [line for body in blocks("bash") for line in body.splitlines()]:
        words = shlex.split(line.replace("http://127.0.0.1:8000", address))
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answers[words[2].removeprefix(address)] = done.stdout
    kinds = [part["type"] for part in json.loads(answers["/v1/chat/completions"])["choices"][0]["message"]["content"]]
    assert "image_url" in kinds
    assert [datum["seed"] for datum in json.loads(answers["/v1/images/generations"])["data"]] == [7, 8]
    assert len(json.loads(answers["/v1/images/edits"])["data"]) == 1
    assert len(json.loads(answers["/v1/embeddings"])["data"]) == 2
    assert json.loads(answers["/v1/models"])["data"][0]["id"] == "pisces-tiny"
    assert json.loads(answers["/ready"]) == {"status": "ready"}
    assert "pisces_queue_length 0.0" in answers["/metrics"]


@pytest.mark.slow
def test_the_python_lines_run_with_the_package_openai(address, folder, capsys):
    pytest.importorskip("openai")
    names: dict = {}
    for block in blocks("python"):
        exec(block.replace("http://127.0.0.1:8000", address), names)
    assert "background" in capsys.readouterr().out  # the description of a scene
    assert "image_url" in names["kinds"]
    assert names["drawn"].data[0].seed == 7 and names["edited"].data[0].b64_json
    assert len({len(item.embedding) for item in names["vectors"]}) == 1


@pytest.mark.slow
def test_the_error_that_the_page_shows_is_the_one_that_is_sent(address):
    httpx = pytest.importorskip("httpx")
    answer = httpx.post(f"{address}/v1/images/generations", json={"prompt": "red", "n": 11})
    assert [answer.json()] == [json.loads(body) for body in blocks("json")]


def test_the_measured_numbers_of_the_page_are_those_of_the_results_file_and_meet_their_bars():
    found = json.loads((ROOT / "results/serving.json").read_text(encoding="utf-8"))
    load, fuzzed, ends = found["load"], found["fuzz"], found["ends"]
    batching, latency = found["batching"], found["latency"]
    assert load["clients"] == 64 and load["wrong"] == load["lost"] == 0 and load["memory_growth"] <= 0.05
    assert batching["processor"]["gain_median"] >= 2.5 <= batching["wall"]["gain_median"]
    for clock in ("wall", "processor"):
        assert latency[clock]["served_p95_s"] <= latency[clock]["bar_s"]
    assert fuzzed["requests"] >= 10_000 and not fuzzed["faults"] and not fuzzed["tracebacks_in_the_log"]
    killed, ended = ends["killed"], ends["terminated"]
    assert killed["during"]["wrong"] == killed["afterwards"]["wrong"] == killed["afterwards"]["lost"] == 0
    assert ended["wrong"] == 0 and ended["exit_code"] == 0
    for words in (
        f"{load['asked']} answers in {load['seconds']} s, 0 wrong, 0 lost, memory {load['memory_growth']:+.1%}",
        f"{batching['wall']['gain_median']:.1f} times as many per second",
        f"{latency['processor']['served_p95_s']:.2f} s against {latency['processor']['direct_p95_s']:.2f} s",
        f"{fuzzed['requests']:,} requests: 0 tracebacks, 0 hangs, 0 errors in another form",
        f"noticed after {killed['noticed_after_s']:.1f} s",
        f"ended after {ended['ended_after_s']:.1f} s with exit code 0",
    ):
        assert words in " ".join(TEXT.split()), words
