"""`jaxllm generate`: prompts in; their continuations, as text or one JSON object, out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.commands.flags import add_engine_flags, add_sampling_flags, load_llm, sampling_arguments

if TYPE_CHECKING:
    from jaxllm import LLM, RequestOutput, SamplingParams

HELP = "Continue one prompt or many."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; '-' reads standard input")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    add_engine_flags(parser)
    add_sampling_flags(parser, max_tokens=64)


def run(args: argparse.Namespace) -> int:
    """Print every completion; 1 where a prompt failed."""
    sampling_params(args)  # refuse bad values before a model is loaded for them
    prompts = _read_prompts(args)
    with load_llm(args) as llm:
        outputs = llm.generate(prompts, sampling_params(args, llm), return_errors=True)
        _print(args, outputs)
    return 1 if any(output.error for output in outputs) else 0


def _print(args: argparse.Namespace, outputs: list[RequestOutput]) -> None:
    if args.json:
        print_json(args, outputs)
    for i, output in enumerate(outputs):
        if output.error:
            print(f"jaxllm: error: prompt {i + 1}: {output.error}", file=sys.stderr)
        elif not args.json:
            _print_completions(output, i, len(outputs))
    sys.stdout.flush()


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [p for p in args.prompts if p != "-"]
    if args.prompts_file:
        try:
            prompts += _lines(args.prompts_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read --prompts-file {args.prompts_file}: {error}") from None
    if "-" in args.prompts or not (prompts or args.prompts_file or sys.stdin.isatty()):
        prompts += _lines(sys.stdin.read())
    if not prompts:
        raise ValueError("there is no prompt; give one as an argument, with --prompts-file, or on standard input")
    return prompts


def _lines(text: str) -> list[str]:
    """Split at newlines alone; form feeds and Unicode separators belong to a prompt."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _print_completions(output: RequestOutput, index: int, total: int) -> None:
    for completion in output.outputs:
        if total > 1 or len(output.outputs) > 1:
            suffix = f".{completion.index + 1}" if len(output.outputs) > 1 else ""
            print(f"[{index + 1}{suffix}] {output.prompt}", end="")
        print(completion.text)


def print_json(args: argparse.Namespace, outputs: Iterable[RequestOutput]) -> None:
    """The one JSON object of `generate` and `chat`."""
    entries, metrics = [], {}
    for output in outputs:
        for completion in output.outputs:
            entry = {"prompt": output.prompt, "text": completion.text, "token_ids": completion.token_ids}
            entry |= {"finish_reason": completion.finish_reason, "num_cached_tokens": output.num_cached_tokens}
            entries.append(entry | {"index": completion.index, "metrics": output.metrics})
        if output.error:
            entry = {"prompt": output.prompt, "text": "", "token_ids": [], "finish_reason": None}
            entries.append(entry | {"num_cached_tokens": 0, "error": output.error})
    print(json.dumps({"model": args.model, "outputs": entries, "metrics": metrics}, ensure_ascii=False))


def sampling_params(args: argparse.Namespace, llm: LLM | None = None) -> SamplingParams:
    """Flags over the model's own defaults over greedy. Without a model, only checks the flags."""
    from jaxllm import SamplingParams

    own = llm.generation_defaults() if llm else {}
    return SamplingParams(**{"temperature": 0.0, **own, **sampling_arguments(args)})
