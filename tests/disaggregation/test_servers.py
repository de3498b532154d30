"""Two servers and vLLM's contract between them: equal answers, exact bytes, and everything that can go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'server'")
pytest.importorskip("httpx", reason="needs the extra 'test'")

import httpx

from jaxllm.config.kv_transfer import KVTransferConfig
from jaxllm.disaggregation.peer import FETCH, HANDSHAKE, Peer, PeerError
from jaxllm.disaggregation.wire import decode_rows, encode_rows, span_names
from jaxllm.kv.logical import row_bytes
from tests.helpers.patience import patience
from tests.helpers.tiny_llama import write_tiny_llama
from tests.server.live import KEY, Live, serving, wait_until

HEADERS = {"authorization": f"Bearer {KEY}"}
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PROMPT = "The quick brown fox jumps over the lazy dog, and then over another one that had slept there for days. " * 2


@dataclasses.dataclass(frozen=True)
class Pair:
    prefill: Live
    decode: Live
    alone: Live

    def ask(self, live: Live, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(f"{live.url}{path}", json=body, headers=HEADERS, timeout=patience(60))

    def both(self, path: str, body: dict[str, Any], **changes: Any) -> Any:
        """The two requests that a router sends for one."""
        first = self.ask(self.prefill, path, {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK})
        assert first.status_code == 200, first.text
        return self.ask(self.decode, path, {**body, "kv_transfer_params": first.json()["kv_transfer_params"] | changes})


@contextlib.contextmanager
def giving(model: Path, config: dict[str, Any], **engine: Any) -> Iterator[Live]:
    with serving(model, kv_transfer_config=config, **engine) as live:
        address = urlparse(live.url)
        live.llm.exchange.serve_at(address.hostname, address.port, KEY)
        yield live


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sockets")


@pytest.fixture(scope="module")
def pair(model: Path, folder: Path) -> Iterator[Pair]:
    with (
        giving(
            model,
            {"kv_role": "kv_producer"},
            page_size=16,
            kv_events_config={
                "endpoint": f"ipc://{folder}/events",
                "replay_endpoint": f"ipc://{folder}/replay",
                "topic": "kv@tiny",
            },
        ) as prefill,
        giving(model, {"kv_role": "kv_consumer", "timeout_seconds": 5.0}, page_size=32, device_offset=1) as decode,
        serving(model, device_offset=2) as alone,
    ):
        yield Pair(prefill, decode, alone)


def stats(live: Live) -> Any:
    return dataclasses.replace(live.llm.exchange.stats)


BODIES = {
    "greedy": {"temperature": 0, "logprobs": 2},
    "seeded": {"temperature": 1.0, "seed": 11, "top_p": 0.9, "logprobs": 1},
    "several": {"temperature": 1.0, "seed": 3, "n": 3},
}


@pytest.mark.parametrize("name", BODIES)
def test_answers_equal_those_of_one_server(pair: Pair, name: str) -> None:
    body = {"prompt": f"{name}: {PROMPT}", "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    body |= BODIES[name]
    got, expected = pair.both("/v1/completions", body).json(), pair.ask(pair.alone, "/v1/completions", body).json()
    assert [c["token_ids"] for c in got["choices"]] == [c["token_ids"] for c in expected["choices"]]
    assert not stats(pair.decode).failed
    for a, b in zip(got["choices"], expected["choices"], strict=True):
        if "logprobs" in body:
            assert a["logprobs"]["token_logprobs"] == pytest.approx(b["logprobs"]["token_logprobs"], abs=1e-3)


def test_chat_streams_and_the_next_turn_moves_its_new_part_only(pair: Pair) -> None:
    memory = pair.decode.llm.engine.memory
    token, before = row_bytes(memory.layout, memory.num_layers), stats(pair.decode)
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = pair.both("/v1/chat/completions", body).json()
    length = answer["usage"]["prompt_tokens"]
    first = stats(pair.decode)
    assert first.bytes - before.bytes == (length - 1) * token  # the last token is computed where it goes on
    messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on with the fox."}]
    body |= {"messages": [{k: m[k] for k in ("role", "content")} for m in messages], "stream": True}
    streamed = pair.both("/v1/chat/completions", body).text
    assert streamed.rstrip().endswith("data: [DONE]")
    whole = pair.ask(pair.alone, "/v1/chat/completions", {**body, "stream": False}).json()
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    second = stats(pair.decode)
    assert 0 < second.bytes - first.bytes < (whole["usage"]["prompt_tokens"] - length + 32) * token
    wait_until(lambda: not len(pair.prefill.llm.exchange.exports))  # acknowledged


def test_pages_that_do_not_come_are_computed_or_fail_as_asked(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "lost: " + PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = pair.ask(pair.alone, "/v1/completions", body).json()["choices"][0]["text"]
    lost = {"remote_request_id": "nobody knows this one"}
    before = stats(pair.decode)
    assert pair.both("/v1/completions", body, **lost).json()["choices"][0]["text"] == expected
    assert stats(pair.decode).failed == before.failed + 1
    imports = pair.decode.llm.exchange.imports
    strict = dataclasses.replace(imports._config, kv_load_failure_policy="fail")
    monkeypatch.setattr(imports, "_config", strict)
    failed = pair.both("/v1/completions", body | {"prompt": "strict: " + PROMPT}, **lost)
    assert failed.status_code == 500 and "send it again" in failed.json()["error"]["message"]
    pair.decode.llm.engine.pool.check([])


def test_a_prefill_server_that_dies_in_mid_transfer_costs_no_token(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "dies: " + PROMPT * 2, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    real, calls = Peer.fetch, []

    def fetch(self: Peer, *args: Any) -> bytes:
        calls.append(1)
        if len(calls) > 1:
            raise PeerError("gone")
        return real(self, *args)

    monkeypatch.setattr(Peer, "fetch", fetch)
    got = pair.both("/v1/completions", body).json()
    assert len(calls) > 1
    assert got["choices"][0]["text"] == pair.ask(pair.alone, "/v1/completions", body).json()["choices"][0]["text"]
    wait_until(lambda: not pair.decode.llm.engine.has_work)
    pair.decode.llm.engine.pool.check([])


def test_nobody_fetches_and_the_lease_ends(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = pair.prefill.llm.exchange.exports
    monkeypatch.setattr(exports, "_lease", 0.3)
    body = {"prompt": "lease: " + PROMPT, "max_tokens": 1, "kv_transfer_params": ASK}
    params = pair.ask(pair.prefill, "/v1/completions", body).json()["kv_transfer_params"]
    pair.prefill.llm.engine.pool.check([])  # the device's own pages are free at once
    assert exports.num_bytes > 0
    wait_until(lambda: params["remote_request_id"] not in exports)
    gone = {"transfer_id": params["remote_request_id"], "starts": [0], "stops": [16], "names": ["0"]}
    answer = pair.ask(pair.prefill, FETCH, gone)
    assert answer.status_code == 404 and "lease" in answer.json()["error"]["message"]


def early(pair: Pair, name: str) -> dict[str, Any]:
    host, port = pair.prefill.llm.exchange.address
    return {"do_remote_prefill": True, "remote_host": host, "remote_port": port, "transfer_id": name}


def test_pages_travel_while_the_prompt_is_computed(pair: Pair) -> None:
    """The decode server has its request before the prefill server has: it waits for each piece of the prompt."""
    body = {"prompt": "early: " + PROMPT * 2, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    before, waits = stats(pair.decode), len(pair.prefill.llm.exchange.exports)
    with ThreadPoolExecutor(1) as pool:
        decode = pool.submit(
            pair.ask, pair.decode, "/v1/completions", body | {"kv_transfer_params": early(pair, "one")}
        )
        wait_until(lambda: pair.decode.llm.engine.has_work)
        asked = {**body, "max_tokens": 1, "kv_transfer_params": ASK | {"transfer_id": "one"}}
        first = pair.ask(pair.prefill, "/v1/completions", asked)
        assert first.json()["kv_transfer_params"]["remote_request_id"] == "one"
        got = decode.result(patience(30)).json()
    after = stats(pair.decode)
    assert got["choices"][0]["text"] == pair.ask(pair.alone, "/v1/completions", body).json()["choices"][0]["text"]
    memory = pair.decode.llm.engine.memory
    token = row_bytes(memory.layout, memory.num_layers)
    assert after.bytes - before.bytes == (got["usage"]["prompt_tokens"] - 1) * token and after.failed == before.failed
    wait_until(lambda: len(pair.prefill.llm.exchange.exports) <= waits)


def test_a_prompt_that_never_reaches_the_prefill_server_is_computed(pair: Pair, monkeypatch) -> None:
    imports = pair.decode.llm.exchange.imports
    monkeypatch.setattr(imports, "_config", dataclasses.replace(imports._config, timeout_seconds=0.4))
    body = {"prompt": "never: " + PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    before = stats(pair.decode)
    got = pair.ask(pair.decode, "/v1/completions", body | {"kv_transfer_params": early(pair, "never")}).json()
    assert got["choices"][0]["text"] == pair.ask(pair.alone, "/v1/completions", body).json()["choices"][0]["text"]
    assert stats(pair.decode).failed == before.failed + 1


def test_pages_that_are_waited_for_outlive_their_lease(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode server without a free slot says that it will come."""
    exports, imports = pair.prefill.llm.exchange.exports, pair.decode.llm.exchange.imports
    monkeypatch.setattr(exports, "_lease", 1.0)
    monkeypatch.setattr(imports, "_config", dataclasses.replace(imports._config, heartbeat_seconds=0.1))
    if imports._heartbeat is not None:  # of earlier tests, with the interval that it began with
        imports._ended.set()
        imports._heartbeat.join(patience(10))
        imports._ended.clear()
        imports._heartbeat = None
    body = {"prompt": "waits: " + PROMPT, "max_tokens": 1, "kv_transfer_params": ASK}
    params = pair.ask(pair.prefill, "/v1/completions", body).json()["kv_transfer_params"]
    offer = imports.offer(params, list(range(9)), "")
    time.sleep(2.0)
    assert params["remote_request_id"] in exports
    offer.close()
    wait_until(lambda: params["remote_request_id"] not in exports)


