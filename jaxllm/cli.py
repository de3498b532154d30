"""The command line: the table of commands, and how a command ends.

Arguments in, text or one JSON object (`--json`) on standard output; progress and errors go to standard error.
Exit code 0, 1 (failed), 2 (usage), 130 (Ctrl-C). Imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxllm.commands import (
    bench,
    chat,
    collectives,
    convert,
    generate,
    merge,
    plan,
    pull,
    roofline,
    run_batch,
    serve,
    simulate,
    train,
)
from jaxllm.commands.interrupts import EXIT_CODE, counted_interrupts
from jaxllm.version import __version__

COMMANDS = (
    generate,
    chat,
    serve,
    train,
    merge,
    run_batch,
    pull,
    convert,
    collectives,
    plan,
    roofline,
    simulate,
    bench,
)  # each HELP, add_arguments, run


def entry() -> NoReturn:
    """The process: run one command and end. After Ctrl-C nothing is waited for, threads that compile included."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_CODE:
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        with counted_interrupts():
            return args.run(args)
    except ValueError as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations: `--prompt` must not become `--prompts-file`, nor a script break when a flag is added."""

    def __init__(self, **settings: Any):
        super().__init__(**{**settings, "allow_abbrev": False})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxllm", description="Sharded LLM inference on JAX/XLA.")
    parser.add_argument("--version", action="version", version=f"jaxllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        sub.set_defaults(run=module.run)
        module.add_arguments(sub)
    return parser


if __name__ == "__main__":
    entry()
