"""The taking side: a request whose prompt another server has computed starts on pages fetched from there.

`kv_transfer_params` of a request -> an `Offer`: the engine treats the other server as the tier below all others, so
what it has on the device or in its own tiers does not travel. A fetch that fails is a load that found less than was
promised: the prompt is computed here, or the request ends with an error, as `kv_load_failure_policy` says.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxllm.config.kv_transfer import KVTransferConfig
from jaxllm.disaggregation.handshake import mismatch
from jaxllm.disaggregation.peer import Peer, PeerError
from jaxllm.disaggregation.stats import TransferStats
from jaxllm.disaggregation.wire import decode_rows, span_names
from jaxllm.engine.errors import EngineError
from jaxllm.kv.layout import PageLayout
from jaxllm.kv.logical import row_bytes, row_shapes, slab_of

log = logging.getLogger(__name__)
_MOST_RENEWED = 1024  # in one heartbeat


class TransferFailed(EngineError):
    """The pages of this request did not come, and `kv_load_failure_policy` is fail."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class RemoteOffer:
    """What a peer keeps of one request: an `Offer`.

    Attributes:
        since: on the performance clock: from then on somebody waits for the pages.
        is_early: the prompt is computed there at this time.
    """

    imports: Imports
    peer: Peer
    transfer_id: str
    token_ids: list[int]
    salt: str
    num_tokens: int
    first_token: int
    required: Exception | None
    since: float
    is_early: bool = False
    is_open: bool = True
    has_failed: bool = False

    def want(self, start: int, stop: int) -> None:
        """See `Offer`: it is kept there anyway."""

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[Any | None]:
        """See `Offer`."""
        if self.has_failed or not self.is_open:
            return [None] * len(spans)
        try:
            return self.imports.fetch(self, spans)
        except (PeerError, ValueError) as error:
            if self.is_open and not self.has_failed:
                log.warning("the pages of a prompt computed elsewhere did not come: %s", error)
                self.has_failed = True
            return [None] * len(spans)

    def close(self) -> None:
        """See `Offer`."""
        if self.is_open:
            self.is_open = False
            self.imports.closed(self)


