"""`jaxllm chat`: one question answered, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from jaxllm.commands.flags import add_engine_flags, add_sampling_flags, load_llm
from jaxllm.commands.generate import print_json, sampling_params
from jaxllm.commands.interrupts import forget_interrupt

if TYPE_CHECKING:
    from jaxllm import LLM, SamplingParams

HELP = "Ask one question, or talk when no question is given."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("question", nargs="?", help="what to ask; without it: standard input, or a conversation")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_engine_flags(parser)
    add_sampling_flags(parser, max_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Answer, or converse until the user leaves."""
    sampling_params(args)
    question = args.question
    if question is None and (args.json or not sys.stdin.isatty()):
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        raise ValueError("the question is empty; give some text")
    with load_llm(args) as llm:
        params = sampling_params(args, llm)
        history = [{"role": "system", "content": args.system}] if args.system else []
        if question is None:
            return _converse(llm, history, params)
        messages = [*history, {"role": "user", "content": question}]
        if args.json:
            print_json(args, llm.chat(messages, params, use_tqdm=False))
        else:
            _answer(llm, messages, params)
    return 0


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str:
    text = ""
    for piece in llm.stream(llm.chat_prompt(messages), params):
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def _converse(llm: LLM, history: list[dict[str, Any]], params: SamplingParams) -> int:
    """Talk on a terminal: Ctrl-C stops an answer, Ctrl-D or /exit leaves, /reset forgets."""
    import readline  # noqa: F401  (line editing for input())

    print("Ctrl-C stops an answer, /reset starts over, /exit or Ctrl-D leaves.", file=sys.stderr)
    messages = list(history)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        if question in ("/exit", "/quit"):
            return 0
        if question == "/reset":
            messages = list(history)
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
            except KeyboardInterrupt:
                forget_interrupt()
                messages.pop()
                print("\n(stopped)", file=sys.stderr)
            except ValueError as error:  # a conversation that has grown too long, say
                messages.pop()
                print(f"jaxllm: error: {error}", file=sys.stderr)
