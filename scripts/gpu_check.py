"""Check and measure jaxllm on a GPU box, in one command and under twelve minutes: `python scripts/gpu_check.py`.

Parts, each a process of its own with a time budget; what does not fit is skipped and said so:
  ceilings   copy bandwidth and matrix product rate of this very device
  kernels    the attention kernel against the XLA oracle, random shapes
  attention  the kernel alone: bytes/s of decodes, FLOP/s of prefills, for several tile sizes
  engine     a Llama-3.1-8B-shaped model with random weights: decode and prefill through the engine's compiled programs
  engine8    the same decodes with an int8 KV cache
  engine4    the same decodes with int4 weights in groups of 128
  products   a decode's matrix products alone: bfloat16, and quantised by the kernel, for several tile sizes
  offline    the whole engine: how long it takes to start, and requests through `LLM.generate`
  peer       the same work in transformers, static cache and torch.compile

-> gpu_check.json and gpu_check.md. Needs jax, flax and numpy; torch and transformers for the peer. `--tiny` runs all of
it on small shapes, on a CPU too (kernels interpreted): what it measures there means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from gpu.engine import engine, engine4, engine8, offline  # noqa: E402
from gpu.kernels import attention, ceilings, kernels, products  # noqa: E402
from gpu.peer import peer  # noqa: E402
from gpu.plan import FULL, SMALL  # noqa: E402
from gpu.report import add_fractions, describe_device, markdown  # noqa: E402

BUDGETS_S = {
    "ceilings": 35,
    "kernels": 60,
    "attention": 75,
    "engine": 150,
    "engine8": 45,
    "engine4": 90,
    "products": 75,
    "offline": 120,
    "peer": 120,
}
PARTS = {f.__name__: f for f in (ceilings, kernels, attention, engine, engine8, engine4, products, offline, peer)}


def run_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; rows that came before the budget ended are kept."""
    budget = args.budget or BUDGETS_S[name]
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if args.tiny else [])]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_COMPILATION_CACHE_DIR": str(args.out / "xla")}
    started, rows, log = time.perf_counter(), [], args.out / f"gpu_check.{name}.log"
    print(f"{name} (at most {budget} s)", file=sys.stderr, flush=True)
    results = args.out / f"gpu_check.{name}.jsonl"
    with log.open("w") as errors, results.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=errors, env=environment | os.environ)
        try:
            code: int | str = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "out of time"
    for line in results.read_text().splitlines():
        if line.startswith("{"):
            rows.append(json.loads(line))
    result: dict[str, Any] = {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}
    if code == "out of time":
        result["note"] = f"stopped after its {budget} s; rows that are missing were skipped"
    elif code != 0:
        result["note"] = "failed: " + " | ".join(log.read_text().splitlines()[-3:])
    return result


def main() -> int:
    """Run the parts asked for and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--budget", type=float, help="seconds for every part, in place of its own budget")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for row in PARTS[args.part](SMALL if args.tiny else FULL):
            print(json.dumps(row), flush=True)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report: dict[str, Any] = {"device": describe_device(), "parts": {}}
    for name in args.parts:
        report["parts"][name] = run_part(name, args)
        report["seconds"] = time.perf_counter() - started
        add_fractions(report)  # after every part: whatever ends this run, what is known is written
        (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
        (args.out / "gpu_check.md").write_text(markdown(report))
    print((args.out / "gpu_check.md").read_text())
    failed = any(str(part.get("note", "")).startswith("failed") for part in report["parts"].values())
    wrong = any(not row["ok"] for row in report["parts"].get("kernels", {}).get("rows", []))
    return int(failed or wrong)


if __name__ == "__main__":
    sys.exit(main())
