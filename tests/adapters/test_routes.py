"""Adapters over HTTP: by name, listed with their parent, loaded and unloaded while others are answered."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'server'")

import httpx

from tests.adapters.conftest import ENGINE
from tests.helpers.patience import patience
from tests.server.live import KEY, serving

BODY = {"prompt": "once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def live(folders):
    with serving(folders.base, **ENGINE) as running:
        yield running


@pytest.fixture
def http(live):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=patience(60)) as made:
        yield made


def text(http, model):
    answer = http.post("/v1/completions", json=BODY | {"model": model})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def test_an_adapter_comes_answers_and_goes(http, folders):
    given = {"lora_name": "sql", "lora_path": str(folders.adapters[0])}
    assert http.post("/v1/completions", json=BODY | {"model": "sql"}).status_code == 404
    added = http.post("/v1/load_lora_adapter", json=given)
    assert (added.status_code, added.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    card = next(card for card in http.get("/v1/models").json()["data"] if card["id"] == "sql")
    assert card["parent"] == "tiny" and card["root"] == str(folders.adapters[0])
    assert http.get("/v1/models/sql").json()["parent"] == "tiny"
    assert http.get("/v1/models/tiny").json()["parent"] is None
    assert text(http, "sql") != text(http, "tiny")
    again = http.post("/v1/load_lora_adapter", json=given)
    assert again.status_code == 400 and "loaded already" in again.json()["error"]["message"]
    assert http.post("/v1/load_lora_adapter", json=given | {"load_inplace": True}).status_code == 200
    assert http.post("/v1/load_lora_adapter", json=given | {"lora_name": "tiny"}).status_code == 400
    assert (
        http.post("/v1/load_lora_adapter", json=given | {"lora_path": "/nowhere", "lora_name": "b"}).status_code == 404
    )
    removed = http.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 404
    assert http.post("/v1/completions", json=BODY | {"model": "sql"}).status_code == 404


def test_a_hundred_adapters_come_and_go_under_load(http, live, folders):
    """No wrong token, no compilation; more adapters than slots or places in host memory."""
    paths, expected = folders.adapters, {}
    for i, path in enumerate(paths):
        http.post("/v1/load_lora_adapter", json={"lora_name": f"fixed{i}", "lora_path": str(path)}).raise_for_status()
        expected[f"fixed{i}"] = text(http, f"fixed{i}")
    expected["tiny"] = text(http, "tiny")
    live.llm.engine.warm_up()
    stop, wrong = threading.Event(), []

    def ask(names: list[str]) -> None:
        with httpx.Client(base_url=live.url, headers=http.headers, timeout=patience(60)) as mine:
            while not stop.is_set():
                for name in names:
                    if text(mine, name) != expected[name]:
                        wrong.append(name)

    threads = [threading.Thread(target=ask, args=(names,)) for names in (["tiny", "fixed0"], ["fixed1", "fixed2"])]
    for thread in threads:
        thread.start()
    try:
        for i in range(100):
            name, which = f"passing{i}", i % len(paths)
            given = {"lora_name": name, "lora_path": str(paths[which])}
            http.post("/v1/load_lora_adapter", json=given).raise_for_status()
            if i % 5 == 0 and text(http, name) != expected[f"fixed{which}"]:
                wrong.append(name)
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert live.llm.engine.runner.num_compilations_after_warmup == 0
    assert len(live.llm.adapters._ready) <= ENGINE["max_cpu_loras"]


def test_a_request_goes_on_with_an_adapter_that_is_unloaded_meanwhile(http, folders):
    given = {"lora_name": "leaving", "lora_path": str(folders.adapters[3])}
    http.post("/v1/load_lora_adapter", json=given).raise_for_status()
    body = BODY | {"model": "leaving", "max_tokens": 100}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    got = ""
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        http.post("/v1/unload_lora_adapter", json={"lora_name": "leaving"}).raise_for_status()
        chunks = [line for line in lines if line.startswith("data: {")]
    assert chunks and http.post("/v1/completions", json=body).status_code == 404
    import json

    got = "".join(json.loads(chunk[6:])["choices"][0]["text"] for chunk in chunks)
    assert whole.endswith(got) and len(got) > len(whole) // 2
