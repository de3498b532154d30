"""Several processes as one engine, started by the local launcher; what they send each other; how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.runner.batch import row_batch, sampling_rows
from jaxllm.runner.messages import decode, encode
from jaxllm.runner.processes import initialize
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Chunk
from tests.helpers.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
SMALL = ["--dtype", "float32", "--kv-cache-memory-bytes", "4000000", "--max-num-seqs", "4"]
SMALL += ["--max-num-batched-tokens", "64", "--ignore-eos", "--json"]


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("eight")
    return str(write_tiny_model(folder, num_attention_heads=8, num_key_value_heads=8, head_dim=16))


def launch(*command: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, str(ROOT / "scripts/launch_local.py"), "--processes", "2", "--devices-per-process", "4"]
    return subprocess.Popen(
        [*launcher, "--", sys.executable, "-m", "jaxllm", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_say_what_one_says(eight_heads, capsys):
    command = ["generate", "hello", "a b c", "--model", eight_heads, "--mesh", "tp=8", "--max-tokens", "12", *SMALL]
    command += ["--max-model-len", "64"]
    together = launch(*command)
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    out, err = together.communicate(timeout=180)
    assert together.returncode == 0, err
    answers = [[o["token_ids"] for o in answer["outputs"]] for answer in (json.loads(out), alone)]
    assert answers[0] == answers[1] and len(answers[0][0]) == 12


@pytest.fixture
def generating(eight_heads):
    """A long generation by two processes that has begun, and the process ids of both."""
    launcher = launch(
        "generate", "hello", "--model", eight_heads, "--mesh", "tp=8", "--max-tokens", "15000", *SMALL
    )  # fmt: skip
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    deadline = time.monotonic() + 150
    assert launcher.stderr is not None
    while "Gloo" not in (line := launcher.stderr.readline()):  # the first collectives have run
        assert line and time.monotonic() < deadline, line
    time.sleep(2.0)
    yield launcher, [int(pid) for pid in children.read_text().split()]
    launcher.kill()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("lost", [1, 0])
def test_lost_process_ends_the_others_in_time_with_a_message(generating, lost):
    launcher, pids = generating
    started = time.monotonic()
    os.kill(pids[lost], signal.SIGKILL)
    _, err = launcher.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert launcher.returncode not in (0, 130)
    # JAX's runtime, which lives in process 0, may be the first to say that it is gone.
    assert f"process {lost} is gone" in err or (lost == 0 and "another task died" in err)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_interrupt_ends_all(generating):
    launcher, pids = generating
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_dispatch_survives_the_wire_and_idle_masks_are_not_sent():
    request = Request("one", [1, 2, 3], SamplingParams(temperature=0.5, seed=7), limit=9, stop_ids=frozenset((4,)))
    rows = row_batch([Chunk(request, 2, 1, 1)], 4, 8, 100_000)
    table = np.arange(8, dtype=np.int32).reshape(4, 2)
    message = encode(("decode", 4, False), (rows, table, np.int32(3)))
    key, (back, table_back, steps) = decode(message, 100_000)
    assert key == ("decode", 4, False) and steps == 3
    np.testing.assert_array_equal(table_back, table)
    assert rows.sampling is not None
    for name in ("temperature", "seed", "bias_ids", "masked", "allowed"):
        sent, got = getattr(rows.sampling, name), getattr(back.sampling, name)
        np.testing.assert_array_equal(got, sent)
        assert got.dtype == sent.dtype
    assert len(message) < rows.sampling.allowed.nbytes
    assert sampling_rows([request], 4, 100_000).allowed.shape == back.sampling.allowed.shape


@pytest.mark.parametrize("message", [b"", b"\xff" * 20, encode(("reset", 0, True), ()) + b"x"])
def test_bytes_that_are_no_message_are_refused(message):
    with pytest.raises(ValueError, match="not a message"):
        decode(message, 10)


def test_half_a_description_of_the_processes_is_refused():
    with pytest.raises(ValueError, match="belong together"):
        initialize(EngineConfig(coordinator_address="127.0.0.1:1", num_processes=2))
    with pytest.raises(ValueError, match="process_id=2 of num_processes=2"):
        EngineConfig(num_processes=2, process_id=2)
