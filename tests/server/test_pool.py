"""A server of several models: chosen by name, loaded when they are wanted, deployed and undeployed, put to sleep."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from jaxllm.pool.face import PoolFace
from jaxllm.pool.pool import Pool
from jaxllm.server.app import make_app
from jaxllm.server.context import Settings
from jaxllm.server.run import Listen, make_server
from tests.helpers.patience import patience
from tests.helpers.tiny_llama import write_tiny_llama
from tests.pool.conftest import check_nothing_leaked
from tests.server.live import ENGINE, KEY, free_port, wait_until, wait_until_healthy

SMALL = ENGINE | {"kv_cache_memory_bytes": 1 << 19, "max_num_seqs": 4}
BUDGET = 1_500_000  # two models


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write_tiny_llama(tmp_path_factory.mktemp(name), seed=i) for i, name in enumerate(("a", "b", "c"))}


@contextlib.contextmanager
def serving(pool: Pool) -> Iterator[str]:
    face, port = PoolFace(pool), free_port()
    settings = Settings(served_model_names=("a",), api_keys=(KEY,), request_timeout=patience(60))
    server = make_server(make_app(face, settings), face, Listen(port=port))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        wait_until(lambda: not any(model.has_work for model in pool.models))
    finally:
        server.should_exit = True
        thread.join(patience(10))
        pool.close()
    check_nothing_leaked(pool)


@pytest.fixture(scope="module")
def url(folders) -> Iterator[str]:
    models = {"a": {"path": str(folders["a"]), "aliases": ["first"]}, "b": str(folders["b"]), "c": str(folders["c"])}
    with serving(Pool(models, device_memory_bytes=BUDGET, **SMALL)) as where:
        yield where


@pytest.fixture
def http(url: str):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=patience(60)) as made:
        yield made


def complete(http, model: str | None, **more):
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 8, "ignore_eos": True} | more
    return http.post("/v1/completions", json=body | ({"model": model} if model else {}))


def test_the_openai_client_sees_the_models_and_chooses_by_name(url, http):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=patience(60)) as client:
        assert [model.id for model in client.models.list()] == ["a", "b", "c"]
        said = {
            name: client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0).choices[0].text
            for name in ("a", "first", "b", "c")
        }
        chat = client.chat.completions.create(model="b", messages=[{"role": "user", "content": "x"}], max_tokens=3)
        vectors = client.embeddings.create(model="c", input="hello")
    assert said["a"] == said["first"] and len({*said.values()}) == 3
    assert chat.model == "b" and vectors.model == "c"
    assert complete(http, None).json()["model"] == "a"
    states = {card["id"]: card["state"] for card in http.get("/v1/models").json()["data"]}
    assert states == {"a": "ready", "b": "ready", "c": "ready"}
    missing = complete(http, "gpt-4")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_sleep_wake_and_who_is_running(http):
    complete(http, "a")
    assert http.get("/is_sleeping", params={"model": "a"}).json() == {"is_sleeping": False}
    http.post("/sleep", params={"model": "a"}).raise_for_status()
    assert http.get("/is_sleeping", params={"model": "a"}).json() == {"is_sleeping": True}
    http.post("/wake_up", params={"model": "a"}).raise_for_status()
    running = http.get("/running").json()
    assert running["current"] == "a" and {one["model"] for one in running["running"]} == {"a", "b", "c"}
    assert running["device_bytes"]["peak"] <= running["device_bytes"]["limit"] == BUDGET
    assert running["switches"][-1]["model"] == "a"
    http.post("/sleep", params={"level": 2}).raise_for_status()
    assert {one["place"] for one in http.get("/running").json()["running"]} == {"disk"}
    assert complete(http, "a").status_code == 200


def test_metrics_have_every_model(http):
    complete(http, "b"), complete(http, "c")
    text = http.get("/metrics").text
    for name in ("b", "c"):
        assert f'jaxllm:generation_tokens_total{{model_name="{name}"}}' in text
        assert f'jaxllm:model_ready{{model_name="{name}"}} 1.0' in text
    assert text.count("# HELP jaxllm:generation_tokens_total") == 1 and "jaxllm:pool_device_bytes " in text
    assert http.get("/stats").json()["pool"]["policy"] == "token"


def test_deploy_undeploy_and_a_stream_that_says_what_it_waits_for(http, folders, tmp_path):
    folder = shutil.copytree(folders["a"], tmp_path / "d")
    card = http.post("/v1/models/deploy", json={"model": "d", "path": str(folder), "priority": 3}).json()
    assert card["id"] == "d" and card["priority"] == 3
    with http.stream("POST", "/v1/completions", json={"model": "d", "prompt": "hello", "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and lines[-1] == "data: [DONE]"
    assert all(line.startswith((": ", "data: ")) for line in lines)
    assert complete(http, "d").json()["choices"][0]["text"] == complete(http, "a").json()["choices"][0]["text"]
    gone = http.post("/v1/models/undeploy", json={"model": "d", "wait": True})
    assert gone.json()["state"] == "absent" and complete(http, "d").status_code == 404


def test_what_does_not_fit_or_cannot_be_read_is_refused_with_the_reason(http, folders, tmp_path):
    large = {"model": "large", "path": str(folders["a"]), "engine": {"kv_cache_memory_bytes": 2 * BUDGET}, "wait": True}
    refused = http.post("/v1/models/deploy", json=large)
    assert refused.status_code == 507 and str(BUDGET) in refused.json()["error"]["message"]
    (tmp_path / "config.json").write_text("{}")
    broken = http.post("/v1/models/deploy", json={"model": "broken", "path": str(tmp_path), "wait": True})
    assert broken.status_code == 503 and "retry-after" in broken.headers
    assert {c["id"]: c["state"] for c in http.get("/v1/models").json()["data"]}["broken"] == "failed"
    absent = {one["model"]: one["error"] for one in http.get("/running").json()["absent"]}
    assert "model.safetensors" in absent["broken"] and absent.keys() <= {"large", "broken"}
    for name in ("large", "broken"):
        http.post("/v1/models/undeploy", json={"model": name, "wait": True}).raise_for_status()
    taken = http.post("/v1/models/deploy", json={"model": "first", "path": "x"})
    assert taken.status_code == 400 and "'first' belongs to 'a'" in taken.json()["error"]["message"]


def test_a_request_that_waits_less_than_loading_takes_is_told_when_to_come_back(http, folders):
    http.post("/v1/models/deploy", json={"model": "slow", "path": str(folders["b"])}).raise_for_status()
    headers = {"x-request-timeout": "0.001"}
    early = http.post("/v1/completions", json={"model": "slow", "prompt": "x"}, headers=headers)
    if early.status_code != 200:  # else it was loaded already
        assert early.status_code == 503 and int(early.headers["retry-after"]) >= 1
        assert early.json()["error"]["code"] == "loading"
    wait_until(lambda: http.get("/v1/models/slow").json()["state"] == "ready", 60)
    http.post("/v1/models/undeploy", json={"model": "slow", "wait": True}).raise_for_status()


def test_keep_alive_of_a_request_says_how_long_its_model_stays(http):
    assert complete(http, "a", keep_alive="1h").status_code == 200
    assert http.get("/running").json()["running"][0]["keep_alive"] == 3600
    assert complete(http, "a", keep_alive=0).status_code == 200
    wait_until(lambda: http.get("/running").json()["running"][0]["place"] == "host")
    assert complete(http, "a", keep_alive="soon").status_code == 400
    complete(http, "a", keep_alive=-1)


def test_weights_are_replaced_in_place(http, folders):
    before = complete(http, "a").json()["choices"][0]["text"]
    body = {"model": "a", "model_path": str(folders["b"])}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    assert complete(http, "a").json()["choices"][0]["text"] == complete(http, "b").json()["choices"][0]["text"]
    http.post("/update_weights_from_disk", json={"model": "a", "model_path": str(folders["a"])}).raise_for_status()
    assert complete(http, "a").json()["choices"][0]["text"] == before


def test_a_server_of_one_model_sleeps_wakes_and_changes_its_weights(live, tiny_model, tmp_path):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=patience(60)) as http:
        before = complete(http, "tiny").json()["choices"][0]["text"]
        compiled = live.llm.engine.runner.num_compilations
        for level in (1, 2):
            http.post("/sleep", params={"level": level}).raise_for_status()
            assert http.get("/is_sleeping").json() == {"is_sleeping": True}
            refused = complete(http, "tiny")
            assert refused.status_code == 503 and "/wake_up" in refused.json()["error"]["message"]
            assert http.get("/health").status_code == 200, "a sleeping server is well"
            http.post("/wake_up", params={"tags": "weights"}).raise_for_status()
            assert http.get("/is_sleeping").json() == {"is_sleeping": True}
            http.post("/wake_up").raise_for_status()
            assert complete(http, "tiny").json()["choices"][0]["text"] == before
        other = write_tiny_llama(tmp_path, seed=5)
        http.post("/update_weights_from_disk", json={"model_path": str(other)}).raise_for_status()
        assert complete(http, "tiny").json()["choices"][0]["text"] != before
        http.post("/update_weights_from_disk", json={"model_path": str(tiny_model)}).raise_for_status()
        assert complete(http, "tiny").json()["choices"][0]["text"] == before
        assert live.llm.engine.runner.num_compilations == compiled
        assert http.post("/v1/models/deploy", json={"model": "x", "path": "y"}).status_code == 400
        assert http.post("/sleep", params={"level": 3}).status_code == 400
        kept = complete(http, "tiny", keep_alive="5m")
        assert kept.status_code == 400 and kept.json()["error"]["param"] == "keep_alive"
        assert json.loads(http.get("/running").text)["running"][0]["place"] == "device"
