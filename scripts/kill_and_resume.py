"""Kill a training run with SIGKILL at random moments, resume it each time, and compare with one that was left alone.

    python scripts/kill_and_resume.py --kills 10

Weights, moments and every logged loss must be bitwise equal. A run is started again as often as it is killed, so most
of the time goes into starting: about 10 s each.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS = 400


def command(data: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jaxllm",
        "train",
        "pretrain",
        "--data",
        str(data),
        "--output",
        str(output),
        "--steps",
        str(STEPS),
        "--num-layers",
        "2",
        "--hidden-size",
        "64",
        "--context-length",
        "32",
        "--save-every",
        "20",
        "--eval-every",
        "100",
        "--resume",
        "--no-plot",
        "--sample-every",
        "0",
    ]


def state(output: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint."""
    import orbax.checkpoint as ocp

    newest = max(int(folder.name) for folder in (output / "checkpoints").iterdir() if folder.name.isdecimal())
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((output / "checkpoints" / str(newest) / "state").absolute())["leaves"]


def logged(output: Path) -> list[dict]:
    if not (file := output / "log.jsonl").is_file():
        return []
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if "loss" in entry]


def killed(data: Path, output: Path, at: int) -> int:
    """Run until step `at` is logged, and kill; the step that was reached."""
    with subprocess.Popen(command(data, output), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(entry["step"] >= at for entry in logged(output)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    return max((entry["step"] for entry in logged(output)), default=0)


def main() -> None:
    """Print one line per kill, and the verdict as JSON; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.txt"
        data.write_text("".join(rng.choice("abcdefgh ") for _ in range(50_000)), encoding="utf-8")
        alone, broken = Path(folder) / "alone", Path(folder) / "broken"
        subprocess.run(command(data, alone), stderr=subprocess.DEVNULL, check=True)
        for at in sorted(rng.sample(range(5, STEPS - 5), args.kills)):
            print(f"killed after step {killed(data, broken, at)}", flush=True)
        subprocess.run(command(data, broken), stderr=subprocess.DEVNULL, check=True)
        ours, theirs = state(broken), state(alone)
        same_state = ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
        same_losses = [(e["step"], e["loss"]) for e in logged(broken)] == [
            (e["step"], e["loss"]) for e in logged(alone)
        ]
    print(json.dumps({"kills": args.kills, "same_state": same_state, "same_losses": same_losses}))
    sys.exit(not (same_state and same_losses))


if __name__ == "__main__":
    main()
