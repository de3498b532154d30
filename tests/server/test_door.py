"""What others see of a server that starts, of one that another page calls, and of small questions."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from jaxllm.cli import main
from jaxllm.commands.startup import Startup
from jaxllm.server import protocol
from jaxllm.server.door import Door
from jaxllm.server.listen import Listen
from jaxllm.server.run import serving as serving_app
from tests.helpers.patience import patience


def test_a_taken_port_is_one_line_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = time.monotonic()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    error = capsys.readouterr().err
    assert "is taken; choose another --port" in error and len(error.splitlines()) == 1
    assert time.monotonic() - started < patience(10)


def test_a_server_that_loads_says_so(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    door, listen = Door(), Listen(port=port)
    startup = Startup(lambda stage: setattr(door, "stage", stage))
    with serving_app(door, listen, listen.bind()), httpx.Client(base_url=listen.url) as client:
        startup.stage("loading m")
        answer = client.get("/health")
        assert answer.status_code == 503 and answer.json()["status"] == "loading" and answer.headers["retry-after"]
        for done in range(1, 9):
            startup.compiled(done, 8)
        assert "compiling 8 of 8" in client.post("/v1/completions", json={}).json()["error"]["message"]

        early = client.get("/", headers={"accept": "text/html,*/*"})
        assert (early.status_code, early.headers["refresh"]) == (503, early.headers["retry-after"])
        assert early.text.startswith("the server is loading: compiling 8 of 8")

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        door.open(app)
        assert client.get("/health").status_code == 204
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "jaxllm: loading m" and said[1:] == [f"jaxllm: compiled {n} of 8 programs" for n in (2, 4, 6, 8)]


def test_pieces_of_a_stream_arrive_framed_and_the_connection_can_be_used_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = Listen(port=free.getsockname()[1])
    door = Door()

    async def app(scope, receive, send):
        length = [(b"content-length", b"4")] if scope["path"] == "/known" else []
        await send({"type": "http.response.start", "status": 200, "headers": length})
        for piece in (b"ab", b"", b"cd") if length else (b"one", b"", b"two\r\n", b"x" * 300):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if length else b"end"})

    door.open(app)
    whole = b"onetwo\r\n" + b"x" * 300 + b"end"
    with serving_app(door, listen, listen.bind()), httpx.Client(base_url=listen.url, timeout=patience(10)) as client:
        for _ in range(2):
            answer = client.get("/")
            assert answer.content == whole and answer.headers["transfer-encoding"] == "chunked"
        assert client.get("/known").content == b"abcd"
        assert client.head("/").content == b""
        assert client.get("/").content == whole
        with socket.create_connection((listen.host, listen.port), timeout=patience(10)) as old:
            old.sendall(b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
            received = b""
            while data := old.recv(4096):
                received += data
        assert received.partition(b"\r\n\r\n")[2] == whole, "HTTP/1.0 knows no chunks"


def test_a_head_that_never_comes_is_cut_off(live, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience(10)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        assert slow.recv(100) == b""
    with httpx.Client(base_url=live.url) as quick:
        for _ in range(2):
            assert quick.get("/health").status_code == 200


def test_pages_of_other_origins_may_call_where_they_are_allowed(live, tiny_model):
    ask = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = httpx.options(f"{live.url}/v1/chat/completions", headers=ask)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    refused = httpx.post(f"{live.url}/v1/chat/completions", json={}, headers={"origin": ask["origin"]})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/ping", "/load", "/docs", "/tokenizer_info"])
def test_small_questions_have_answers_and_heads(http, path):
    whole, head = http.get(path), http.head(path)
    assert whole.status_code == head.status_code == 200 and whole.content and not head.content


def test_what_tools_ask_of_the_tokenizer(http):
    info = http.get("/tokenizer_info").json()
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()
    assert http.post("/ping").status_code == 200 and http.get("/load").json() == {"server_load": 0}


def test_anthropic_clients_send_their_key_in_a_header_of_its_own(live):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for key, status in (("a-test-key", 200), ("wrong", 401)):
        answer = httpx.post(f"{live.url}/v1/messages", json=body, headers={"x-api-key": key}, timeout=patience(60))
        assert answer.status_code == status, answer.text