def test_a_client_that_leaves_while_pages_come_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real, has_begun = Peer.fetch, threading.Event()
    kept = len(pair.prefill.llm.exchange.exports)  # for earlier tests, until their leases end

    def slow(self: Peer, *args: Any) -> bytes:
        has_begun.set()
        time.sleep(0.5)
        return real(self, *args)

    monkeypatch.setattr(Peer, "fetch", slow)
    body = {"prompt": "leaves: " + PROMPT, "max_tokens": 8}
    first = pair.ask(pair.prefill, "/v1/completions", {**body, "max_tokens": 1, "kv_transfer_params": ASK}).json()
    asked = body | {"kv_transfer_params": first["kv_transfer_params"]}
    client = http.client.HTTPConnection(pair.decode.url.removeprefix("http://"))
    client.request("POST", "/v1/completions", json.dumps(asked), {**HEADERS, "content-type": "application/json"})
    assert has_begun.wait(30)
    client.close()
    wait_until(lambda: not pair.decode.llm.engine.has_work)
    wait_until(lambda: len(pair.prefill.llm.exchange.exports) <= kept)
    pair.decode.llm.engine.pool.check([])


def test_another_cache_type_is_refused_with_a_sentence(pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setitem(pair.decode.llm.exchange.facts, "kv_dtype", "int8")
    pair.decode.llm.exchange.imports._agreed.clear()
    body = {"prompt": "other: " + PROMPT, "max_tokens": 4, "temperature": 0}
    assert pair.both("/v1/completions", body).status_code == 200
    assert "kv_dtype differ: int8 here, float32 there" in caplog.text


@pytest.mark.parametrize(
    "params, message",
    [
        ({"do_remote_prefill": True}, "need remote_host, remote_port and remote_request_id"),
        ({"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 80, "remote_request_id": "x"}, "peers"),
        ({"do_remote_decode": True}, "this server is a kv_consumer"),
        ({"do_remote_prefil": True}, "has no 'do_remote_prefil'"),
        ({"transfer_id": "x" * 300}, "transfer_id must be"),
    ],
)
def test_bad_transfer_parameters_are_refused(pair: Pair, params: dict[str, Any], message: str) -> None:
    answer = pair.ask(pair.decode, "/v1/completions", {"prompt": "x", "kv_transfer_params": params})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_pages_are_behind_the_key_and_only_under_their_own_name(pair: Pair) -> None:
    assert httpx.get(f"{pair.prefill.url}{HANDSHAKE}").status_code == 401
    assert (
        pair.ask(pair.decode, FETCH, {"transfer_id": "x", "starts": [0], "stops": [1], "names": ["a"]}).status_code
        == 404
    )
    body = {"prompt": "named: " + PROMPT, "max_tokens": 1, "kv_transfer_params": ASK}
    name = pair.ask(pair.prefill, "/v1/completions", body).json()["kv_transfer_params"]["remote_request_id"]
    for start, stop in ((0, 16), (0, 100000), (16, 0)):
        asked = {"transfer_id": name, "starts": [start], "stops": [stop], "names": ["0"]}
        assert pair.ask(pair.prefill, FETCH, asked).status_code == 400


def fresh(pair: Pair) -> bool:
    """Let the prefill server compute something new."""
    return bool(pair.ask(pair.prefill, "/v1/completions", {"prompt": str(time.time()) * 9}))


def test_a_subscriber_knows_what_the_prefix_cache_holds(pair: Pair, folder: Path) -> None:
    msgpack, zmq = pytest.importorskip("msgpack"), pytest.importorskip("zmq")
    pool = pair.prefill.llm.engine.pool
    with zmq.Context() as context, context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as replay:
        live.connect(f"ipc://{folder}/events")
        live.subscribe("kv@")
        replay.connect(f"ipc://{folder}/replay")
        wait_until(lambda: fresh(pair) and live.poll(50))
        topic, number, _ = live.recv_multipart()
        assert topic == b"kv@tiny"
        replay.send((0).to_bytes(8, "big"))
        batches = []
        while (frames := replay.recv_multipart())[-2] != (-1).to_bytes(8, "big", signed=True):
            batches.append(msgpack.unpackb(frames[-1]))
    assert int.from_bytes(number, "big") < len(batches)
    known: dict[int, int | None] = {}
    for _, events, replica in batches:
        assert replica == 0
        for kind, *rest in events:
            if kind == "BlockStored":
                hashes, parent, tokens, size, lora, medium = rest
                assert len(tokens) == size * len(hashes) and size == 16 and lora is None and medium == "GPU"
                known |= dict(zip(hashes, [parent, *hashes], strict=False))
            elif kind == "BlockRemoved":
                for name in rest[0]:
                    del known[name]
            else:
                known.clear()
    assert {*known} == {int.from_bytes(digest[-8:], "big") for digest in pool._page_of}
    assert all(parent is None or parent in known for parent in known.values())


def test_rows_survive_the_wire_and_damage_is_seen() -> None:
    import ml_dtypes
    import numpy as np

    shapes = [((2, 2), (3, 4), np.dtype(np.int8)), ((2, 2), (3,), np.dtype(ml_dtypes.bfloat16))]
    rng = np.random.default_rng(0)
    spans = [[rng.integers(-9, 9, (*a, n, *b)).astype(dtype) for a, b, dtype in shapes] for n in (16, 5)]
    content = b"".join(encode_rows(spans))
    for got, given in zip(decode_rows(content, [16, 5], shapes), spans, strict=True):
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(got, given, strict=True))
    for bad in (content[:-9], content[:40] + b"x" + content[41:], b"", content + b"\0"):
        with pytest.raises(ValueError, match="damaged"):
            decode_rows(bad, [16, 5], shapes)
    with pytest.raises(ValueError, match="not the pages"):
        decode_rows(content, [16, 6], shapes)
    names = span_names("root", "", [1, 2, 3, 4], [2, 4])
    assert names[0] == span_names("root", "", [1, 2, 9], [2])[0] != span_names("root", "salt", [1, 2], [2])[0]


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "needs kv_role"),
        ({"kv_role": "producer"}, "kv_role='producer'"),
        ({"kv_role": "kv_both", "kv_rank": 0}, "has no 'kv_rank'"),
        ({"kv_role": "kv_both", "kv_connector_extra_config": {"lease_seconds": 0}}, "lease_seconds=0"),
        ({"kv_role": "kv_both", "heartbeat_seconds": -1}, "heartbeat_seconds=-1"),
    ],
)
def test_bad_configurations_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVTransferConfig.from_json(given)
