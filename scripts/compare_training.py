"""The same small model trained by jaxllm and by a plain torch loop, in turns: tokens per second and held-out loss.

    python scripts/compare_training.py --data tinyshakespeare.txt             # speed: a few hundred steps of each
    python scripts/compare_training.py --data tinyshakespeare.txt --whole     # nanoGPT's 2,000 steps, to the loss

nanoGPT's small setting: 4 layers, 4 heads, width 128, context 64, batch 12, characters. Both sides train the Llama that
transformers builds from the configuration that jaxllm wrote, with AdamW, clipping and the same schedule. Run it on a
quiet machine; `--compile` adds torch.compile.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12


def ours(data: Path, output: Path, steps: int, dtype: str) -> dict:
    """`jaxllm train` as a user runs it; its report."""
    command = [
        sys.executable,
        "-m",
        "jaxllm",
        "train",
        "pretrain",
        "--data",
        str(data),
        "--output",
        str(output),
        "--json",
        "--num-layers",
        str(LAYERS),
        "--num-heads",
        str(HEADS),
        "--hidden-size",
        str(WIDTH),
        "--context-length",
        str(CONTEXT),
        "--batch-size",
        str(BATCH),
        "--steps",
        str(steps),
        "--eval-every",
        str(steps),
        "--no-plot",
        "--sample-every",
        "0",
        "--compute-dtype",
        dtype,
    ]
    started = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return {**json.loads(process.stdout), "wall_s": time.perf_counter() - started}


def theirs(data: Path, config: Path, steps: int, *, compiled: bool) -> dict:
    """A plain loop over the same architecture from random weights."""
    import numpy as np
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(config)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    text = data.read_text(encoding="utf-8")
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[c] for c in text])
    train, valid = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    forward = torch.compile(model) if compiled else model
    rng, seconds = np.random.default_rng(0), []
    for step in range(steps):
        started = time.perf_counter()
        starts = torch.tensor(rng.integers(0, len(train) - CONTEXT - 1, BATCH))
        windows = train[starts[:, None] + torch.arange(CONTEXT + 1)]
        logits = forward(input_ids=windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min((step + 1) / 100, 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - 100) / max(1, steps - 100))))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    return {"tokens_per_s": BATCH * CONTEXT / seconds[len(seconds) // 2], "eval_loss": _held_out(model, valid)}


def _held_out(model, valid) -> float:
    import torch

    windows = valid[: (len(valid) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    with torch.no_grad():
        for some in windows.split(64):
            logits = model(input_ids=some[:, :-1], use_cache=False).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum")
            )
    return total / (len(windows) * CONTEXT)


def main() -> None:
    """Print one JSON object per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--whole", action="store_true", help="2,000 steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--compute-dtype", default="auto")
    args = parser.parse_args()
    steps = 2000 if args.whole else args.steps
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 if args.whole else args.rounds):
            output = Path(folder) / str(number)
            report = ours(args.data, output, steps, args.compute_dtype)
            print(json.dumps({"who": "jaxllm", **report}), flush=True)
            for compiled in (False, True) if args.compile else (False,):
                name = "torch.compile" if compiled else "torch eager"
                print(json.dumps({"who": name, **theirs(args.data, output, steps, compiled=compiled)}), flush=True)


if __name__ == "__main__":
    main()
