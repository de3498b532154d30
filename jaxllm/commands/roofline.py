"""`jaxllm roofline`: flags in; a table or one JSON object, and a plot, out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxllm.config import EngineConfig
from jaxllm.roofline.cost_model import QUANTIZED

HELP = "Lower bounds of a model on a chip."
_DTYPES = ("bfloat16", "float16", "float8", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default=EngineConfig().model, help="preset, short name, folder, .gguf file or id")
    parser.add_argument("--chip", default="h100", help="a name from the table of chips, or cpu: measured here")
    parser.add_argument("--batch", type=int, default=32, help="requests that decode together")
    parser.add_argument("--context", default="1024,4096,16384,65536", help="tokens in the cache, for example 1k,64k")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill iteration")
    parser.add_argument("--mesh", default="tp=1", help="chips that share the model, for example 'tp=8'")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--quantization", choices=tuple(QUANTIZED), help="of the weights, instead of --dtype")
    parser.add_argument("--kv-dtype", choices=(*_DTYPES, "float32"), default="bfloat16", help="of the KV cache")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the points into this PNG file")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises ValueError with one line that says what to change."""
    from jaxllm.families.presets import model_config
    from jaxllm.roofline.chips import find_chip
    from jaxllm.roofline.plot import check_plotting, save_plot
    from jaxllm.roofline.report import Setting, format_table, roofline

    for name in ("batch", "chunk"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    contexts = parse_contexts(args.context)
    if args.plot:
        check_plotting()
    config = model_config(args.model)
    tp = _tensor_parallel(args.mesh, config)
    setting = Setting(
        name=args.model,
        config=config,
        chip=find_chip(args.chip),
        tp=tp,
        weight_dtype=QUANTIZED[args.quantization] if args.quantization else args.dtype,
        kv_dtype=args.kv_dtype,
    )
    report = roofline(setting, batch=args.batch, contexts=contexts, chunk=args.chunk)
    if args.plot:
        save_plot(report, args.plot)
    print(json.dumps(report) if args.json else format_table(report, setting.chip.title))
    return 0


def parse_contexts(text: str) -> list[int]:
    """`"1024,64k,1m"` -> `[1024, 65536, 1048576]`."""
    contexts = []
    for part in text.lower().split(","):
        number = part.strip()
        unit = {"k": 1 << 10, "m": 1 << 20}.get(number[-1:], 1)
        number = number[:-1] if unit > 1 else number
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise ValueError(f"--context {text!r} is not understood at {part!r}; write lengths like 1024,4k,1m")
        contexts.append(int(number) * unit)
    return contexts


def _tensor_parallel(mesh: str, config) -> int:
    from jaxllm.sharding.rules import kv_copies, load_rules, parse_mesh

    sizes = parse_mesh(mesh)
    if any(size > 1 for axis, size in sizes.items() if axis != "tp"):
        raise ValueError(f"--mesh {mesh!r}: a roofline is of one replica; use tp=N and give --batch per replica")
    kv_copies(config, load_rules("megatron"), sizes)  # refuses a cut inside a head
    return sizes.get("tp", 1)
