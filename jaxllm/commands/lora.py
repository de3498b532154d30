"""`--lora-modules`: adapters that are served from the start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.adapters.store import AdapterStore


def add_lora_modules(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """The flag."""
    group.add_argument(
        "--lora-modules",
        nargs="+",
        type=_module,
        default=[],
        metavar="NAME=PATH",
        help='adapters that are served from the start, or as JSON {"name": .., "path": ..}; needs --enable-lora',
    )


def _module(text: str) -> tuple[str, str]:
    """Name and folder; a `base_model_name` beside them says nothing new."""
    if text.startswith("{"):
        try:
            given = json.loads(text)
            return str(given["name"]), str(given["path"])
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f'{text!r} is not JSON with "name" and "path"') from None
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def check_lora_modules(args: argparse.Namespace, served: Sequence[str]) -> None:
    """Raise ValueError where the adapters cannot be served, before anything is loaded."""
    names = [name for name, _ in args.lora_modules]
    if names and not args.enable_lora:
        raise ValueError("--lora-modules needs --enable-lora; add it")
    if taken := [name for name in names if name in served or names.count(name) > 1]:
        raise ValueError(f"--lora-modules has the name {taken[0]!r} twice, or the model has it; give another")


def load_lora_modules(args: argparse.Namespace, adapters: AdapterStore) -> None:
    """Read the adapters. Raises ValueError naming one that cannot be served."""
    for name, path in args.lora_modules:
        try:
            adapters.load(name, path)
        except ValueError as error:
            raise ValueError(f"--lora-modules {name}: {error}") from None
