"""`jaxllm collectives`: a mesh in; what its compiled program sends, as text or one JSON object, and a picture out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxllm.commands.flags import add_engine_flags, engine_arguments
from jaxllm.config import EngineConfig

HELP = "Count the collectives in the compiled program of a mesh."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--topology", help="count in the TPU program of a slice, for example v5e:2x4")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what each device holds into this PNG file")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Compile and count."""
    if args.topology:
        from jaxllm.deployment.topology import prepare_environment

        prepare_environment()  # before anything loads JAX
    from jaxllm.deployment.block_plot import check_plotting, save_plot
    from jaxllm.deployment.collectives import count_collectives, format_counts

    if args.plot:
        check_plotting()
    counts = count_collectives(EngineConfig(**engine_arguments(args)), topology=args.topology)
    if args.plot:
        save_plot(counts, args.plot)
    print(json.dumps(counts) if args.json else format_counts(counts))
    return 0
