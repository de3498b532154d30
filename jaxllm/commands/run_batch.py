"""`jaxllm run-batch`: a file of requests in, a file of answers out, without a server."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from jaxllm.commands.flags import add_engine_flags, engine_arguments
from jaxllm.config import EngineConfig

HELP = "Answer the requests of a JSONL file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="one request a line")
    parser.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="one answer a line")
    parser.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names that requests may have")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every line; exit code 1 where one was refused."""
    try:
        lines = args.input_file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --input-file {args.input_file}: {error}") from None
    if not args.output_file.parent.is_dir():
        raise ValueError(f"--output-file {args.output_file}: there is no folder {args.output_file.parent}")
    return asyncio.run(_run(args, lines))


async def _run(args: argparse.Namespace, lines: list[str]) -> int:
    from tqdm import tqdm

    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.server.app import make_app
    from jaxllm.server.batch import answers
    from jaxllm.server.context import CrossOrigin, Settings

    engine = engine_arguments(args)
    llm = AsyncLLM(**engine)
    model = engine.get("model") or EngineConfig().model
    names = args.served_model_name or [model, Path(model).name]
    settings = Settings(served_model_names=tuple(dict.fromkeys(names)), cross_origin=CrossOrigin(origins=()))
    num_failed, count = 0, sum(bool(line.strip()) for line in lines)
    try:
        app = make_app(llm, settings)
        bar = tqdm(total=count, disable=not sys.stderr.isatty(), desc="run-batch")
        with args.output_file.open("w", encoding="utf-8") as out, bar:
            async for line in answers(app.app, lines, most=llm.engine.runner.shapes.spare_slot):
                out.write(line + "\n")
                num_failed += '"error": null' not in line[-20:]
                bar.update()
    finally:
        llm.shutdown()
    print(f"jaxllm: {count - num_failed} of {count} requests answered; see {args.output_file}", file=sys.stderr)
    return 1 if num_failed else 0