class Imports:
    """All that one engine takes from others.

    Args:
        config: whom it may ask, and for how long.
        facts: of this side, see `handshake`.
        root: what decides a page's content beside tokens, on both sides.
        layout, num_layers, structure: of this engine's slabs.
    """

    def __init__(
        self,
        config: KVTransferConfig,
        facts: dict[str, Any],
        root: str,
        layout: PageLayout,
        num_layers: int,
        structure: Any,
        stats: TransferStats,
    ):
        self.api_key = config.api_key
        self.stats = stats
        self._config, self._facts, self._root = config, facts, root
        self._layout, self._structure = layout, structure
        self._shapes, self._row_bytes = row_shapes(layout, num_layers), row_bytes(layout, num_layers)
        self._peers: dict[tuple[str, int], Peer] = {}
        self._agreed: dict[Peer, str] = {}  # with which engine there
        self._acknowledgements = ThreadPoolExecutor(1, thread_name_prefix="kv-ack")
        self._open: weakref.WeakSet[RemoteOffer] = weakref.WeakSet()
        self._ended = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._lock = threading.Lock()

    def offer(self, params: Mapping[str, Any], token_ids: Sequence[int], salt: str) -> RemoteOffer:
        """What `kv_transfer_params` of a request promise. Raises ValueError where they cannot be used."""
        host, port, name = params.get("remote_host"), params.get("remote_port"), params.get("remote_request_id")
        is_early = name is None and params.get("transfer_id") is not None
        name = params.get("transfer_id") if is_early else name
        if not isinstance(host, str) or not isinstance(port, int) or not isinstance(name, str):
            raise ValueError(
                "kv_transfer_params need remote_host, remote_port and remote_request_id, as the prefill "
                "server's answer has them, or the transfer_id that it was given"
            )
        if not self._config.may_fetch_from(host, port):
            raise ValueError(
                f"pages are not fetched from {host[:100]}:{port}; add it to peers in this server's kv_transfer_config"
            )
        counts = [
            params.get(key, default)
            for key, default in (("remote_num_tokens", len(token_ids) - 1), ("remote_first_token", 0))
        ]
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError("kv_transfer_params: remote_num_tokens and remote_first_token must be whole numbers")
        required = None
        if self._config.kv_load_failure_policy == "fail":
            required = TransferFailed("the prompt's pages could not be fetched from the prefill server; send it again")
        offer = RemoteOffer(
            self,
            self._peer(host, port),
            name,
            list(token_ids),
            salt,
            min(counts[0], len(token_ids) - 1),
            counts[1],
            required,
            time.perf_counter(),
            is_early,
        )
        self._keep_alive(offer)
        return offer

    def _keep_alive(self, offer: RemoteOffer) -> None:
        """Let the other side know now and then that its pages are wanted: this request may wait long for a slot."""
        if not self._config.heartbeat_seconds:
            return
        with self._lock:
            self._open.add(offer)
        if self._heartbeat is None:
            self._heartbeat = threading.Thread(target=self._beat, name="kv-heartbeat", daemon=True)
            self._heartbeat.start()

    def _beat(self) -> None:
        """In a thread. A peer that does not answer is no matter here: the fetch will say so."""
        while not self._ended.wait(self._config.heartbeat_seconds):
            with self._lock:
                offers = [offer for offer in self._open if not offer.has_failed]
            for peer in {offer.peer for offer in offers}:
                with contextlib.suppress(PeerError):
                    peer.renew([offer.transfer_id for offer in offers if offer.peer is peer][:_MOST_RENEWED])

    def _peer(self, host: str, port: int) -> Peer:
        timeout, key = self._config.timeout_seconds, self.api_key
        return self._peers.setdefault((host, port), Peer(host, port, timeout=timeout, api_key=key))

    def fetch(self, offer: RemoteOffer, spans: Sequence[tuple[int, int]]) -> list[Any]:
        """Slabs of this engine, in host memory; in a thread. Raises PeerError or ValueError."""
        asked = time.perf_counter()
        self._agree(offer.peer)
        names = span_names(self._root, offer.salt, offer.token_ids, [stop for _, stop in spans])
        wait, found = self._config.timeout_seconds / 2 if offer.is_early else 0.0, None
        while found is None:
            if not offer.is_open:
                raise PeerError("nobody wants them any more")
            asked = time.perf_counter()
            found = offer.peer.fetch(offer.transfer_id, offer.salt, spans, names, wait)
        if offer.is_early and found.ended is not None:
            offer.since = found.ended
        tokens = [stop - start for start, stop in spans]
        rows = decode_rows(found.content, tokens, self._shapes)
        size = self._layout.page_size
        starts = [start % size for start, _ in spans]
        slabs = [slab_of(one, self._layout, at, self._structure) for one, at in zip(rows, starts, strict=True)]
        with self._lock:
            self.stats.pages += len(spans)
            self.stats.bytes += sum(tokens) * self._row_bytes
            self.stats.seconds += time.perf_counter() - asked - found.waited
        return slabs

    def _agree(self, peer: Peer) -> None:
        """The handshake, once for each peer; a peer that was started anew fails a fetch, and is asked again."""
        with self._lock:
            if peer in self._agreed:
                return
        theirs = peer.handshake()
        if (problem := mismatch(self._facts, theirs)) is not None:
            raise PeerError(f"{peer.host}:{peer.port} cannot be used: {problem}")
        with self._lock:
            self._agreed[peer] = str(theirs.get("engine_id"))

    def shutdown(self) -> None:
        """Acknowledge what is left, and close every connection."""
        self._ended.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        self._acknowledgements.shutdown()
        for peer in self._peers.values():
            peer.close()

    def closed(self, offer: RemoteOffer) -> None:
        """Acknowledge, beside the engine, and count."""
        with self._lock:
            self._open.discard(offer)
        self.stats.handed_over += not offer.has_failed
        self.stats.failed += offer.has_failed
        self.stats.exposed_seconds += time.perf_counter() - offer.since
        if offer.has_failed:
            with self._lock:
                self._agreed.pop(offer.peer, None)
        self._acknowledgements.submit(_acknowledge, offer)


def _acknowledge(offer: RemoteOffer) -> None:
    try:
        offer.peer.release(offer.transfer_id)
    except PeerError as error:
        log.info("an acknowledgement was lost, the lease will end: %s", error)
