"""Each command of `curation/` by itself: what it drops, what it leaves, what it says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, ImageFilter, ImageOps

from curation.balance import main as balance
from curation.caption import main as caption
from curation.contamination import main as contamination
from curation.dedup import main as dedup
from curation.export import main as export
from curation.filter import main as filter_
from curation.report import main as report
from curation.scan import main as scan
from curation.shards.index import Index
from finetune.check_data import main as check_data
from tests.curation.curation_fixtures import column_of, encode, photo, write_collection, write_config


def scanned(tmp_path, pictures, captions=None):
    """An index of a collection, and the flags that name it."""
    raw = write_collection(tmp_path / "raw", pictures, captions)
    assert scan(["--data", str(raw), "--index", str(tmp_path / "index"), "--processes", "1"]) == 0
    return ["--index", str(tmp_path / "index")]


def rules(tmp_path):
    return {row["id"]: row["rule"] for row in Index(tmp_path / "index").iter_rows() if row["rule"]}


def column(tmp_path, name):
    return {row["id"]: row.get(name) for row in Index(tmp_path / "index").iter_rows()}


GOOD = {f"{n}.png": encode(photo(n, (200, 160))) for n in range(6)}


# ---- filter


def test_each_threshold_drops_what_is_on_its_side_and_says_the_number(tmp_path, capsys):
    pictures = {
        "good.png": encode(photo(0, (200, 160))),
        "small.png": encode(photo(1, (60, 60))),
        "strip.png": encode(photo(2, (400, 100))),
        "blank.png": encode(Image.new("RGB", (200, 200), (9, 90, 200))),
        "blurred.png": encode(photo(3, (200, 160)).filter(ImageFilter.GaussianBlur(4))),
    }
    index = scanned(tmp_path, pictures, {"good.png": "a fine picture"})
    looks = {"max_one_color": 0.97, "min_sharpness": 3}
    config = write_config(tmp_path / "c.yaml", size={"short_side": 100, "aspect": 3}, looks=looks)
    assert filter_([*index, "--config", str(config), "--processes", "1"]) == 0
    assert rules(tmp_path) == {"small": "size", "strip": "aspect", "blank": "flat", "blurred": "blurred"}
    assert column(tmp_path, "detail")["strip"] == "aspect 4, kept from at most 3 (long side over short side)"
    assert "1 of 5 rows are kept" in capsys.readouterr().out


def test_words_of_captions_have_their_bounds(tmp_path):
    index = scanned(
        tmp_path, {"0.png": GOOD["0.png"], "1.png": GOOD["1.png"]}, {"0.png": "IMG_1234", "1.png": "a red boat"}
    )
    config = write_config(tmp_path / "c.yaml", text={"min_words": 2})
    assert filter_([*index, "--config", str(config), "--processes", "1"]) == 0
    assert rules(tmp_path) == {"0": "text"}


# ---- dedup


def test_changed_copies_are_found_and_a_mirror_only_when_asked_for(tmp_path):
    base = photo(0, (200, 160))
    pictures = {
        **GOOD,
        "jpeg.jpg": encode(base, "JPEG", quality=50),
        "half.png": encode(base.resize((100, 80), Image.Resampling.LANCZOS)),
        "crop.png": encode(photo(1, (200, 160)).crop((6, 4, 196, 158))),
        "mirror.png": encode(ImageOps.mirror(photo(2, (200, 160)))),
    }
    index = scanned(tmp_path, pictures)
    assert dedup([*index, "--crop_distance", "3"]) == 0
    assert rules(tmp_path) == {"jpeg": "copy_near", "half": "copy_near", "crop": "copy_crop"}
    assert column(tmp_path, "duplicate_of") | {} == {
        **dict.fromkeys([*"012345", "mirror"]),
        "jpeg": "0",
        "half": "0",
        "crop": "1",
    }
    assert dedup([*index, "--crop_distance", "3", "--mirrored"]) == 0
    found = rules(tmp_path)
    assert [found.get(name) for name in ("2", "mirror")].count("copy_mirrored") == 1  # the one with more bytes stays


def test_the_largest_stays_and_the_first_when_that_is_asked_for(tmp_path):
    pictures = {"a.png": encode(photo(0, (200, 160))), "b.png": encode(photo(0, (200, 160)).resize((400, 320)))}
    index = scanned(tmp_path, pictures)
    assert dedup(index) == 0 and rules(tmp_path) == {"a": "copy_near"}
    assert dedup([*index, "--keep", "first"]) == 0 and rules(tmp_path) == {"b": "copy_near"}


def test_the_same_picture_with_another_question_is_no_copy(tmp_path):
    write_collection(tmp_path / "raw", {"0.png": GOOD["0.png"]})
    records = [{"image": "0.png", "question": q, "answer": "Yes."} for q in ("Red?", "Blue?", "Red?")]
    (tmp_path / "raw" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert scan(["--data", str(tmp_path / "raw"), "--index", str(tmp_path / "index"), "--processes", "1"]) == 0
    assert dedup(["--index", str(tmp_path / "index")]) == 0
    assert rules(tmp_path) == {"metadata-3": "copy_record"}


def test_what_a_filter_dropped_is_not_the_picture_that_a_copy_goes_for(tmp_path):
    """The larger of two copies is too large to be kept: the other one must stay."""
    index = scanned(
        tmp_path, {"a.png": encode(photo(0, (100, 80))), "b.png": encode(photo(0, (100, 80)).resize((400, 320)))}
    )
    config = write_config(tmp_path / "c.yaml", size={"long_side": 300})
    assert filter_([*index, "--config", str(config), "--processes", "1"]) == 0
    assert dedup(index) == 0
    assert rules(tmp_path) == {"b": "size"}


# ---- contamination


@pytest.fixture
def benchmark(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "b0.png").write_bytes(GOOD["3.png"])
    prompts = [{"prompt": "a photo of two red clocks", "tag": "counting"}, {"prompt": "a cat"}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return ["--pictures", str(tmp_path / "bench"), "--prompts", str(tmp_path / "bench.jsonl")]


def test_benchmark_pictures_and_prompts_are_listed_and_strict_fails(tmp_path, benchmark, capsys):
    captions = {"0.png": "Look: a photo of TWO red clocks, on a wall.", "1.png": "a cat"}
    pictures = {**GOOD, "again.jpg": encode(photo(3, (200, 160)), "JPEG", quality=70)}
    index = scanned(tmp_path, pictures, captions)
    command = [*index, *benchmark, "--processes", "1"]
    capsys.readouterr()
    assert contamination(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 rows stand in a benchmark"
    assert rules(tmp_path) == {"0": "benchmark_prompt", "3": "benchmark_picture", "again": "benchmark_picture"}
    assert contamination([*command, "--strict"]) == 1
    out = capsys.readouterr().out
    assert "0: repeats the prompt 'a photo of two red clocks'" in out and "3: the pixels of bench/b0.png" in out


def test_a_clean_collection_passes_strict(tmp_path, benchmark):
    index = scanned(tmp_path, {"0.png": GOOD["0.png"]})
    assert contamination([*index, *benchmark, "--strict", "--processes", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to compare with. Name pictures or prompts of benchmarks"),
        (["--pictures", "nowhere"], "nowhere: no such folder of benchmark pictures"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: prompts cannot be read"),
        (["--prompts", "empty.txt"], "empty.txt: no prompts there"),
        (["--prompts", "a.txt", "--ngram", "2"], "ngram 2 is below min_words 4"),
    ],
)
def test_a_benchmark_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch, flags, message):
    index = scanned(tmp_path, {"0.png": GOOD["0.png"]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    assert contamination([*index, *flags, "--processes", "1"]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


# ---- captions by a server


class Server(BaseHTTPRequestHandler):
    """Answers as a list of scripted texts says; counts what it was asked."""

    answers: list = []
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        found = self.answers[min(len(self.asked), len(self.answers)) - 1]
        status, text, finish = found if isinstance(found, tuple) else (200, found, "stop")
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        content = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("pisces_commands.chat_server.time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.answers, Server.asked = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def test_captions_of_a_server_are_checked_and_exported_with_who_wrote_them(tmp_path, server, capsys):
    Server.answers = [
        "The image shows a red boat on a lake.",
        "I'm sorry, but I can't help with that.",
        "A stunning scene that is a testament to beauty.",
        "a dog a dog a dog a dog a dog a dog",
        (200, "a very long story that was", "length"),
        (500, "busy", "stop"),
        '"Two cats\non a sofa."',
    ]
    index = scanned(tmp_path, GOOD)
    flags = ["--server", server, "--server_model", "words-7b", "--styles", "detailed", "--processes", "1"]
    capsys.readouterr()
    assert caption([*index, *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("detailed: 2 of 6 captions are used")
    assert column(tmp_path, "caption_detailed") == {
        **dict.fromkeys("01234"), "0": "a red boat on a lake.", "5": "Two cats on a sofa."}  # fmt: skip
    refused = column(tmp_path, "refused_detailed")
    assert refused["1"] == "refusal" and refused["2"].startswith("empty praise") and refused["3"].startswith("loop")
    assert refused["4"] == "cut at the limit of tokens"
    assert {row["captioner"] for row in Index(tmp_path / "index").iter_rows()} == {f"words-7b at {server}"}
    body = Server.asked[0]
    assert body["model"] == "words-7b" and body["temperature"] == 0
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert export([*index, "--output", str(tmp_path / "out"), "--processes", "1", "--keep_short", "0"]) == 0
    assert check_data(["--data", str(tmp_path / "out")]) == 0
    words = column_of(tmp_path / "out", "caption")
    assert words[0] == "a red boat on a lake." and words[1] == "a picture called 1"


def test_a_server_that_does_not_answer_ends_the_command_and_the_next_run_goes_on(tmp_path, server, capsys):
    Server.answers = [(400, "no such model", "stop")]
    index = scanned(tmp_path, GOOD)
    flags = ["--server", server, "--server_model", "nobody", "--styles", "short", "--processes", "1"]
    assert caption([*index, *flags]) == 1
    error = capsys.readouterr().err
    assert "no answer (400" in error and "run the same command again" in error and error.count("\n") == 1
    Server.answers = ["a boat on a lake"]
    assert caption([*index, *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name one writer, either model (a Pisces checkpoint) or server (a URL)"),
        (["--server", "http://x/v1"], "server_model is missing"),
        (["--server", "x", "--server_model", "m"], "--server 'x': expected an address such as"),
        (["--model", "nowhere"], "nowhere: no model there"),
        (["--model", "pisces-tiny", "--max_loss", "1"], "max_loss has no effect without agreement"),
    ],
)
def test_a_writer_that_cannot_be_is_one_line(tmp_path, capsys, flags, message):
    index = scanned(tmp_path, {"0.png": GOOD["0.png"]})
    assert caption([*index, *flags, "--processes", "1"]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


# ---- balance


def test_a_cap_keeps_as_many_of_each_group_and_says_before_and_after(tmp_path, capsys):
    raw = write_collection(tmp_path / "raw", GOOD)
    rows = [json.loads(line) for line in (raw / "metadata.jsonl").read_text().splitlines()]
    for row, tag in zip(rows, ["cat", "cat", "cat", "cat", "dog", "dog"], strict=True):
        row["tag"] = tag
    (raw / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scan(["--data", str(raw), "--index", str(tmp_path / "index"), "--processes", "1"]) == 0
    capsys.readouterr()
    assert balance(["--index", str(tmp_path / "index"), "--by", "field:tag", "--cap", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 of 6 rows are kept",
        "         4 ->        2  cat",
        "         2 ->        2  dog",
    ]
    first = rules(tmp_path)
    assert set(first.values()) == {"balance"} and len(first) == 2
    seeds = []
    for seed in range(1, 6):
        balance(["--index", str(tmp_path / "index"), "--by", "field:tag", "--cap", "2", "--seed", str(seed)])
        seeds.append(tuple(rules(tmp_path)))
    assert len(set(seeds)) > 1


def test_look_alikes_share_a_cluster(tmp_path, capsys):
    rng = {f"night{n}": (10 + n, 10, 40) for n in range(4)} | {f"day{n}": (200, 220 + n, 255) for n in range(4)}
    pictures = {}
    for name, color in rng.items():
        image = photo(1 if "night" in name else 2, (100, 80))
        image.paste(color, (0, 0, 30, 30))
        pictures[f"{name}.png"] = encode(image)
    index = scanned(tmp_path, pictures)
    assert balance([*index, "--by", "cluster", "--clusters", "2", "--cap", "3"]) == 0
    groups = column(tmp_path, "group")
    assert len({groups[name] for name in groups if "night" in name}) == 1
    assert groups["night0"] != groups["day0"] and len(rules(tmp_path)) == 2


def test_a_group_that_cannot_be_is_one_line(tmp_path, capsys):
    index = scanned(tmp_path, {"0.png": GOOD["0.png"]})
    assert balance([*index, "--by", "mood", "--cap", "2"]) == 2
    assert "by: found 'mood', expected source, license, cluster or field:NAME" in capsys.readouterr().err


# ---- order, report


def test_a_stage_whose_input_changed_has_to_be_run_again(tmp_path, capsys):
    index = scanned(tmp_path, GOOD)
    assert dedup(index) == 0
    config = write_config(tmp_path / "c.yaml")
    assert filter_([*index, "--config", str(config), "--processes", "1"]) == 0
    assert export([*index, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "1 of 1 shards of dedup are not made for the present files and settings" in error
    assert "Run python -m curation.dedup on it (again)" in error


def test_the_report_shows_numbers_and_pictures_on_both_sides_of_a_threshold(tmp_path, capsys):
    pictures = {f"{side}.png": encode(photo(side, (side, side))) for side in (40, 60, 80, 100, 120)}
    index = scanned(tmp_path, pictures)
    config = write_config(tmp_path / "c.yaml", size={"short_side": 70})
    assert filter_([*index, "--config", str(config), "--processes", "1"]) == 0
    capsys.readouterr()
    assert report([*index, "--json", "--sheet", str(tmp_path / "sheet.png"), "--examples", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rules"] == {"kept": 3, "size": 2} and found["thresholds"] == {"size.short_side": 70}
    assert found["percentiles"]["short_side"]["0"] == 40 and found["percentiles"]["short_side"]["50"] == 80
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 2 * 128
    assert report(index) == 0
    assert "5 rows in 1 shards" in capsys.readouterr().out


def test_a_sheet_needs_a_threshold(tmp_path, capsys):
    index = scanned(tmp_path, {"0.png": GOOD["0.png"]})
    assert report([*index, "--sheet", str(tmp_path / "sheet.png")]) == 2
    assert "Run python -m curation.filter first" in capsys.readouterr().err
