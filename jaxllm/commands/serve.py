"""`jaxllm serve`: flags in, a running server out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.commands.flags import add_engine_flags, add_fields, engine_arguments
from jaxllm.commands.lora import add_lora_modules, check_lora_modules, load_lora_modules
from jaxllm.commands.startup import Startup
from jaxllm.config import EngineConfig
from jaxllm.config.slo import parse_slo
from jaxllm.pool.config import PoolConfig
from jaxllm.server.listen import Listen

if TYPE_CHECKING:
    import socket

    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.server.context import CrossOrigin, Settings


HELP = "Answer OpenAI clients over HTTP."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--uds", metavar="PATH", help="listen on a unix socket instead")
    group.add_argument("--ssl-keyfile", metavar="FILE")
    group.add_argument("--ssl-certfile", metavar="FILE")
    group.add_argument("--ssl-keyfile-password", metavar="TEXT")
    lists: dict[str, Any] = {"type": _json, "default": ["*"], "metavar": "JSON"}
    group.add_argument("--allowed-origins", **lists, help="web pages that may call (CORS): '[\"*\"]' all, '[]' none")
    group.add_argument("--allowed-methods", **lists, help="methods that they may use")
    group.add_argument("--allowed-headers", **lists, help="headers that they may send")
    group.add_argument("--allow-credentials", action="store_true", help="let them send cookies and keys of their own")
    group.add_argument(
        "--api-key", action="append", metavar="KEY", help="required from clients; repeatable; also JAXLLM_API_KEY"
    )
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names to answer to; default: --model")
    group.add_argument("--max-num-queued-requests", type=int, default=512, metavar="N", help="above it: 503")
    group.add_argument(
        "--slo", metavar="LIMITS", help="refuse (503) what would miss it, for example ttft:2s,tpot:100ms"
    )
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
        "--enable-auto-tool-choice",
        action="store_true",
        help="calls are always read; taken because vLLM wants it",
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
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile every program: the first few before requests are taken, the others beside them",
    )
    add_lora_modules(group)
    pool = parser.add_argument_group("several models on one device (docs/pool.md)")
    pool.add_argument(
        "--models", nargs="+", metavar="FILE.toml|NAME=PATH", help="serve all of these; engine flags hold for each"
    )
    add_fields(pool, PoolConfig)
    add_engine_flags(parser, max_decode_steps=4)  # whoever arrives waits for the dispatches under way


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def run(args: argparse.Namespace) -> int:
    """Bind, load, warm up, serve; returns the exit code."""
    _start_log(args.log_level)
    engine = engine_arguments(args)
    listen = _listen(args)
    bound = listen.bind() if _is_first(engine) else None
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}; install it with: pip install 'jaxllm[server]'") from None
    if args.models:
        return start_pool(args, engine, listen, bound)
    return start(args, engine, listen, _settings(args, engine), bound)


def _start_log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_plain_name)
    logging.basicConfig(
        level=level.upper(), handlers=[handler], format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )


def _plain_name(record: logging.LogRecord) -> bool:
    """uvicorn logs everything under `uvicorn.error`, errors or not."""
    record.name = record.name.replace("uvicorn.error", "uvicorn")
    return True


def _is_first(engine: dict[str, Any]) -> bool:
    """Whether this process is the one of several that listens."""
    from jaxllm.runner.members import member_of

    member = member_of(EngineConfig.from_kwargs(dict(engine)))
    return member is None or member.process_id == 0


def start(
    args: argparse.Namespace,
    engine: dict[str, Any],
    listen: Listen,
    settings: Settings,
    bound: socket.socket | None,
    **hooks: Any,
) -> int:
    """Serve on the bound socket while the engine is built and from then on; `hooks` are `AsyncLLM`'s, for tests."""
    from jaxllm.server.door import Door
    from jaxllm.server.run import serving

    if bound is None:  # does not come back: the first process speaks for all
        _load(args, engine, Startup(lambda _: None), hooks)
        return 0
    door = Door()
    startup = Startup(lambda stage: setattr(door, "stage", stage))
    with serving(door, listen, bound) as server:
        with _uncollected():
            llm = _load(args, engine, startup, hooks)
        try:
            from jaxllm.server.app import make_app

            door.open(make_app(llm, settings))
            server.attach(llm)
            if llm.exchange is not None:
                llm.exchange.serve_at(listen.host, listen.port, settings.api_keys[0] if settings.api_keys else None)
            where = f"serving {settings.served_model_names[0]} on {listen.uds or listen.url}"
            startup.ready(where if listen.uds else f"{where}; a page to chat is at {listen.url}/")
            return server.wait()
        finally:
            llm.shutdown()


