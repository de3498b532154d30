"""Several processes as one engine, started by the local launcher: what they compute, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main
from tests.helpers.patience import patience
from tests.helpers.tiny_model import write_tiny_model
from tests.server.live import free_port, wait_until_healthy

ROOT = Path(__file__).parents[2]
SMALL = ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
EIGHT_PAGES = 8 * 16 * 3 * 16 * 2 * 4  # pages of 16 tokens, 3 heads of 16, key and value, float32, one layer
READS_PROC = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")


def launch(processes: int, *command: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, str(ROOT / "scripts/launch_local.py"), "--processes", str(processes)]
    return subprocess.Popen(
        [*launcher, "--devices-per-process", "1", "--", sys.executable, "-m", "jaxllm", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pids(launcher: subprocess.Popen[str]) -> list[int]:
    """The launcher's processes, in the order of their numbers."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def read_until(launcher: subprocess.Popen[str], text: str, seconds: float = 150) -> None:
    assert launcher.stderr is not None
    deadline = time.monotonic() + patience(seconds)
    while text not in (line := launcher.stderr.readline()):
        assert line and time.monotonic() < deadline, line


def test_two_processes_say_what_one_says_with_the_same_flags(tmp_path, capsys):
    """No flag of a size: what a device has is asked of the process's own. Several samples per prompt."""
    model = str(write_tiny_model(tmp_path))
    command = ["generate", "hello", "a b c", "--model", model, "--mesh", "tp=2", "--max-tokens", "12", "--dtype"]
    command += ["float32", "--n", "2", "--temperature", "0.8", "--seed", "3", "--ignore-eos", "--json"]
    together = launch(2, *command)
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    out, err = together.communicate(timeout=patience(180))
    assert together.returncode == 0, err
    answers = [[answer["token_ids"] for answer in said["outputs"]] for said in (json.loads(out), alone)]
    assert answers[0] == answers[1] and len(answers[0]) == 4 and len(answers[0][0]) == 12


TIERED = """
import json, sys
from jaxllm import LLM, SamplingParams
half_page = 2 * 2 * 8 * 2 * 16 * 4 // 2  # layers, K and V, tokens, heads, width, float32: what one process has of it
llm = LLM(sys.argv[1], mesh="tp=2", dtype="float32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32,
          page_size=8, kv_cache_memory_bytes=200 * half_page, host_kv_bytes=100 * half_page, use_tqdm=False)
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 256 for i in range(n)]} for j, n in enumerate((90, 33, 70))]
said = []
for _ in range(3):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    said.append([[o.outputs[0].token_ids for o in outputs], [o.num_cached_tokens for o in outputs]])
    llm.engine.evict_idle()
print(json.dumps([said, llm.get_metrics()["prefix_cache_host_hits_total"]]), flush=True)
"""


def test_two_processes_load_what_was_evicted_instead_of_computing_it(tmp_path):
    """Each has its half of every page in its own memory; what comes back gives the same tokens."""
    model = str(write_tiny_model(tmp_path))
    script = tmp_path / "tiered.py"
    script.write_text(TIERED)
    together = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/launch_local.py"),
            "--processes",
            "2",
            "--devices-per-process",
            "1",
            "--",
            sys.executable,
            str(script),
            model,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert together.returncode == 0, together.stderr
    said, hits = json.loads(together.stdout)
    first, *later = said
    assert first[1] == [0, 0, 0]
    assert [tokens for tokens, _ in later] == [first[0]] * 2
    assert [cached for _, cached in later] == [[88, 32, 64]] * 2
    assert hits == 2 * (88 + 32 + 64)


def test_a_disk_tier_over_two_processes_is_refused_on_both(tmp_path):
    model = str(write_tiny_model(tmp_path))
    tiers = ["--host-kv-bytes", "1000000", "--disk-kv-bytes", "1000000", "--disk-kv-path", str(tmp_path / "disk")]
    together = launch(2, "generate", "hello", "--model", model, "--mesh", "tp=2", *SMALL, *tiers)
    _, err = together.communicate(timeout=180)
    assert together.returncode == 1
    assert "disk_kv_bytes is for one process" in err and "Traceback" not in err


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("routed"),
        family="Mixtral",
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=48,
        num_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


@pytest.fixture
def serving(routed) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Three processes that serve a routed model with little cache and a host tier, and their address."""
    port = free_port()
    command = ["serve", "--model", str(routed), "--mesh", "tp=3", "--port", str(port), "--no-warm-up", *SMALL]
    launcher = launch(3, *command, "--kv-cache-memory-bytes", str(EIGHT_PAGES), "--host-kv-bytes", "1000000")
    with launcher:
        read_until(launcher, "serving")
        wait_until_healthy(f"http://127.0.0.1:{port}")
        yield launcher, f"http://127.0.0.1:{port}"
        launcher.kill()


def complete(url: str, **fields: Any) -> list[str]:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True} | fields
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=patience(120)) as answer:
        return [choice["text"] for choice in json.load(answer)["choices"]]


@READS_PROC
def test_three_processes_serve_a_routed_model_until_one_is_lost(serving, routed):
    launcher, url = serving
    names = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=patience(60)))["data"][0]["id"]
    greedy = complete(url, model=names, temperature=0)
    drawn = complete(url, model=names, temperature=1.0, seed=7, n=2)
    # Between the first and the last the others push out what was cached for it.
    long = [complete(url, model=names, temperature=0, prompt=letter * 40) for letter in "abcdefa"]
    figures = urllib.request.urlopen(f"{url}/metrics", timeout=patience(60)).read().decode()
    started = time.monotonic()
    os.kill(pids(launcher)[2], signal.SIGKILL)
    _, err = launcher.communicate(timeout=patience(30))
    assert time.monotonic() - started < patience(15)
    assert launcher.returncode not in (0, 130)
    assert "process 2 is gone" in err
    assert long[0] == long[-1] and len({*map(str, long)}) > 3
    assert any(
        "host" in line and "hit" in line and float(line.split()[-1]) > 0
        for line in figures.splitlines()
        if not line.startswith("#")
    )

    alone = LLM(
        str(routed),
        mesh="tp=3",
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        use_tqdm=False,
    )
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    assert greedy == [alone.generate("hello", params)[0].outputs[0].text]
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=7, n=2)
    assert drawn == [output.text for output in alone.generate("hello", params)[0].outputs]


@pytest.fixture
def generating(routed) -> Iterator[subprocess.Popen[str]]:
    """A long generation by two processes that has begun."""
    command = ["generate", "hello", "--model", str(routed), "--mesh", "dp=2", "--max-tokens", "15000", "--ignore-eos"]
    launcher = launch(2, *command, "--dtype", "float32", "--kv-cache-memory-bytes", "20000000")
    with launcher:
        read_until(launcher, "Gloo")  # the first collectives have run
        time.sleep(2.0)
        yield launcher
        launcher.kill()


@READS_PROC
def test_loss_of_the_first_process_ends_the_others_with_a_message(generating):
    started = time.monotonic()
    os.kill(pids(generating)[0], signal.SIGKILL)
    _, err = generating.communicate(timeout=patience(30))
    assert time.monotonic() - started < patience(15)
    assert generating.returncode not in (0, 130)
    # JAX's runtime, which lives in process 0, may be the first to say that it is gone.
    assert "process 0 is gone" in err or "another task died" in err


@READS_PROC
def test_interrupt_ends_all(generating):
    children = pids(generating)
    generating.send_signal(signal.SIGINT)
    generating.communicate(timeout=patience(30))
    assert generating.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
