"""The command line: `jaxllm generate | chat | serve | pull | convert | bench | plan | collectives | roofline`.

Arguments in, text or one JSON object (`--json`) on standard output; progress and errors go to standard error.
Exit code 0, 1 (failed), 2 (usage), 130 (Ctrl-C). Imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxllm import __version__
from jaxllm.commands import bench as bench_cli
from jaxllm.commands import plan as plan_cli
from jaxllm.commands import roofline as roofline_cli
from jaxllm.commands import serve as server_cli
from jaxllm.commands.flags import add_engine_flags, add_sampling_flags, engine_arguments, load_llm
from jaxllm.commands.interrupts import EXIT_CODE, counted_interrupts, forget_interrupt
from jaxllm.config import DTYPES, EngineConfig

if TYPE_CHECKING:
    from jaxllm import LLM, RequestOutput, SamplingParams


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxllm", description="Sharded LLM inference on JAX/XLA.")
    parser.add_argument("--version", action="version", version=f"jaxllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", _generate, "Continue one prompt or many.")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; '-' reads standard input")
    generate.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    add_engine_flags(generate)
    add_sampling_flags(generate, max_tokens=64)

    chat = command("chat", _chat, "Ask one question, or talk when no question is given.")
    chat.add_argument("question", nargs="?", help="what to ask; without it: standard input, or a conversation")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    add_engine_flags(chat)
    add_sampling_flags(chat, max_tokens=512)

    serve = command("serve", _serve, "Answer OpenAI clients over HTTP.")
    server_cli.add_arguments(serve)
    add_engine_flags(serve)
    serve.set_defaults(max_decode_steps=4)  # whoever arrives waits for the dispatches under way

    pull = command("pull", _pull, "Fetch a model by its short name, for offline use.")
    pull.add_argument("name", nargs="?", default=EngineConfig().model)
    pull.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    convert = command("convert", _convert, "Write a checkpoint in another format.")
    convert.add_argument("source", metavar="SRC", help="short name, folder, .gguf file or Hugging Face id")
    convert.add_argument("target", metavar="DST", type=Path, help="a new folder")
    convert.add_argument("--to", required=True, choices=("orbax", "safetensors"))
    convert.add_argument("--dtype", choices=DTYPES, default="auto", help="of the matrices")
    convert.add_argument("--mesh", default="tp=1", help="devices that hold the parameters while they are written")
    convert.add_argument("--sharding-rules", default="megatron", help="shipped name or a .toml file")
    convert.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    collectives = command("collectives", _collectives, "Count the collectives in the compiled program of a mesh.")
    collectives.add_argument("--topology", help="count in the TPU program of a slice, for example v5e:2x4")
    collectives.add_argument("--plot", type=Path, metavar="FILE", help="draw what each device holds into this PNG file")
    add_engine_flags(collectives)

    plan = command("plan", _plan, "Check a deployment on a TPU slice that is not there, by compiling for it.")
    plan_cli.add_arguments(plan)
    add_engine_flags(plan)

    roofline_cli.add_arguments(command("roofline", roofline_cli.run, "Lower bounds of a model on a chip."))

    bench = commands.add_parser("bench", help="Measure throughput, latency or start-up.")
    bench_cli.add_arguments(bench)
    return parser


def _sampling(args: argparse.Namespace, llm: LLM | None = None) -> SamplingParams:
    """Flags over the model's own defaults over greedy. Without a model, only checks the flags."""
    from jaxllm import SamplingParams

    names = ("temperature", "top_p", "min_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty")
    names += ("n", "stop", "ignore_eos", "max_tokens", "min_tokens")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    own = llm.generation_defaults() if llm else {}
    return SamplingParams(**{"temperature": 0.0, **own, **given})


def _generate(args: argparse.Namespace) -> int:
    _sampling(args)  # refuse bad values before a model is loaded for them
    prompts = _read_prompts(args)
    llm = load_llm(args)
    outputs = llm.generate(prompts, _sampling(args, llm), return_errors=True)
    if args.json:
        _print_json(args, outputs)
    for i, output in enumerate(outputs):
        if output.error:
            print(f"jaxllm: error: prompt {i + 1}: {output.error}", file=sys.stderr)
        elif not args.json:
            _print_completions(output, i, len(outputs))
    return 1 if any(output.error for output in outputs) else 0


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


def _print_json(args: argparse.Namespace, outputs: Iterable[RequestOutput]) -> None:
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


def _chat(args: argparse.Namespace) -> int:
    _sampling(args)
    question = args.question
    if question is None and (args.json or not sys.stdin.isatty()):
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        raise ValueError("the question is empty; give some text")
    llm = load_llm(args)
    params = _sampling(args, llm)
    history = [{"role": "system", "content": args.system}] if args.system else []
    if question is None:
        return _converse(llm, history, params)
    messages = [*history, {"role": "user", "content": question}]
    if args.json:
        _print_json(args, llm.chat(messages, params, use_tqdm=False))
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


def _serve(args: argparse.Namespace) -> int:
    return server_cli.run(args, engine_arguments(args))


def _pull(args: argparse.Namespace) -> int:
    from jaxllm.checkpoints import resolve_model

    path = resolve_model(args.name)
    print(json.dumps({"model": args.name, "path": str(path)}) if args.json else path)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from jaxllm.weights.convert import convert

    path = convert(
        args.source, args.target, to=args.to, dtype=args.dtype, mesh=args.mesh, sharding_rules=args.sharding_rules
    )
    print(json.dumps({"model": args.source, "path": str(path), "format": args.to}) if args.json else path)
    return 0


def _collectives(args: argparse.Namespace) -> int:
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


def _plan(args: argparse.Namespace) -> int:
    return plan_cli.run(args, engine_arguments(args))


if __name__ == "__main__":
    entry()
