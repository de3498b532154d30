"""Start-up: a fresh process -> seconds until the engine is ready and until the first token.

Measured from outside, from the moment the process is asked for; `cold` gives it an empty compilation cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_CHILD = """
import json, sys, time
from jaxllm import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
ready = time.time()
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
next(llm.stream({"prompt_token_ids": list(range(5, 21))}, params), "")
print(json.dumps({"ready": ready, "first_token": time.time(), "compilations": llm.engine.runner.num_compilations}))
"""


def measure_startup(engine_arguments: dict[str, Any], *, num_iters: int, cold: bool) -> dict[str, Any]:
    """Medians over `num_iters` processes. A warm measurement runs one more first, which fills the cache."""
    runs = [_run(engine_arguments, cold) for _ in range(num_iters + (not cold))][not cold :]
    return {
        "model": engine_arguments["model"],
        "cold": cold,
        "ready_s": statistics.median(run["ready"] for run in runs),
        "first_token_s": statistics.median(run["first_token"] for run in runs),
        "compilations": runs[-1]["compilations"],
    }


def _run(engine_arguments: dict[str, Any], cold: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as empty:
        env = os.environ | ({"JAX_COMPILATION_CACHE_DIR": empty} if cold else {})
        started = time.time()
        command = [sys.executable, "-c", _CHILD, json.dumps(engine_arguments)]
        child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        raise ValueError(f"the measured process failed: {child.stderr.strip().splitlines()[-1:]}")
    run = json.loads(child.stdout.splitlines()[-1])
    return run | {name: run[name] - started for name in ("ready", "first_token")}
