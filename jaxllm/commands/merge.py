"""`jaxllm merge`: a LoRA adapter and its model in, one model with the adapter in its weights out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "Write a model with a LoRA adapter merged into its weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a PEFT folder")
    parser.add_argument("--model", metavar="NAME", help="what it belongs to; default: what the adapter says")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="of the matrices"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Merge, and say where."""
    from jaxllm.training.merge import merge

    model = merge(args.adapter, args.model, args.output, args.dtype)
    print(
        json.dumps({"model": model, "adapter": args.adapter, "output": str(args.output)}) if args.json else args.output
    )
    return 0
