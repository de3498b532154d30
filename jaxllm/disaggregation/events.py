"""What the prefix cache holds, told to routers as it changes: vLLM's KV events over ZMQ, in msgpack.

Pages published and evicted -> one message after each step: frames topic, number (8 bytes, big endian) and
`[time, [event, ...], replica]`, where an event is one of

    ["BlockStored", [hash, ...], parent hash or nil, [token id, ...], tokens per block, nil, "GPU"]
    ["BlockRemoved", [hash, ...], "GPU"]
    ["AllBlocksCleared"]

A hash is the last 8 bytes of the page's SHA-256 as a number, as vLLM sends it. Needs the extra `kv-events`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from jaxllm.config.kv_events import KVEventsConfig
from jaxllm.scheduling.page_pool import PagePool

_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_POLL_MS = 200


class ReplicaEvents:
    """Listens to one replica's pool."""

    def __init__(self, page_size: int):
        self.news: list[list[Any]] = []
        self._page_size = page_size

    def stored(self, digest: bytes, parent: bytes | None, token_ids: Sequence[int]) -> None:
        """A full page can be found; the next pages of a run go into the same event."""
        number, before = _number(digest), None if parent is None else _number(parent)
        last = self.news[-1] if self.news else None
        if last is not None and last[0] == "BlockStored" and last[1][-1] == before:
            last[1].append(number)
            last[3].extend(token_ids)
            return
        self.news.append(["BlockStored", [number], before, list(token_ids), self._page_size, None, "GPU"])

    def removed(self, digest: bytes) -> None:
        """A page cannot be found any more."""
        last = self.news[-1] if self.news else None
        if last is not None and last[0] == "BlockRemoved":
            last[1].append(_number(digest))
        else:
            self.news.append(["BlockRemoved", [_number(digest)], "GPU"])

    def cleared(self) -> None:
        """No page can be found any more."""
        self.news.append(["AllBlocksCleared"])


class KVEvents:
    """Publishes the events of all replicas. `flush` and the pools' calls come from the thread that steps the engine.

    Raises:
        ValueError: the extra is missing, or the endpoint cannot be bound.
    """

    def __init__(self, config: KVEventsConfig, pools: Sequence[PagePool]):
        try:
            import msgpack
            import zmq
        except ImportError as error:
            raise ValueError(
                f"KV events need {error.name}; install them with: pip install 'jaxllm[kv-events]'"
            ) from None
        self._pack, self._topic = msgpack.packb, config.topic.encode()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, config.hwm)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._bind(self._socket, config.endpoint)
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._next = 0
        self._replicas = [ReplicaEvents(pool.page_size) for pool in pools]
        for pool, events in zip(pools, self._replicas, strict=True):
            pool.events = events
        self._closing = threading.Event()
        self._replay: threading.Thread | None = None
        if config.replay_endpoint is not None:
            router = self._context.socket(zmq.ROUTER)
            router.setsockopt(zmq.LINGER, 0)
            self._bind(router, config.replay_endpoint)
            self._replay = threading.Thread(target=self._answer, args=(router,), name="kv-events", daemon=True)
            self._replay.start()

    def _bind(self, socket: Any, endpoint: str) -> None:
        import zmq

        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"kv_events_config: cannot bind {endpoint}: {error}; choose another endpoint") from None

    def flush(self) -> None:
        """Send what has happened since the last time."""
        for rank, events in enumerate(self._replicas):
            if not events.news:
                continue
            news, events.news = events.news, []
            payload = self._pack([time.time(), news, rank])
            assert payload is not None
            self._sent.append((self._next, payload))
            self._socket.send_multipart([self._topic, self._next.to_bytes(8, "big"), payload])
            self._next += 1

    def _answer(self, router: Any) -> None:
        """In a thread: send again, from a number on, to whoever asks."""
        with contextlib.closing(router):
            while not self._closing.is_set():
                if not router.poll(_POLL_MS):
                    continue
                client, *_, first = router.recv_multipart()
                start = int.from_bytes(first, "big")
                for number, payload in list(self._sent):
                    if number >= start:
                        router.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
                router.send_multipart([client, b"", _END_OF_REPLAY, b""])

    def shutdown(self) -> None:
        """Send what is left and close the sockets."""
        self.flush()
        self._closing.set()
        if self._replay is not None:
            self._replay.join()
        self._socket.close()
        self._context.term()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[-8:], "big")
