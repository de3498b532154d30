"""The same model fine-tuned on the same instructions by jaxllm and by transformers (with peft): tokens per second.

    python scripts/compare_fine_tuning.py --model FOLDER --data instruction-data.json --lora-rank 16
    python scripts/compare_fine_tuning.py --model FOLDER --data instruction-data.json --lora-rank 0      # all weights

Both see every token of the same records once, about as many in a step, in turns. transformers pads each batch to its
longest record, as its users do; jaxllm packs. The median step counts, so that compiling does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def ours(args: argparse.Namespace, records: Path, output: Path) -> float:
    """`jaxllm train sft` as a user runs it: tokens per second of its median step."""
    command = [sys.executable, "-m", "jaxllm", "train", "sft", "--data", str(records), "--model", str(args.model)]
    command += ["--output", str(output), "--epochs", "1", "--batch-size", str(args.batch_size), "--no-plot", "--json"]
    command += ["--lora-rank", str(args.lora_rank), "--sample-every", "0", "--eval-every", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    steps = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [step["tokens_per_s"] for step in steps if "tokens_per_s" in step]
    return statistics.median(rates[1:])


def theirs(args: argparse.Namespace, records: list[dict[str, Any]], narrow: bool) -> float:
    """A plain loop over transformers' model, with peft's adapter or without: tokens per second of its median step."""
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    narrowly = torch.autocast("cpu", torch.bfloat16) if narrow else contextlib.nullcontext()
    rates = []
    for batch in batches([tokenized(tokenizer, record) for record in records], args.batch_size):
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (tokens, prompt) in enumerate(batch):
            ids[i, : len(tokens)], seen[i, : len(tokens)] = torch.tensor(tokens), 1
            labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        started = time.perf_counter()
        with narrowly:
            loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(len(tokens) for tokens, _ in batch) / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def batches(examples: list[tuple[list[int], int]], spans: int) -> Iterator[list[tuple[list[int], int]]]:
    """As many examples as fill so many spans, each as long as the longest of all."""
    room, batch = spans * max(len(tokens) for tokens, _ in examples), []
    for example in examples:
        if sum(len(tokens) for tokens, _ in [*batch, example]) > room:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def tokenized(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], int]:
    """A record's tokens by the model's chat template, and how many come before the answer."""
    asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    before = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    return whole, len(before)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a JSON list of instruction, input, output")
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    records = json.loads(args.data.read_text(encoding="utf-8"))[: args.records]
    found: dict[str, list[float]] = {"jaxllm": [], "transformers": [], "transformers, bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / "records.json"
        some.write_text(json.dumps(records), encoding="utf-8")
        for number in range(args.rounds):
            found["jaxllm"].append(ours(args, some, Path(folder) / str(number)))
            found["transformers"].append(theirs(args, records, narrow=False))
            found["transformers, bfloat16"].append(theirs(args, records, narrow=True))
    best = max(statistics.median(found[name]) for name in found if name != "jaxllm")
    print(json.dumps({"tokens_per_s": found, "ratio": statistics.median(found["jaxllm"]) / best}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
