"""Everything that is refused is refused by name, with an honest number, in the one form that clients read."""

import base64
import dataclasses
import functools
import http.server
import json
import socket
import threading

import pytest

from tests.pisces_serving.serving_fixtures import Served, data_url, picture, png, refusal, user


CHAT, DRAW, EDIT, EMBED = (
    "/v1/chat/completions",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/embeddings",
)
HELLO = [{"role": "user", "content": "hello"}]


def test_the_app_answers_wrong_paths_methods_types_and_bodies_in_the_one_form(served):
    client = served.client
    for answer, status, words in [
        (client.get("/v1/nothing"), 404, "/v1/chat/completions"),
        (client.post("/v1/models/"), 405, "POST"),
        (client.get(CHAT), 405, "expected POST"),
        (client.delete("/health"), 405, "expected GET"),
        (client.post(CHAT, content=b"{}"), 415, "application/json"),
        (client.post(CHAT, data={"a": "b"}), 415, "application/json"),
        (client.post(EDIT, json={}), 415, "multipart/form-data"),
    ]:
        assert answer.status_code == status
        assert words in refusal(answer)["message"]
    for body in (
        b"",
        b"{",
        b"\xff\xfe{",
        b"[1]",
        b"null",
        b"1" * 9000,
        b"[" * 100_000,
        b'{"a":' * 60 + b"1" + b"}" * 60,
    ):
        answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and refusal(answer)["code"] == "invalid_json", body[:20]


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_its_length(served):
    def slowly():
        for _ in range(20):
            yield b" " * 2**17

    headers = {"Content-Type": "application/json"}
    for content in (b" " * (2**20 + 1), slowly()):
        answer = served.client.post(CHAT, content=content, headers=headers)
        assert answer.status_code == 413 and "--max_body_mib" in refusal(answer)["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"logprobs": True}, "logprobs"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"store": True}, "store"),
        (CHAT, {"audio": {}}, "audio"),
        (CHAT, {"top_k": 5}, "top_k"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 41}, "max_tokens"),
        (CHAT, {"max_completion_tokens": "12"}, "max_completion_tokens"),
        (CHAT, {"temperature": -0.1}, "temperature"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"temperature": float("nan")}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"seed": -1}, "seed"),
        (CHAT, {"seed": 2**32}, "seed"),
        (CHAT, {"seed": 1.5}, "seed"),
        (CHAT, {"stop": [""]}, "stop"),
        (CHAT, {"stop": ["a"] * 5}, "stop"),
        (CHAT, {"stop": 5}, "stop"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        (CHAT, {"modalities": ["image"]}, "modalities"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"modalities": [1, {}]}, "modalities"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": ["hello"]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]"),
        (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [user("x", picture(), picture(), picture())]}, "messages[0]"),
        (CHAT, {"\ud800": 1}, "\\ud800"),
        (DRAW, {"prompt": None}, "prompt"),
        (DRAW, {"prompt": " "}, "prompt"),
        (DRAW, {"prompt": 5}, "prompt"),
        (DRAW, {"n": 4}, "n"),
        (DRAW, {"n": 0}, "n"),
        (DRAW, {"n": 2, "seed": 2**32 - 1}, None),
        (DRAW, {"size": "64x64"}, "size"),
        (DRAW, {"size": "16"}, "size"),
        (DRAW, {"size": "0x16"}, "size"),
        (DRAW, {"size": 16}, "size"),
        (DRAW, {"size": "１６x16"}, "size"),
        (DRAW, {"num_inference_steps": 6}, "num_inference_steps"),
        (DRAW, {"guidance_scale": 1e9}, "guidance_scale"),
        (DRAW, {"response_format": "url"}, "response_format"),
        (DRAW, {"response_format": "jpeg"}, "response_format"),
        (DRAW, {"quality": "hd"}, "quality"),
        (DRAW, {"style": "vivid"}, "style"),
        (DRAW, {"output_format": "webp"}, "output_format"),
        (DRAW, {"background": "transparent"}, "background"),
        (DRAW, {"stream": True}, "stream"),
        (DRAW, {"strength": 0.5}, "strength"),
        (DRAW, {"image": "x"}, "image"),
        (DRAW, {"negative_prompt": "x", "guidance_scale": 1}, "negative_prompt"),
        (EMBED, {"input": []}, "input"),
        (EMBED, {"input": ["a"] * 5}, "input"),
        (EMBED, {"input": ""}, "input[0]"),
        (EMBED, {"input": [1, 2, 3]}, "input[0]"),
        (EMBED, {"input": [[1, 2, 3]]}, "input[0]"),
        (EMBED, {"input": {"type": "audio"}}, "input[0]"),
        (EMBED, {"encoding_format": "int8"}, "encoding_format"),
        (EMBED, {"dimensions": 5}, "dimensions"),
        (EMBED, {"truncate": True}, "truncate"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(served, path, body, param):
    complete = {CHAT: {"messages": HELLO}, DRAW: {"prompt": "red"}, EMBED: {"input": "red"}}[path]
    text = json.dumps({**complete, **body})  # httpx itself refuses NaN
    answer = served.client.post(path, content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = refusal(answer)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    name = (param or "seed").rpartition(".")[2].partition("[")[0]
    assert name.strip("\\") in error["message"] or param == "messages"


def test_what_means_nothing_here_is_taken(served):
    nothing = {"user": "me", "metadata": {"a": "b"}, "n": 1, "logprobs": False, "presence_penalty": 0.0, "tools": []}
    nothing |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto", "stop": None}
    assert served.chat(*HELLO, max_tokens=1, **nothing).status_code == 200
    same = {"response_format": "b64_json", "quality": "auto", "background": "opaque", "output_format": "png"}
    assert served.draw("red", size="auto", n=1, **same, style=None).status_code == 200


def test_a_model_that_is_not_served_is_404_with_the_names(served):
    for path, body in [(CHAT, {"messages": HELLO}), (DRAW, {"prompt": "x"}), (EMBED, {"input": "x"})]:
        for name in ("gpt-5", "", 5, ["random"], "\ud800"):
            text = json.dumps({**body, "model": name})
            answer = served.client.post(path, content=text, headers={"Content-Type": "application/json"})
            assert answer.status_code == 404
            assert refusal(answer)["code"] == "model_not_found" and "random" in refusal(answer)["message"]
    assert refusal(served.ask("/v1/models/x"))["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "expected a data URL"),
        ("file:///etc/passwd", "expected a data URL"),
        ("ftp://host/a.png", "expected a data URL"),
        ("http://127.0.0.1:1/a.png", "--allow_urls"),
        ("HTTPS://host/a.png", "--allow_urls"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", "not a picture"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "SVG"),
        (None, "expected a data URL"),
        (5, "expected a data URL"),
    ],
)
def test_a_picture_is_a_data_url_and_never_a_path_or_an_address(served, url, words):
    part = {"type": "image_url", "image_url": {"url": url}}
    for path, body in [(CHAT, {"messages": [{"role": "user", "content": [part]}]}), (EMBED, {"input": part})]:
        answer = served.ask(path, body)
        assert answer.status_code == 400 and words in refusal(answer)["message"]


def test_addresses_are_visited_only_where_the_server_was_told_so(served, tmp_path, monkeypatch):
    """A web server of this machine; the picture from it is the same as the one in the request."""
    (tmp_path / "a.png").write_bytes(png(picture()))
    (tmp_path / "large.png").write_bytes(png(picture(size=(200, 51))))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}"
        parts = [
            {"type": "image_url", "image_url": {"url": f"{address}/{name}"}} for name in ("a.png", "large.png", "b")
        ]
        assert "--allow_urls" in refusal(served.ask(EMBED, {"input": parts[0]}))["message"]
        allowed = dataclasses.replace(served.server.settings, allow_urls=True)
        monkeypatch.setattr(served.server, "settings", allowed)
        fetched, large, absent = (served.ask(EMBED, {"input": part}) for part in parts)
        web.shutdown()
    assert fetched.json()["data"] == served.ask(EMBED, {"input": data_url(picture())}).json()["data"]
    assert large.status_code == 400 and "200 x 51 pixels" in refusal(large)["message"]
    assert absent.status_code == 400 and "404" in refusal(absent)["message"]


def test_a_picture_of_too_many_pixels_is_refused_from_its_header(served):
    answer = served.chat(user(picture(size=(200, 51)), "what?"))
    assert answer.status_code == 400 and "--max_pixels" in refusal(answer)["message"]
    assert refusal(answer)["code"] == "image_too_large"


def test_a_picture_that_is_damaged_behind_its_header_is_the_senders_fault(served):
    broken = png(picture())[:-900]
    url = data_url(picture())[:22] + base64.b64encode(broken).decode()
    answer = served.ask("/v1/embeddings", {"input": url})
    assert answer.status_code == 400 and "damaged" in refusal(answer)["message"]


def test_of_an_edit_the_mask_and_wrong_forms_are_refused(served):
    image = ("a.png", png(picture()))

    def edit(files, **fields):
        return served.client.post(EDIT, data={"prompt": "x", **fields}, files=files)

    for answer, words in [
        (edit({"image": image, "mask": image}), "mask is not supported"),
        (edit({"file": image}), "'file'"),
        (edit({"user": (None, "me")}), "0 pictures"),
        (edit({"image": (None, "a.png")}), "expected a file"),
        (edit([("image", image)] * 3), "3 pictures"),
        (edit({"image": ("a.png", b"")}), "0 bytes"),
        (edit({"image": ("a.png", b"hello")}), "not a picture"),
        (edit({"image": image}, prompt=""), "prompt is empty"),
        (edit({"image": image}, n="many"), "n is 'many'"),
        (edit({"image": image}, n=["1", "2"]), "given twice"),
        (edit({"image": image}, strength="0"), "strength"),
        (edit({"image": image}, input_fidelity="high"), "input_fidelity"),
        (edit({"image": image}, response_format="url"), "b64_json"),
        (edit({"other": ("x", b"1"), "image": image}), "'other'"),
    ]:
        assert answer.status_code == 400, answer.text
        assert words in refusal(answer)["message"]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        answer = served.client.post(EDIT, content=b"--y\r\nnonsense", headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text
        refusal(answer)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(served):
    context = served.worker.processor.tokenizer.model_max_length
    answer = served.chat({"role": "user", "content": "x" * (context + 1)})
    assert answer.status_code == 400 and refusal(answer)["code"] in ("context_length_exceeded", None)
    assert str(context) in refusal(answer)["message"] or "tokens" in refusal(answer)["message"]


def test_without_the_key_nothing_is_answered_but_whether_it_lives(checkpoint):
    found = Served(checkpoint, start=False, api_key="secret")
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer é".encode()},
    ):
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            answer = found.client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert refusal(answer)["code"] == "invalid_api_key"
    assert found.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert refusal(found.client.get("/ready"))["code"] == "not_ready"
    assert found.client.get("/health").status_code == 503  # its worker was not started


def test_an_error_of_ours_is_a_500_without_a_traceback(served, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("secret path /etc")

    monkeypatch.setattr(served.worker, "_embed", broken)
    answer = served.ask("/v1/embeddings", {"input": "red"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert refusal(answer)["type"] == "server_error"
    assert "secret path" in capsys.readouterr().err  # the log has it
    monkeypatch.setattr(served.worker, "_embed", lambda jobs: (_ for _ in ()).throw(MemoryError()))
    answer = served.ask("/v1/embeddings", {"input": "red"})
    assert answer.status_code == 503 and refusal(answer)["code"] == "out_of_memory"


def test_what_is_no_http_at_all_is_refused_in_the_one_form_too(served):
    uvicorn = pytest.importorskip("uvicorn")
    from pisces_serving.__main__ import Protocol

    server = uvicorn.Server(uvicorn.Config(served.client.app, port=0, http=Protocol, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    for nonsense in (b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01 TLS\r\n\r\n"):
        with socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=20) as connection:
            connection.sendall(nonsense)
            head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"
    server.should_exit = True
    thread.join(20)