def start_pool(args: argparse.Namespace, engine: dict[str, Any], listen: Listen, bound: socket.socket | None) -> int:
    """Serve several models from the first moment; each is loaded meanwhile, or with its first request."""
    from jaxllm.pool.face import PoolFace
    from jaxllm.pool.pool import Pool
    from jaxllm.server.app import make_app
    from jaxllm.server.run import serving

    if bound is None or args.served_model_name:
        wrong = "--num-processes: a pool is one process" if bound is None else "--served-model-name: --models has names"
        raise ValueError(f"--models does not go with {wrong}; leave it out")
    if args.lora_modules:
        raise ValueError("--lora-modules does not say of which model; give lora_modules in its table of the .toml file")
    del engine["model"]
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(PoolConfig)}
    given = {name: value for name, value in shared.items() if value != getattr(PoolConfig(), name)}
    if "ttft" in (slo := parse_slo(args.slo)):
        raise ValueError("--slo ttft is for one model; with --models give tpot alone, which decides how long turns are")
    given |= {"tpot": slo["tpot"]} if "tpot" in slo else {}
    options = {"max_num_queued_requests": args.max_num_queued_requests, "stuck_seconds": args.stuck_seconds}
    pool = Pool(args.models, warm_up=args.warm_up, options=options, **given, **engine)
    face = PoolFace(pool, args.stuck_seconds)
    try:
        names = [model.name for model in pool.models]
        settings = _settings(args, {"model": names[0]})
        with serving(make_app(face, settings), listen, bound) as server:
            server.attach(face)
            where = listen.uds or listen.url
            Startup(lambda _: None).ready(f"serving {', '.join(names)} on {where}; a page to chat is at {where}/")
            return server.wait()
    finally:
        face.shutdown()


def _load(args: argparse.Namespace, engine: dict[str, Any], startup: Startup, hooks: dict[str, Any]) -> AsyncLLM:
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.entrypoints.engine_thread import EngineThread
    from jaxllm.entrypoints.warm_up import WarmUp

    llm = AsyncLLM(
        slo=args.slo,
        max_num_queued_requests=args.max_num_queued_requests,
        stuck_seconds=args.stuck_seconds,
        on_stage=startup.stage,
        **hooks,
        **engine,
    )
    load_lora_modules(args, llm.adapters)
    if not args.warm_up:
        _settle(llm)
        return llm
    startup.stage("compiling")
    assert isinstance(llm.thread, EngineThread), "it is made by default"
    llm.warm_up = WarmUp(llm.engine, lambda: _settle(llm), llm.thread.fail)
    llm.warm_up.first(startup.compiled)
    llm.warm_up.start()
    return llm


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: nearly all that is made while a model is loaded is kept."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _settle(llm: AsyncLLM) -> None:
    """Start-up is over: what it left behind stays, so the garbage collector shall not look through all of it again.

    It would stop every thread for some tenths of a second, now and then.
    """
    gc.collect()
    gc.freeze()
    llm.thread.measure_when_idle()


def _listen(args: argparse.Namespace) -> Listen:
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it must be between 1 and 65535")
    for name in ("request_timeout", "shutdown_timeout", "stuck_seconds", "max_body_bytes"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    if args.max_num_queued_requests < 0:
        raise ValueError(f"--max-num-queued-requests is {args.max_num_queued_requests}; it must be at least 0")
    parse_slo(args.slo)
    _check_tls(args)
    return Listen(
        host=args.host,
        port=args.port,
        uds=args.uds,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile_password=args.ssl_keyfile_password,
        shutdown_timeout=args.shutdown_timeout,
    )


def _check_tls(args: argparse.Namespace) -> None:
    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise ValueError("TLS needs both --ssl-keyfile and --ssl-certfile")
    if not args.ssl_certfile:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password or _no_password
        )
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"cannot use --ssl-certfile {args.ssl_certfile}: {error}") from None


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key is encrypted; give --ssl-keyfile-password")


def _cors(args: argparse.Namespace) -> CrossOrigin:
    from jaxllm.server.context import CrossOrigin

    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        value = getattr(args, name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}; give a JSON list of texts, such as '[\"*\"]'")
    return CrossOrigin(
        origins=tuple(args.allowed_origins),
        methods=tuple(args.allowed_methods),
        headers=tuple(args.allowed_headers),
        credentials=args.allow_credentials,
    )


def _settings(args: argparse.Namespace, engine: dict[str, Any]) -> Settings:
    from jaxllm.parsing.registry import AnswerFormat
    from jaxllm.server.context import Settings

    keys = [*(args.api_key or []), *([key] if (key := os.environ.get("JAXLLM_API_KEY")) else [])]
    if any(not key for key in keys):
        raise ValueError("--api-key is empty; give a key or leave the flag out")
    model = engine.get("model") or EngineConfig().model
    AnswerFormat.chosen(None, args.tool_call_parser, args.reasoning_parser)  # refuses unknown names before loading
    names = args.served_model_name or [Path(model).name if Path(model).exists() else model]
    check_lora_modules(args, names)
    return Settings(
        served_model_names=tuple(dict.fromkeys(names)),
        api_keys=tuple(keys),
        max_body_bytes=args.max_body_bytes,
        request_timeout=args.request_timeout,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        pooling=args.pooling,
        metrics_namespace=args.metrics_namespace,
        cross_origin=_cors(args),
    )
