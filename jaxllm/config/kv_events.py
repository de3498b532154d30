"""Telling routers what the prefix cache holds, in vLLM's spelling (`--kv-events-config`).

A JSON object -> `KVEventsConfig`, checked. Knows nothing of sockets or pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.config.fields import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Where events go.

    Attributes:
        enable_kv_cache_events: whether there are any.
        publisher: how they are sent.
        endpoint: that the publisher binds; this machine only, unless told otherwise.
        replay_endpoint: where whoever has missed some asks for them; default: nowhere.
        buffer_steps: batches that are kept for them.
        hwm: batches that wait for a slow subscriber; more are dropped.
        topic: the first frame of every message.
    """

    enable_kv_cache_events: bool = True
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    topic: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("buffer_steps", "hwm"):
            if getattr(self, name) < 1:
                raise ValueError(f"kv_events_config: {name}={getattr(self, name)}; it must be at least 1")

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> KVEventsConfig:
        """Build from the object; an unknown name is refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"kv_events_config has no {unknown[0]!r}; it may have {', '.join(known)}")
        return cls(**given)

    @property
    def is_on(self) -> bool:
        """Whether anything is sent."""
        return self.enable_kv_cache_events and self.publisher != "null"
