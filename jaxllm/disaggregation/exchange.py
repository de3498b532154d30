"""An engine's part in handing requests over between processes: vLLM's `kv_transfer_params` in, the same out.

A request that says `do_remote_decode` is computed here and its pages are kept for whoever goes on with it; what its
answer says is what the other request must carry: `do_remote_prefill`, and where to fetch. Where both carry a
`transfer_id` of the sender's, the other need not wait for that answer: it fetches as the prompt is computed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxllm.config.kv_transfer import KVTransferConfig
from jaxllm.disaggregation.exports import Export, Exports
from jaxllm.disaggregation.handshake import facts
from jaxllm.disaggregation.imports import Imports
from jaxllm.disaggregation.stats import TransferStats
from jaxllm.disaggregation.wire import encode_rows
from jaxllm.engine.engine import Engine
from jaxllm.engine.outputs import RequestOutput
from jaxllm.scheduling.request import Request

_KNOWN = (
    "do_remote_decode do_remote_prefill remote_engine_id remote_block_ids remote_request_id remote_host remote_port "
    "remote_num_tokens remote_first_token tp_size transfer_id"
).split()


class Exchange:
    """Gives and takes for one engine.

    Args:
        engine: it has tiers, where it takes.
        config: its role.
        weights: what decides the keys and values of given tokens, the same on every machine.
    """

    def __init__(self, engine: Engine, config: KVTransferConfig, weights: str):
        memory = engine.memory
        self.config = config
        self.stats = engine.transfers = TransferStats()
        self.engine_id = config.engine_id or uuid.uuid4().hex
        self.address = (config.kv_ip or "127.0.0.1", config.kv_port or 0)
        self.facts = facts(self.engine_id, weights, memory.layout, memory.num_layers)
        self.exports = Exports(
            engine, weights, lease_seconds=config.lease_seconds, max_bytes=config.max_kept_bytes, stats=self.stats
        )
        structure = jax.tree.structure(memory.slab())
        self.imports = Imports(config, self.facts, weights, memory.layout, memory.num_layers, structure, self.stats)

    def serve_at(self, host: str, port: int, api_key: str | None) -> None:
        """Where this engine's server listens, and under which key: what the configuration left open."""
        anywhere = host in ("", "0.0.0.0", "::")
        self.address = (self.config.kv_ip or ("127.0.0.1" if anywhere else host), self.config.kv_port or port)
        self.imports.api_key = self.imports.api_key or api_key

    def shutdown(self) -> None:
        """The engine has ended."""
        self.imports.shutdown()

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise ValueError where a request's `kv_transfer_params` ask for what this engine does not do."""
        if unknown := sorted(set(params) - set(_KNOWN)):
            raise ValueError(f"kv_transfer_params has no {unknown[0][:50]!r}; it may have {', '.join(_KNOWN)}")
        name = params.get("transfer_id")
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 256):
            raise ValueError("kv_transfer_params: transfer_id must be a text of 1 to 256 characters")
        for name, allowed in (("do_remote_decode", self.config.gives), ("do_remote_prefill", self.config.takes)):
            if params.get(name) and not allowed:
                raise ValueError(f"{name}: this server is a {self.config.kv_role}; send the request to another one")

    def attach(self, request: Request, params: Mapping[str, Any], output: RequestOutput) -> None:
        """Let a request that is not queued yet start from others' pages, or leave its own. Raises ValueError."""
        self.check(params)
        if params.get("do_remote_prefill"):
            request.offer = self.imports.offer(params, request.token_ids, request.page_salt)
        if params.get("do_remote_decode"):
            name = params.get("transfer_id") or request.request_id + "-" + uuid.uuid4().hex[:16]
            export = self.exports.begin(request, name)
            request.before_release = lambda: self._finish(export, output)

    def _finish(self, export: Export, output: RequestOutput) -> None:
        self.exports.finish(export)
        if export.expires is None:
            return
        host, port = self.address
        output.kv_transfer_params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": export.transfer_id,
            "remote_block_ids": sorted(export.pages),
            "remote_host": host,
            "remote_port": port,
            "remote_num_tokens": export.num_tokens,
            "remote_first_token": export.first_token,
        }

    def pump(self) -> None:
        """After each step: take out what was computed, end what has expired."""
        self.exports.pump()

    def answer(
        self, transfer_id: str, salt: str, spans: Sequence[tuple[int, int]], names: Sequence[str]
    ) -> list[bytes]:
        """The encoded answer to a fetch; in a thread. Raises `Unknown` or ValueError."""
        return encode_rows(self.exports.rows(transfer_id, spans, names, salt))
