"""How an engine hands requests over to engines in other processes, in vLLM's spelling (`--kv-transfer-config`).

A JSON object -> `KVTransferConfig`, checked. Knows nothing of engines or sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.config.fields import check_types

_EXTRA = "kv_connector_extra_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferConfig:
    """One side of a pair, or both.

    Attributes:
        kv_role: kv_producer computes prompts and gives their pages away, kv_consumer fetches them, kv_both does either.
        kv_connector: whose contract of requests and answers is spoken; there is one.
        engine_id: what others call this engine; default: a new name at each start.
        kv_ip, kv_port: where others reach this engine's server; default: where it listens.
        kv_load_failure_policy: what becomes of a request whose pages do not come: it is computed here (recompute), or
            ends with an error (fail).
        peers: `host:port` that may be fetched from, `*` any; default: this machine only.
        lease_seconds: how long pages are kept for whoever neither fetches them nor says that it will.
        heartbeat_seconds: between two renewals of the leases of pages that are wanted and not fetched yet; 0: none.
        timeout_seconds: that a fetch may take, from its request to its last byte, before it has failed.
        max_kept_bytes: of host memory for pages that wait to be fetched.
        api_key: shown to the peers; default: the first key of the server's own.
    """

    kv_role: Literal["kv_producer", "kv_consumer", "kv_both"]
    kv_connector: Literal["NixlConnector"] = "NixlConnector"
    engine_id: str | None = None
    kv_ip: str | None = None
    kv_port: int | None = None
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    peers: Sequence[str] = field(default=())
    lease_seconds: float = 30.0
    heartbeat_seconds: float = 5.0
    timeout_seconds: float = 10.0
    max_kept_bytes: int = 4 << 30
    api_key: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lease_seconds", "timeout_seconds", "max_kept_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"kv_transfer_config: {name}={getattr(self, name)!r}; it must be above 0")
        if not self.heartbeat_seconds >= 0:
            raise ValueError(f"kv_transfer_config: heartbeat_seconds={self.heartbeat_seconds!r}; it must be 0 or more")
        if self.kv_port is not None and not 1 <= self.kv_port <= 65535:
            raise ValueError(f"kv_transfer_config: kv_port={self.kv_port}; it must be between 1 and 65535")

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> KVTransferConfig:
        """Build from the object; what stands under `kv_connector_extra_config` may also stand beside the rest.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        extra = given.get(_EXTRA) or {}
        if not isinstance(extra, Mapping):
            raise ValueError(f"kv_transfer_config: {_EXTRA} must be a table")
        values = {name: value for name, value in given.items() if name != _EXTRA} | dict(extra)
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"kv_transfer_config has no {unknown[0]!r}; it may have {', '.join(known)}")
        if "kv_role" not in values:
            raise ValueError("kv_transfer_config needs kv_role: kv_producer, kv_consumer or kv_both")
        return cls(**values)

    @property
    def gives(self) -> bool:
        """Whether it hands requests over."""
        return self.kv_role != "kv_consumer"

    @property
    def takes(self) -> bool:
        """Whether it goes on with others' requests."""
        return self.kv_role != "kv_producer"

    def may_fetch_from(self, host: str, port: int) -> bool:
        """Whether a request may name this address: it comes from a client, who shall not choose whom we call."""
        if not self.peers:
            return host in ("127.0.0.1", "localhost", "::1")
        return "*" in self.peers or f"{host}:{port}" in self.peers
