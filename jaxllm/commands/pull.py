"""`jaxllm pull`: a model's name in, the path of its files out."""

from __future__ import annotations

import argparse
import json

from jaxllm.config import EngineConfig

HELP = "Fetch a model by its short name, for offline use."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("name", nargs="?", default=EngineConfig().model)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Fetch the model unless it is there."""
    from jaxllm.checkpoints import resolve_model

    path = resolve_model(args.name)
    print(json.dumps({"model": args.name, "path": str(path)}) if args.json else path)
    return 0
