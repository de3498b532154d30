"""Which models a pool has, and how much memory they share.

A TOML file, `NAME=PATH` pairs or a Python mapping -> `PoolConfig` and `ModelEntry`s, checked. What an entry says beside
its own fields are fields of `EngineConfig`. Knows nothing of devices.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxllm.config import EngineConfig
from jaxllm.config.fields import check_types
from jaxllm.pool.policies import PolicyName

Preload = Literal["all", "pinned", "none"]
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_NAME = re.compile(r"[\w.:@+/-]{1,200}")
_REFUSED = {
    "coordinator_address": "a pool is one process",
    "num_processes": "a pool is one process",
    "process_id": "a pool is one process",
    "distributed": "a pool is one process",
    "disk_kv_bytes": "the KV of a pool's models rests in host memory",
    "disk_kv_path": "see disk_kv_bytes",
    "prefill_mesh": "a pool steps one engine for each model",
    "decode_mesh": "see prefill_mesh",
    "kv_transfer_config": "its models are not handed over",
    "kv_events_config": "its prefix caches come and go",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """What the models of a pool share.

    Attributes:
        device_memory_bytes (BYTES): of each device, for weights and KV cache of the models that are on it; default:
            what the device has free, less 1 GiB; on a CPU half of the memory that is free.
        host_memory_bytes (BYTES): host memory for weights at rest; what does not fit is read again from disk; default:
            all of it.
        sleeping_kv_bytes (BYTES): host memory for the KV cache of models that are not on the device.
        kv_slab_bytes (BYTES): this is cut into slabs of so many bytes; default: a sixteenth, at most 1 GiB.
        policy: token switches between tokens, request between requests only.
        keep_alive (DURATION): how long a model without requests stays on the device: '5m', '1h', seconds, -1 for ever.
        preload: models that are loaded at the start; the others with their first request.
        tpot (SECONDS): between tokens of a request, as promised; decides how long turns are.
    """

    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    sleeping_kv_bytes: int = 1 << 30
    kv_slab_bytes: int | None = None
    policy: PolicyName = "token"
    keep_alive: str = "5m"
    preload: Preload = "all"
    tpot: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("device_memory_bytes", "host_memory_bytes", "sleeping_kv_bytes", "kv_slab_bytes", "tpot"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value!r}; it must be above 0")
        if self.slab_bytes > self.sleeping_kv_bytes:
            raise ValueError(f"kv_slab_bytes={self.slab_bytes} is above sleeping_kv_bytes={self.sleeping_kv_bytes}")
        seconds(self.keep_alive)

    @property
    def slab_bytes(self) -> int:
        """Of one slab of the host's KV cache."""
        return self.kv_slab_bytes or max(1, min(1 << 30, self.sleeping_kv_bytes // 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of a pool.

    Attributes:
        name: that requests choose it by.
        path: short name, folder, .gguf file or Hugging Face id.
        aliases: further names.
        pinned: never leaves the device.
        keep_alive: as in `PoolConfig`, whose value holds where this is None.
        priority: the model with the smaller number stays on the device longer.
        lora_modules: adapters by the names that requests choose them by, each the folder that PEFT saved it in.
        engine: fields of `EngineConfig`.
    """

    name: str
    path: str
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    keep_alive: str | float | None = None
    priority: int = 0
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a model; use letters, digits and . _ : @ + / -")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"model {self.name!r}: path={self.path!r}; give a folder, a file or a model's name")
        if type(self.pinned) is not bool or type(self.priority) is not int:
            raise ValueError(f"model {self.name!r}: pinned is true or false, priority a whole number")
        if self.keep_alive is not None:
            seconds(self.keep_alive)

    @property
    def names(self) -> tuple[str, ...]:
        """All that requests choose it by, its adapters' among them."""
        return (self.name, *self.aliases, *self.lora_modules)

    def engine_config(self) -> EngineConfig:
        """How its engine runs. Raises ValueError for what cannot be."""
        for name, reason in _REFUSED.items():
            if self.engine.get(name):
                raise ValueError(f"model {self.name!r}: {name} is not for pools: {reason}; leave it out")
        adapters = {"enable_lora": True} if self.lora_modules else {}
        try:
            return EngineConfig.from_kwargs({**self.engine, **adapters, "model": self.path})
        except ValueError as error:
            raise ValueError(f"model {self.name!r}: {error}") from None

    @classmethod
    def of(cls, name: str, given: Any, defaults: Mapping[str, Any]) -> ModelEntry:
        """From a path, or a table of the entry's own fields and the engine's, over the engine's `defaults`."""
        if isinstance(given, str | Path):
            given = {"path": str(given)}
        if not isinstance(given, Mapping) or "path" not in given:
            raise ValueError(f"model {name!r}: give its path, or a table with a path")
        own = {f.name for f in dataclasses.fields(cls)} - {"name", "engine"}
        fields = {key: value for key, value in given.items() if key in own}
        aliases = fields.pop("aliases", ())
        if isinstance(aliases, str) or not isinstance(aliases, Sequence):
            raise ValueError(f"model {name!r}: aliases={aliases!r}; give a list of names")
        adapters = fields.pop("lora_modules", {})
        if not isinstance(adapters, Mapping) or not all(isinstance(one, str) and one for one in adapters.values()):
            raise ValueError(f"model {name!r}: lora_modules={adapters!r}; give a table of names and folders")
        engine = {**defaults, **{key: value for key, value in given.items() if key not in own}}
        entry = cls(name=name, aliases=tuple(aliases), lora_modules=dict(adapters), engine=engine, **fields)
        entry.engine_config()
        return entry


def seconds(duration: Any) -> float:
    """A duration as ollama writes it: '10m', '1h30m', '-1' for ever, a number of seconds. Raises ValueError."""
    text = str(duration).strip()
    try:
        value = float(text)
    except ValueError:
        parts = _DURATION.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text.removeprefix("-"):
            raise ValueError(
                f"keep_alive={text[:50]!r}; give seconds, a duration such as '5m' or '1h30m', or -1 for ever"
            ) from None
        value = sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if text.startswith("-") else 1)
    if isinstance(duration, bool) or math.isnan(value):
        raise ValueError(f"keep_alive={duration!r}; give seconds, a duration such as '5m', or -1 for ever")
    return math.inf if value < 0 else value


def read_models(
    given: Mapping[str, Any] | Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[ModelEntry]]:
    """The pool's own settings, and its models.

    Args:
        given: name -> path or table; or what `--models` takes: one TOML file, or NAME=PATH pairs.
        defaults: fields of `EngineConfig` for every model that does not say otherwise.

    Raises:
        ValueError: one line that says what is wrong with which model.
    """
    settings: dict[str, Any] = {}
    if not isinstance(given, Mapping):
        given, settings = _from_arguments(given)
    entries = [ModelEntry.of(name, value, defaults or {}) for name, value in given.items()]
    if not entries:
        raise ValueError("a pool needs at least one model; give NAME=PATH or a TOML file with [models.NAME] tables")
    check_names(entries)
    return settings, entries


def check_names(entries: Sequence[ModelEntry]) -> None:
    """Raise ValueError where two models would answer to one name."""
    seen: dict[str, str] = {}
    for entry in entries:
        for name in entry.names:
            if (other := seen.setdefault(name, entry.name)) is not entry.name:
                raise ValueError(f"the name {name!r} belongs to {other!r} already; give {entry.name!r} another")


def _from_arguments(given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    if len(given) == 1 and given[0].endswith(".toml"):
        return _from_file(Path(given[0]))
    models = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ValueError(f"--models {pair!r}; give NAME=PATH pairs, or one .toml file")
        if name in models:
            raise ValueError(f"--models names {name!r} twice")
        models[name] = path
    return models, {}


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if unknown := sorted(set(table) - {"pool", "models"}):
        raise ValueError(f"{path}: unknown table [{unknown[0]}]; use [pool] and [models.NAME]")
    models, pool = table.get("models", {}), table.get("pool", {})
    known = {f.name for f in dataclasses.fields(PoolConfig)}
    if unknown := sorted(set(pool) - known):
        raise ValueError(f"{path}: [pool] has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if not isinstance(models, Mapping):
        raise ValueError(f"{path}: [models] is a table of models")
    return dict(models), dict(pool)
