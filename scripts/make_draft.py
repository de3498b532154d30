#!/usr/bin/env python3
"""A draft model out of a model's own layers, and text of the model's own to distil it on.

1. `python scripts/make_draft.py cut MODEL_FOLDER DRAFT_FOLDER --layers 4` keeps that many layers, the first and the
   last among them, with embedding, norm and head as they are.
2. `python scripts/make_draft.py text MODEL_FOLDER TEXT_FOLDER --num-samples 2000` lets the model write the text that it
   is to be imitated on: prompts of a few random words, answers at temperature 1.
3. `jaxllm train pretrain --model DRAFT_FOLDER --data TEXT_FOLDER/train.txt --output DISTILLED --steps 600
   --batch-size 8 --context-length 256 --learning-rate 3e-4` trains the cut model on it.
4. `jaxllm bench speculative --model MODEL_FOLDER --speculative-config '{"method": "draft_model", "model": "DISTILLED",
   "num_speculative_tokens": 4}'` says what it is worth: acceptance a, and tokens per iteration against
   `(1 - a^(g+1)) / (1 - a)`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from pathlib import Path

_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..*)$")
_WORDS = (
    "The A In When My How Why Once Every Write Explain List Describe Is What Tell Please Give Code def import".split()
)


def cut(source: Path, target: Path, num_layers: int) -> None:
    """Write a folder with `num_layers` of the layers of a Hugging Face folder with one safetensors file."""
    from safetensors import safe_open
    from safetensors.flax import save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    total = config["num_hidden_layers"]
    if not 2 <= num_layers < total:
        raise ValueError(f"--layers is {num_layers}; the model has {total}, so give 2 to {total - 1}")
    kept = [round(i * (total - 1) / (num_layers - 1)) for i in range(num_layers)]
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, target)
    (target / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": num_layers}, indent=2), encoding="utf-8"
    )
    tensors = {}
    with safe_open(source / "model.safetensors", framework="flax") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            match = _LAYER.match(name)
            if match is None:
                tensors[name] = file.get_tensor(name)
            elif int(match[2]) in kept:
                tensors[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = file.get_tensor(name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def text(source: Path, target: Path, num_samples: int, max_tokens: int, seed: int) -> None:
    """Write `train.txt` with samples of the model."""
    from jaxllm import LLM, SamplingParams

    rng = random.Random(seed)
    prompts = [" ".join(rng.sample(_WORDS, 2)) for _ in range(num_samples)]
    params = [SamplingParams(temperature=1.0, seed=seed + i, max_tokens=max_tokens) for i in range(num_samples)]
    outputs = LLM(str(source), max_model_len=2 * max_tokens + 64).generate(prompts, params)
    target.mkdir(parents=True, exist_ok=True)
    samples = [f"{output.prompt}{output.outputs[0].text}" for output in outputs]
    (target / "train.txt").write_text("\n\n".join(samples), encoding="utf-8")


def main() -> int:
    """`cut` or `text`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("cut", "text"):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    commands.choices["cut"].add_argument("--layers", type=int, default=4)
    commands.choices["text"].add_argument("--num-samples", type=int, default=2000)
    commands.choices["text"].add_argument("--max-tokens", type=int, default=200)
    commands.choices["text"].add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "cut":
        cut(args.source, args.target, args.layers)
    else:
        text(args.source, args.target, args.num_samples, args.max_tokens, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
