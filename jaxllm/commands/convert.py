"""`jaxllm convert`: a checkpoint in, the same model in another format out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxllm.config import DTYPES

HELP = "Write a checkpoint in another format."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("source", metavar="SRC", help="short name, folder, .gguf file or Hugging Face id")
    parser.add_argument("target", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--to", default="safetensors", choices=("orbax", "safetensors"), help="default: safetensors")
    parser.add_argument(
        "--quantize",
        metavar="int8|int4[:GROUP]|fp8",
        help="round the linears and write them as compressed-tensors (docs/quantization.md)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a text on which the rounded model should give what it gave before (GPTQ); without it, round to nearest",
    )
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="of the text, its first (default: 32768)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the matrices")
    parser.add_argument("--mesh", default="tp=1", help="devices that hold the parameters while they are written")
    parser.add_argument("--sharding-rules", default="megatron", help="shipped name or a .toml file")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def _calibration(args: argparse.Namespace) -> Any:
    from jaxllm.weights.calibration import DEFAULT_TOKENS, Calibration

    if args.calibration is None:
        if args.calibration_tokens is not None:
            raise ValueError("--calibration-tokens is of a text; name it with --calibration FILE")
        return None
    return Calibration(args.calibration, args.calibration_tokens or DEFAULT_TOKENS)


def run(args: argparse.Namespace) -> int:
    """Read, write, and say where."""
    from jaxllm.weights.convert import convert

    path = convert(
        args.source,
        args.target,
        to=args.to,
        dtype=args.dtype,
        mesh=args.mesh,
        sharding_rules=args.sharding_rules,
        quantize=args.quantize,
        calibration=_calibration(args),
    )
    print(json.dumps({"model": args.source, "path": str(path), "format": args.to}) if args.json else path)
    return 0
