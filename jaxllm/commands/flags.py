"""Flags, made from the fields of configuration classes: name, type, default and help stand there and nowhere else.

A new field of `EngineConfig` is a flag of every command that runs an engine. What flags become: engine keywords,
sampling parameters, an `LLM`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.commands.interrupts import raise_between_steps, raise_if_interrupted
from jaxllm.config import EngineConfig
from jaxllm.config.fields import FieldDoc, describe
from jaxllm.config.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxllm import LLM

# What a user asks of one request. The seed is the engine's here; lists and tables are for Python and HTTP.
_SAMPLING = (
    "n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty stop ignore_eos "
    "max_tokens min_tokens"
).split()


def add_fields(group: argparse._ArgumentGroup, cls: type, names: Collection[str] = (), **defaults: Any) -> None:
    """One flag per field of a configuration class.

    Args:
        group: where the flags are listed.
        cls: a dataclass whose `Attributes:` document its fields.
        names: these fields only.
        defaults: where a command's default is not the class's.
    """
    for name, doc in describe(cls).items():
        if not names or name in names:
            _add_field(group, name, doc, defaults.get(name, doc.default))


def _add_field(group: argparse._ArgumentGroup, name: str, doc: FieldDoc, default: Any) -> None:
    text = doc.help.removesuffix(".").replace("%", "%%")
    if default not in (None, "", False) and default is not dataclasses.MISSING:
        text += f" (default: {default})"
    settings: dict[str, Any] = {"default": default, "help": text}
    if doc.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif doc.choices:
        settings["choices"] = doc.choices
    elif typing.get_origin(doc.kind) is Mapping:
        settings |= {"type": _json_object, "metavar": doc.unit}
    else:
        settings |= {"type": doc.kind, "metavar": doc.unit or _METAVARS.get(doc.kind)}
    group.add_argument(f"--{name.replace('_', '-')}", **settings)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object, such as '{\"enable_thinking\": false}'")
    return value


_METAVARS = {int: "N", float: "X", str: "NAME"}


def add_engine_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One flag per field of `EngineConfig`, and --json."""
    add_fields(parser.add_argument_group("engine"), EngineConfig, **defaults)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The flags of `SamplingParams`; None where the model's own default holds."""
    group = parser.add_argument_group("sampling")
    unset = dict.fromkeys(_SAMPLING)
    names = [name for name in _SAMPLING if name != "stop"]
    add_fields(group, SamplingParams, names, **unset | {"n": 1, "max_tokens": max_tokens, "ignore_eos": False})
    stop = describe(SamplingParams)["stop"]
    group.add_argument("--stop", action="append", metavar=stop.unit, help=f"{stop.help} may be repeated")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling keywords among parsed arguments that were given."""
    return {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's keywords among parsed arguments."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def load_llm(args: argparse.Namespace) -> LLM:
    """Build the engine the flags describe; Ctrl-C ends its work between two iterations."""
    from jaxllm import LLM

    llm = LLM(**engine_arguments(args))
    llm.after_step = raise_if_interrupted
    if llm.config.disk_kv_bytes:  # there is something to save
        raise_between_steps(lambda: llm.is_stepping)
    return llm
