"""`pisces describe, draw, edit --data` on a tiny random checkpoint: every record once, shards whole, repeating free."""

import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from modeling_pisces.console import many, shard_work
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint


pytest.importorskip("diffusers")
COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "grey": (90, 90, 90), "pink": (250, 90, 200)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in COLORS.items():
        Image.new("RGB", (20, 20), color).save(folder / f"{name}.png")
    return folder


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(folder):
    files = sorted((folder / "shards").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def drawn(folder):
    """name -> content of what the tar shards of a folder hold."""
    found = {}
    for file in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def pixels(content):
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


# ---- describe


def test_answers_over_a_folder_are_those_of_the_single_command(capsys, tmp_path, checkpoint, pictures):
    asked = ["--question", "what?", "--question", "how many?", "--max_new_tokens", "5", "--model", checkpoint]
    code, out, err = run(
        capsys, "describe", "--data", pictures, "--output", tmp_path / "out", *asked, "--rows_per_shard", "2"
    )
    assert (code, err) == (0, "") and out == f"{tmp_path / 'out'}: 10 results in 3 of 3 shards\n"
    _, single, _ = run(capsys, "describe", pictures, *asked, "--json")
    wanted = [(r["image"].split("/")[-1], r["question"], r["answer"]) for r in json.loads(single)["results"]]
    assert [(row["image"], row["question"], row["answer"]) for row in lines(tmp_path / "out")] == wanted


def test_a_record_may_ask_its_own_question(capsys, tmp_path, checkpoint, pictures):
    data = write_rows(
        tmp_path / "data",
        [
            {"id": "a", "image": "red.png", "question": "what color?"},
            {"id": "b", "image": "red.png", "question": "how many?", "answer": "one"},
            {"id": "c", "image": "red.png"},
        ],
    )
    (tmp_path / "data" / "red.png").write_bytes((pictures / "red.png").read_bytes())
    flags = ["--output", tmp_path / "out", "--model", checkpoint, "--max_new_tokens", "2"]
    assert run(capsys, "describe", "--data", data, *flags)[0] == 0
    questions = [(row["id"], row["question"]) for row in lines(tmp_path / "out")]
    assert questions == [("a", "what color?"), ("b", "how many?"), ("c", "Describe the picture.")]


def test_what_cannot_be_used_is_named_once_and_the_others_go_on(capsys, tmp_path, checkpoint, pictures):
    data = write_rows(
        tmp_path / "data",
        [{"id": "gone", "image": "gone.png"}, {"id": "text", "caption": "no picture"}, {"image": "red.png"}, "x", []],
    )
    (tmp_path / "data" / "red.png").write_bytes((pictures / "red.png").read_bytes())
    flags = ["--output", tmp_path / "out", "--model", checkpoint, "--max_new_tokens", "2", "--question", "a?"]
    code, out, err = run(capsys, "describe", "--data", data, *flags, "--question", "b?")
    assert code == 1 and "2 results" in out and err.count("\n") == 4
    assert "pisces: error: gone: " in err and "no file 'gone.png'" in err and "Traceback" not in err
    assert len(lines(tmp_path / "out")) == 6
    again = run(capsys, "describe", "--data", data, *flags, "--question", "b?", "--json")
    assert again[0] == 1 and len(json.loads(again[1])["errors"]) == 4


def test_nothing_usable_is_exit_code_2(capsys, tmp_path, checkpoint):
    data = write_rows(tmp_path / "data", [{"id": "gone", "image": "gone.png"}])
    assert run(capsys, "describe", "--data", data, "--output", tmp_path / "out", "--model", checkpoint)[0] == 2


# ---- shards


def test_parts_in_any_order_leave_the_bytes_of_one_run(capsys, tmp_path, checkpoint, pictures):
    flags = ["draw", "--data", write_prompts(tmp_path), "--model", checkpoint, "--rows_per_shard", "2"]
    assert run(capsys, *flags, "--output", tmp_path / "one")[0] == 0
    code, out, err = run(capsys, *flags, "--output", tmp_path / "parts", "--shard", "1/2")
    assert code == 0 and "2 results in 1 of 3 shards" in out and "2 shards are not made yet" in err
    assert run(capsys, *flags, "--output", tmp_path / "parts", "--shard", "0/2")[2] == ""
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")


def write_prompts(tmp_path):
    return write_rows(tmp_path / "prompts", [{"id": f"p{n}", "prompt": f"a circle {n}"} for n in range(5)])


def test_a_run_that_was_stopped_goes_on_and_what_is_there_is_not_made_again(capsys, tmp_path, checkpoint, monkeypatch):
    flags = ["draw", "--data", write_prompts(tmp_path), "--model", checkpoint, "--rows_per_shard", "2"]
    assert run(capsys, *flags, "--output", tmp_path / "one")[0] == 0
    real, made = many.work_on, []

    def stopped(*task):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(task[-1])
        return real(*task)

    monkeypatch.setattr(many, "work_on", stopped)
    assert run(capsys, *flags, "--output", tmp_path / "two")[0] == 130
    assert len(list((tmp_path / "two" / "shards").glob("*.jsonl"))) == 1
    monkeypatch.setattr(many, "work_on", lambda *task: made.append(task[-1]) or real(*task))
    assert run(capsys, *flags, "--output", tmp_path / "two")[0] == 0
    assert made == [0, 1, 2] and tree(tmp_path / "two") == tree(tmp_path / "one")
    assert run(capsys, *flags, "--output", tmp_path / "two")[0] == 0 and made == [0, 1, 2]


def test_pictures_without_their_lines_are_made_again(capsys, tmp_path, checkpoint):
    flags = ["draw", "--data", write_prompts(tmp_path), "--model", checkpoint, "--output", tmp_path / "out"]
    assert run(capsys, *flags)[0] == 0
    before = tree(tmp_path / "out")
    next((tmp_path / "out" / "shards").glob("*.jsonl")).unlink()  # killed between the two
    next((tmp_path / "out" / "shards").glob("*.tar")).write_bytes(b"half")
    assert run(capsys, *flags)[0] == 0 and tree(tmp_path / "out") == before


def test_a_changed_record_is_made_again_and_its_old_shard_goes(capsys, tmp_path, checkpoint):
    data = write_prompts(tmp_path)
    flags = ["draw", "--data", data, "--model", checkpoint, "--rows_per_shard", "2", "--output", tmp_path / "out"]
    assert run(capsys, *flags)[0] == 0
    before = set((tmp_path / "out" / "shards").iterdir())
    data.write_text(data.read_text().replace("circle 4", "star"))
    assert run(capsys, *flags)[0] == 0
    after = set((tmp_path / "out" / "shards").iterdir())
    assert len(after) == len(before) == 6 and len(after & before) == 4
    assert lines(tmp_path / "out")[-1]["prompt"] == "a star"


def test_another_job_in_the_same_folder_is_refused_and_another_name_of_the_model_is_not(capsys, tmp_path, checkpoint):
    data = write_prompts(tmp_path)
    flags = ["--data", data, "--output", tmp_path / "out"]
    assert run(capsys, "draw", *flags, "--model", checkpoint)[0] == 0
    code, _, err = run(capsys, "draw", *flags, "--model", checkpoint, "--seed", "1")
    assert code == 2 and "holds the results of another job (options:" in err and err.count("\n") == 1
    (tmp_path / "same").symlink_to(checkpoint)
    assert run(capsys, "draw", *flags, "--model", tmp_path / "same")[0] == 0
    code, _, err = run(capsys, "draw", "--data", data, "--output", tmp_path / "prompts", "--model", checkpoint)
    assert code == 2 and "not an empty folder, and no results of this command" in err
    (tmp_path / "out" / "job.json").write_text("{")
    assert run(capsys, "draw", *flags, "--model", checkpoint)[0] == 2


# ---- draw and edit


def test_drawings_over_data_are_those_of_the_single_command(capsys, tmp_path, checkpoint):
    data = write_rows(tmp_path / "d", [{"prompt": "a circle"}, {"caption": "a star", "seed": 9}, {"prompt": " "}, {}])
    common = ["--model", checkpoint, "--batch_size", "1", "--num_images", "2"]
    code, _, err = run(capsys, "draw", "--data", data, "--output", tmp_path / "out", "--seed", "5", *common)
    assert code == 1 and "no prompt, expected a field prompt, caption or text" in err
    rows, files = lines(tmp_path / "out"), drawn(tmp_path / "out")
    assert [(row.get("prompt"), row.get("seed")) for row in rows[:4]] == [
        ("a circle", 5), ("a circle", 6), ("a star", 9), ("a star", 10)]  # fmt: skip
    for row in rows[:4]:
        single = ["draw", row["prompt"], "--seed", row["seed"], "--model", checkpoint]
        assert run(capsys, *single, "--output", tmp_path / "single.png")[0] == 0
        assert pixels(files[row["image"]]) == Image.open(tmp_path / "single.png").convert("RGB").tobytes()
        assert json.loads(files[row["image"].replace(".png", ".json")])["prompt"] == row["prompt"]


def test_drawn_shards_are_data_for_the_next_command(capsys, tmp_path, checkpoint):
    flags = ["--model", checkpoint, "--output"]
    assert run(capsys, "draw", "--data", write_prompts(tmp_path), *flags, tmp_path / "drawn")[0] == 0
    code, out, _ = run(
        capsys, "describe", "--data", tmp_path / "drawn" / "shards", *flags, tmp_path / "said", "--max_new_tokens", "2"
    )
    assert code == 0 and "5 results" in out
    assert [row["id"] for row in lines(tmp_path / "said")] == [f"p{n}" for n in range(5)]


def test_edits_follow_the_record_or_one_instruction_for_all(capsys, tmp_path, checkpoint, pictures):
    data = write_rows(
        tmp_path / "data",
        [{"id": "a", "image": "red.png", "prompt": "make it blue"}, {"id": "b", "image": "red.png", "instruction": "x"},
         {"id": "c", "image": "red.png"}],
    )  # fmt: skip
    (tmp_path / "data" / "red.png").write_bytes((pictures / "red.png").read_bytes())
    flags = ["edit", "--data", data, "--model", checkpoint, "--batch_size", "1"]
    code, _, err = run(capsys, *flags, "--output", tmp_path / "own")
    assert code == 1 and "pisces: error: c: " in err and "no instruction. Give --instruction, or a field" in err
    assert [row.get("prompt") for row in lines(tmp_path / "own")] == ["make it blue", "x", None]
    assert len(drawn(tmp_path / "own")) == 4
    assert run(capsys, *flags, "--output", tmp_path / "all", "--instruction", "make it blue")[0] == 0
    rows, files = lines(tmp_path / "all"), drawn(tmp_path / "all")
    assert {row["prompt"] for row in rows} == {"make it blue"} and {row["source"] for row in rows} == {"red.png"}
    single = ["edit", tmp_path / "data" / "red.png", "make it blue", "--model", checkpoint]
    assert run(capsys, *single, "--output", tmp_path / "single.png")[0] == 0
    assert pixels(files[rows[0]["image"]]) == Image.open(tmp_path / "single.png").convert("RGB").tobytes()


# ---- flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["describe", "--data", "x"], "--data needs --output FOLDER, where the results go"),
        (["describe", "x.png", "--data", "x", "--output", "y"], "name the pictures and prompts, or give --data; both"),
        (["describe", "x.png", "--shard", "0/2"], "--shard has no effect without --data"),
        (["describe", "x.png", "--output", "y"], "--output has no effect without --data"),
        (["describe", "x.png", "--server", "http://x"], "--server has no effect without --data"),
        (["draw", "x", "--batch_size", "2"], "--batch_size has no effect without --data"),
        (["edit", "x.png", "y", "--instruction", "z"], "--instruction has no effect without --data"),
        (["draw", "--data", "x", "--sheet", "s.png"], "--sheet has no effect with --data"),
        (["edit", "--data", "x", "--then", "y"], "--then has no effect with --data"),
        (["embed", "x"], "the following arguments are required: --output"),
        (["describe"], "the following arguments are required: IMAGE"),
        (["edit", "--seed", "1"], "the following arguments are required: IMAGE, INSTRUCTION"),
    ],
)
def test_flags_without_effect_are_refused_in_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_arguments_in_any_order_are_read_as_before(monkeypatch):
    from pisces_commands.console import build_parser

    args = build_parser().parse_args(["edit", "photo.png", "--seed", "3", "make it red", "--then", "more"])
    assert (args.image, args.instruction, args.seed) == ("photo.png", "make it red", 3)
    assert build_parser().parse_args(["draw", "--steps", "2", "a", "b"]).prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard", "2/2"], "--shard '2/2': expected part/parts counted from 0"),
        (["--address", "auto"], "--address has no effect without --engine ray"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--question", " "], "a --question is empty"),
        (["--server", "ftp://x"], "--server 'ftp://x': expected an address such as http"),
        (["--server", "http://x", "--adapter", "y"], "--server answers with a model of its own"),
        (["--device", "cuda"], "--device cuda: this machine or this build of torch has none"),
    ],
)
def test_values_that_cannot_be_are_refused_before_a_model_is_loaded(
    capsys, tmp_path, checkpoint, pictures, flags, words, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(shard_work, "open_model", lambda *_: pytest.fail("a model was loaded"))
    model = [] if "--server" in flags else ["--model", checkpoint]
    code, _, err = run(capsys, "describe", "--data", pictures, "--output", tmp_path / "out", *model, *flags)
    assert code == 2 and words in err and err.count("\n") == 1


# ---- a server instead of a model


class Server(BaseHTTPRequestHandler):
    status, asked = 200, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.server.server_port, body["messages"][0]["content"][1]["text"], body["model"]))
        content = json.dumps({"choices": [{"message": {"content": " an answer "}, "finish_reason": "stop"}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setattr("pisces_commands.chat_server.time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.status, Server.asked = 200, []
    running = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    for one in running:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{one.server_port}/v1" for one in running]
    for one in running:
        one.shutdown()
        one.server_close()


def test_replicas_of_a_server_share_the_shards_and_need_no_checkpoint(capsys, tmp_path, pictures, servers):
    flags = ["describe", "--data", pictures, "--rows_per_shard", "1", "--question", "what?", "--server_model", "big"]
    replicas = ["--server", servers[0], "--server", servers[1]]
    assert run(capsys, *flags, *replicas, "--output", tmp_path / "two")[0] == 0
    assert [row["answer"] for row in lines(tmp_path / "two")] == ["an answer"] * 5
    ports = {port for port, _, _ in Server.asked}
    assert len(ports) == 2 and {asked[1:] for asked in Server.asked} == {("what?", "big")}
    assert run(capsys, *flags, "--server", servers[0], "--output", tmp_path / "one")[0] == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")  # where an answer came from is not what it is


def test_a_server_that_fails_ends_the_run_and_is_no_mistake_of_a_record(capsys, tmp_path, pictures, servers):
    Server.status = 500
    flags = ["describe", "--data", pictures, "--output", tmp_path / "out", "--server", servers[0]]
    code, _, err = run(capsys, *flags)
    assert code == 1 and "no answer (500" in err and "run the same command again" in err and err.count("\n") == 1
    assert not list((tmp_path / "out").glob("shards/*"))
    Server.status = 200
    assert run(capsys, *flags)[0] == 0
