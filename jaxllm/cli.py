"""The command line: `jaxllm generate | chat | serve | pull | convert | bench | collectives | roofline`.

Arguments in, text or one JSON object (`--json`) on standard output; progress and errors go to standard error.
Exit code 0, 1 (failed), 2 (usage), 130 (Ctrl-C). Imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxllm import __version__
from jaxllm.bench import serve as bench_serve
from jaxllm.config import DTYPES, LOAD_FORMATS, EngineConfig
from jaxllm.roofline import cli as roofline_cli
from jaxllm.server import cli as server_cli

if TYPE_CHECKING:
    from jaxllm import LLM, RequestOutput, SamplingParams

INTERRUPTED = 130
_interrupted = threading.Event()


def entry() -> NoReturn:
    """The process: run one command and end. After Ctrl-C nothing is waited for, threads that compile included."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == INTERRUPTED:
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        with _counted_interrupts():
            return args.run(args)
    except ValueError as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextlib.contextmanager
def _counted_interrupts() -> Iterator[None]:
    """Remember Ctrl-C beside raising it: Python drops what is raised in a garbage collection callback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: Any) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


def _raise_if_interrupted() -> None:
    if _interrupted.is_set():
        _interrupted.clear()
        raise KeyboardInterrupt


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
    _add_engine_flags(generate)
    _add_sampling_flags(generate, max_tokens=64)

    chat = command("chat", _chat, "Ask one question, or talk when no question is given.")
    chat.add_argument("question", nargs="?", help="what to ask; without it: standard input, or a conversation")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_engine_flags(chat)
    _add_sampling_flags(chat, max_tokens=512)

    serve = command("serve", _serve, "Answer OpenAI clients over HTTP.")
    server_cli.add_arguments(serve)
    _add_engine_flags(serve)
    serve.set_defaults(max_decode_steps=1)  # more tokens per dispatch would arrive in bursts

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
    _add_engine_flags(collectives)

    roofline_cli.add_arguments(command("roofline", roofline_cli.run, "Lower bounds of a model on a chip."))

    bench = command("bench", _bench_throughput, "Measure throughput, latency or start-up.")
    _add_benches(bench.add_subparsers(required=True, metavar="BENCH"))
    return parser


def _add_benches(benches: Any) -> None:
    throughput = benches.add_parser("throughput", help="offline tokens per second")
    throughput.set_defaults(run=_bench_throughput)
    throughput.add_argument("--num-prompts", type=int, default=32)
    throughput.add_argument("--input-len", type=int, default=16, help="tokens per prompt")
    throughput.add_argument("--output-len", type=int, default=64, help="tokens generated per prompt")
    throughput.add_argument("--num-iters", type=int, default=3, help="repeats; the median is reported")

    latency = benches.add_parser("latency", help="one batch that arrives together: TTFT, TPOT, ITL, end to end")
    latency.set_defaults(run=_bench_latency)
    latency.add_argument("--batch-size", type=int, default=8)
    latency.add_argument("--input-len", type=int, default=32)
    latency.add_argument("--output-len", type=int, default=128)
    latency.add_argument("--num-iters", type=int, default=30)

    startup = benches.add_parser("startup", help="seconds from a fresh process to ready and to the first token")
    startup.set_defaults(run=_bench_startup)
    startup.add_argument("--num-iters", type=int, default=3)
    startup.add_argument("--cold", action="store_true", help="with an empty compilation cache")
    for bench_parser in (throughput, latency, startup):
        _add_engine_flags(bench_parser)

    load = benches.add_parser("load", help="loading a folder of dummy weights: speed and peak memory")
    load.set_defaults(run=_bench_load)
    load.add_argument("--gigabytes", type=float, default=2.0, help="size of the folder that is made for it")
    load.add_argument("--num-files", type=int, default=4)
    load.add_argument("--num-iters", type=int, default=3, help="repeats; the fastest is reported")
    load.add_argument("--mesh", default="tp=1", help="devices to load onto")
    load.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    serving = benches.add_parser("serve", help="latency and throughput of a running server under load")
    serving.set_defaults(run=bench_serve.run)
    bench_serve.add_arguments(serving)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    default = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default=default.model, help="short name, folder, .gguf file or Hugging Face id")
    group.add_argument("--tokenizer", help="take the tokenizer from this model instead")
    group.add_argument("--load-format", choices=LOAD_FORMATS, default=default.load_format, help="dummy: random weights")
    group.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the weights")
    group.add_argument("--kv-dtype", choices=DTYPES, default=default.kv_dtype, help="of the KV cache")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and output of one request")
    group.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs, help="requests that run together")
    group.add_argument(
        "--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens, help="tokens per iteration"
    )
    group.add_argument("--page-size", type=int, default=default.page_size, help="tokens per page of the KV cache")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="memory for the KV cache")
    group.add_argument("--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization)
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--mesh", default=default.mesh, help="devices, for example 'tp=3' or 'dp=2,tp=4'")
    group.add_argument("--sharding-rules", default=default.sharding_rules, help="shipped name or a .toml file")
    group.add_argument("--max-decode-steps", type=int, default=default.max_decode_steps, help="iterations per dispatch")
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=default.enable_prefix_caching
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def _add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens)
    group.add_argument("--min-tokens", type=int, default=0)
    group.add_argument("--temperature", type=float, help="0 is greedy; default: the model's own, else 0")
    for name in ("top-p", "min-p", "presence-penalty", "frequency-penalty", "repetition-penalty"):
        group.add_argument(f"--{name}", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--n", type=int, default=1, help="completions per prompt")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's keywords among parsed arguments."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def _llm(args: argparse.Namespace) -> LLM:
    from jaxllm import LLM

    llm = LLM(**engine_arguments(args))
    llm.after_step = _raise_if_interrupted
    return llm


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
    llm = _llm(args)
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
    llm = _llm(args)
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
                _interrupted.clear()
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
    from jaxllm.models.convert import convert

    path = convert(
        args.source, args.target, to=args.to, dtype=args.dtype, mesh=args.mesh, sharding_rules=args.sharding_rules
    )
    print(json.dumps({"model": args.source, "path": str(path), "format": args.to}) if args.json else path)
    return 0


def _collectives(args: argparse.Namespace) -> int:
    from jaxllm.sharding.collectives import count_collectives, format_counts

    counts = count_collectives(EngineConfig(**engine_arguments(args)))
    print(json.dumps(counts) if args.json else format_counts(counts))
    return 0


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def _bench_throughput(args: argparse.Namespace) -> int:
    from jaxllm.bench.throughput import format_report, measure_throughput

    _check_counts(args, "num_prompts", "input_len", "output_len", "num_iters")
    sizes = {name: getattr(args, name) for name in ("num_prompts", "input_len", "output_len", "num_iters")}
    report = measure_throughput(_llm(args), **sizes)
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def _bench_latency(args: argparse.Namespace) -> int:
    from jaxllm.bench.latency import measure_latency

    _check_counts(args, "batch_size", "input_len", "output_len", "num_iters")
    sizes = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "num_iters")}
    report = measure_latency(_llm(args), **sizes)
    if args.json:
        print(json.dumps(report))
        return 0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        row = "  ".join(f"{p} {value:9.2f}" for p, value in report[name].items())
        print(f"{name:<8} {row}")
    return 0


def _bench_startup(args: argparse.Namespace) -> int:
    from jaxllm.bench.startup import measure_startup

    _check_counts(args, "num_iters")
    report = measure_startup(engine_arguments(args), num_iters=args.num_iters, cold=args.cold)
    text = (
        f"ready after {report['ready_s']:.2f} s, first token after {report['first_token_s']:.2f} s, "
        f"{report['compilations']} programs"
    )
    print(json.dumps(report) if args.json else text)
    return 0


def _bench_load(args: argparse.Namespace) -> int:
    from jaxllm.bench.load import format_report, measure_load

    for name in ("gigabytes", "num_files", "num_iters"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    report = measure_load(
        num_bytes=int(args.gigabytes * 1e9), num_files=args.num_files, mesh=args.mesh, num_iters=args.num_iters
    )
    print(json.dumps(report) if args.json else format_report(report))
    return 0


if __name__ == "__main__":
    entry()
