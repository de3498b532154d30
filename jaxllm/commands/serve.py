"""`jaxllm serve`: flags in, a running server out."""

from __future__ import annotations

import argparse
import logging
import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.commands.flags import add_engine_flags, engine_arguments
from jaxllm.config import EngineConfig

if TYPE_CHECKING:
    from jaxllm.engine.async_llm import AsyncLLM
    from jaxllm.server.context import Settings
    from jaxllm.server.run import Listen


HELP = "Answer OpenAI clients over HTTP."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--uds", metavar="PATH", help="listen on a unix socket instead")
    group.add_argument("--ssl-keyfile", metavar="FILE")
    group.add_argument("--ssl-certfile", metavar="FILE")
    group.add_argument(
        "--api-key", action="append", metavar="KEY", help="required from clients; repeatable; also JAXLLM_API_KEY"
    )
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names to answer to; default: --model")
    group.add_argument("--max-num-queued-requests", type=int, default=512, metavar="N", help="above it: 503")
    group.add_argument("--request-timeout", type=float, default=1800.0, metavar="SECONDS")
    group.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help="for requests under way at SIGTERM"
    )
    group.add_argument(
        "--stuck-seconds", type=float, default=30.0, metavar="SECONDS", help="without progress for so long: unhealthy"
    )
    group.add_argument("--max-body-bytes", type=int, default=8 << 20, metavar="BYTES")
    group.add_argument(
        "--tool-call-parser",
        default="auto",
        metavar="NAME",
        help="how calls are written; auto: as the chat template",
    )
    group.add_argument(
        "--reasoning-parser",
        default="auto",
        metavar="NAME",
        help="how thoughts are marked; auto: as the chat template",
    )
    group.add_argument("--pooling", choices=("mean", "last"), default="mean", help="of embeddings")
    group.add_argument("--metrics-namespace", default="jaxllm", help="'vllm' suits dashboards made for it")
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    group.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction, default=True, help="compile everything before listening"
    )
    add_engine_flags(parser, max_decode_steps=4)  # whoever arrives waits for the dispatches under way


def run(args: argparse.Namespace) -> int:
    """Load, warm up, serve; returns the exit code."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}; install it with: pip install 'jaxllm[server]'") from None
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    engine = engine_arguments(args)
    listen, settings = _listen(args), _settings(args, engine)
    return start(args, engine, listen, settings)


def start(
    args: argparse.Namespace, engine: dict[str, Any], listen: Listen, settings: Settings, **hooks: Any
) -> int:  # fmt: skip
    """Build the engine and serve it; `hooks` are `AsyncLLM`'s, for tests."""
    from jaxllm.engine.async_llm import AsyncLLM
    from jaxllm.server.app import make_app
    from jaxllm.server.run import serve

    llm = AsyncLLM(
        max_num_queued_requests=args.max_num_queued_requests, stuck_seconds=args.stuck_seconds, **hooks, **engine
    )
    _warm_up(llm, args.warm_up)
    llm.thread.measure_when_idle()
    where = listen.uds or f"http{'s' if listen.ssl_certfile else ''}://{listen.host}:{listen.port}"
    print(f"jaxllm: serving {settings.served_model_names[0]} on {where}", file=sys.stderr, flush=True)
    return serve(make_app(llm, settings), llm, listen)


def _warm_up(llm: AsyncLLM, wanted: bool) -> None:
    if not wanted:
        return
    print("jaxllm: compiling", file=sys.stderr, flush=True)
    llm.engine.runner.warm_up(scoring=True, tiers=llm.engine.tiers is not None)


def _listen(args: argparse.Namespace) -> Listen:
    from jaxllm.server.run import Listen

    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it must be between 1 and 65535")
    for name in ("request_timeout", "shutdown_timeout", "stuck_seconds", "max_body_bytes"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    if args.max_num_queued_requests < 0:
        raise ValueError(f"--max-num-queued-requests is {args.max_num_queued_requests}; it must be at least 0")
    _check_tls(args)
    return Listen(
        host=args.host, port=args.port, uds=args.uds, ssl_keyfile=args.ssl_keyfile, ssl_certfile=args.ssl_certfile,
        shutdown_timeout=args.shutdown_timeout,
    )  # fmt: skip


def _check_tls(args: argparse.Namespace) -> None:
    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise ValueError("TLS needs both --ssl-keyfile and --ssl-certfile")
    if not args.ssl_certfile:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"cannot use --ssl-certfile {args.ssl_certfile}: {error}") from None


def _settings(args: argparse.Namespace, engine: dict[str, Any]) -> Settings:
    from jaxllm.server.context import Settings
    from jaxllm.server.parsing.registry import AnswerFormat

    keys = [*(args.api_key or []), *([key] if (key := os.environ.get("JAXLLM_API_KEY")) else [])]
    if any(not key for key in keys):
        raise ValueError("--api-key is empty; give a key or leave the flag out")
    model = engine.get("model") or EngineConfig().model
    AnswerFormat.chosen(None, args.tool_call_parser, args.reasoning_parser)  # refuses unknown names before loading
    names = args.served_model_name or [Path(model).name if Path(model).exists() else model]
    return Settings(
        served_model_names=tuple(dict.fromkeys(names)), api_keys=tuple(keys), max_body_bytes=args.max_body_bytes,
        request_timeout=args.request_timeout, tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser, pooling=args.pooling, metrics_namespace=args.metrics_namespace,
    )  # fmt: skip
