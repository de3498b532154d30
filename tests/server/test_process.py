"""A server process: signals, exit codes, and what clients see of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import signal
import time

import httpx

from tests.helpers.patience import patience
from tests.server.live import process, wait_until

SERVE = "import sys; from jaxllm.cli import main; sys.exit(main(sys.argv[1:]))"
# The second of two failures in a row: the engine gives up.
DOOMED = """
import sys
from jaxllm.commands import serve as cli
steps = 0
def fail():
    global steps
    steps += 1
    if steps > 20:
        raise RuntimeError("injected")
start = cli.start
cli.start = lambda *args: start(*args, before_step=fail)
from jaxllm.cli import main
sys.exit(main(sys.argv[1:]))
"""
LONG = {"prompt": "abc", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}


def stream(url: str) -> list[str]:
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=patience(60)) as answer:
        return [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]


def test_sigterm_finishes_every_accepted_request_and_refuses_new_ones(tiny_model):
    with process(tiny_model, SERVE) as (child, url), concurrent.futures.ThreadPoolExecutor(16) as pool:
        wait_until(lambda: "peak_flops_per_second" in httpx.get(f"{url}/stats").json(), 60)
        httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=patience(60))
        assert 0 < httpx.get(f"{url}/stats").json()["mfu"] < 2
        with httpx.Client(base_url=url) as kept:
            kept.get("/health")
            streams = [pool.submit(stream, url) for _ in range(16)]
            while kept.get("/stats").json()["num_requests_running"] < 16 and not any(s.done() for s in streams):
                time.sleep(0.005)
            child.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            if not all(s.done() for s in streams):
                refused = kept.post("/v1/completions", json={"prompt": "x"})
                assert refused.status_code == 503 and refused.headers["retry-after"]
                assert kept.get("/health").status_code == 503
        for events in (s.result() for s in streams):
            assert events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert child.wait(patience(30)) == 0, child.stderr.read()


def test_requests_are_taken_while_programs_compile_and_after_that_nothing_does(tiny_model):
    with process(tiny_model, SERVE) as (_, url):
        early = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 100, "seed": 1}, timeout=patience(60))
        assert early.status_code == 200
        wait_until(lambda: httpx.get(f"{url}/health").json() == {"status": "ok"}, 60)
        known = httpx.get(f"{url}/stats").json()["compilations"]
        again = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 100, "seed": 1}, timeout=patience(60)).json()
        assert again["choices"][0]["text"] == early.json()["choices"][0]["text"]
        stats = httpx.get(f"{url}/stats").json()
        assert stats["compilations"] == known and stats["compilations_after_warmup"] == 0


def test_dead_engine_gives_clean_errors_and_a_non_zero_exit(tiny_model):
    with process(tiny_model, DOOMED) as (child, url):
        started = time.monotonic()
        events = stream(url)
        error = json.loads(events[-2])["error"]
        assert events[-1] == "[DONE]" and error["type"] == "server_error" and "injected" not in error["message"]
        with contextlib.suppress(httpx.TransportError):  # it may be gone already
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=patience(10))
            assert answer.status_code in (500, 503)
        assert child.wait(patience(30)) == 1
        assert time.monotonic() - started < patience(20)
