"""`jaxllm train`: data in; a model that the next command serves, or an adapter, out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxllm.commands.flags import add_fields
from jaxllm.config.fields import describe
from jaxllm.training.config import TASKS, TrainConfig, read_toml

HELP = "Train a model: from scratch, on instructions, or as a classifier; whole or as a LoRA adapter."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command: the fields of `TrainConfig`."""
    parser.add_argument("task", nargs="?", choices=TASKS, help="pretrain, sft (instructions) or classify")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="fields by name; flags come before it")
    group = parser.add_argument_group("training")
    names = [name for name in describe(TrainConfig) if name != "task"]
    before = len(parser._actions)
    add_fields(group, TrainConfig, names)
    for action in parser._actions[before:]:  # only what was said, so that a file can say the rest
        action.default = argparse.SUPPRESS
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Train, and print the report."""
    config = TrainConfig(**_fields(args))
    import jax

    from jaxllm.runner.compiler import use_compilation_cache
    from jaxllm.training.run import train

    use_compilation_cache()
    report = train(config)
    if jax.process_index() == 0:
        print(json.dumps(report) if args.json else _text(report))
    return 0


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The file's fields, under the flags."""
    known = describe(TrainConfig)
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    return {**(read_toml(args.config) if args.config else {}), **given}


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['output']}: {report['task']}, {report['steps']} steps, {report['tokens']} tokens"]
    names = ("train_loss", "eval_loss_before", "eval_loss", "test_loss_before", "test_loss")
    lines += [f"{name} {report[name]:.4f}" for name in names if report.get(name) is not None]
    names = ("eval_accuracy", "test_accuracy_before", "test_accuracy")
    lines += [f"{name} {report[name]:.1%}" for name in names if report.get(name) is not None]
    if report.get("tokens_per_s"):
        lines.append(f"{report['tokens_per_s']:.0f} tokens/s")
    return "\n".join(lines)
