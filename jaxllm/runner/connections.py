"""Framed messages between process 0 and each process that follows it, over one TCP connection each.

Bytes in, the same bytes out at the other end, in order; both ends beat every second. A process whose peer has ended,
or has been silent for too long, ends too, with exit code 1 and one line: whatever is on its devices waits for the lost
one and would wait for ever. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

MAX_BYTES = 1 << 28
BEAT_SECONDS, SILENCE_SECONDS = 1.0, 10.0
_START_SILENCE_SECONDS = 120.0  # while a process starts, libraries may hold Python's lock for long
_LENGTH = struct.Struct("<I")  # 0: a beat
_NUMBER = struct.Struct("<q")


def send_frame(connection: socket.socket, message: bytes) -> None:
    """Send one message; b"" is a beat."""
    connection.sendall(_LENGTH.pack(len(message)) + message)


def receive_frame(connection: socket.socket, limit: int = MAX_BYTES) -> bytes:
    """One message or beat. Raises OSError where the other end is gone, or sends what is no message of ours."""
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if size > limit:
        raise ConnectionError(f"a message of {size} bytes")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return bytes(data)


class Peer:
    """One connection, read beside the work: the end of the other process is seen whatever this one is busy with.

    Args:
        connection: open, both ends know who they are.
        who: for messages to people, like "process 1".
        last: the message after which the other end may close.
    """

    def __init__(self, connection: socket.socket, who: str, last: bytes):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_START_SILENCE_SECONDS)
        self._socket, self.who, self._last = connection, who, last
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.closing = False
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        threading.Thread(target=self._read, name="read", daemon=True).start()

    def ready(self) -> None:
        """The start is over: from now on silence means that something is wrong."""
        with contextlib.suppress(OSError):  # the other end may have said its last message, and this one be closed
            self._socket.settimeout(SILENCE_SECONDS)

    def send(self, message: bytes) -> None:
        """Send a message."""
        try:
            with self._lock:
                send_frame(self._socket, message)
        except OSError as error:
            self._gone(error)

    def receive(self) -> bytes:
        """The next message."""
        return self._inbox.get()

    def close(self) -> None:
        """No more messages."""
        self.closing = True
        with contextlib.suppress(OSError):
            self._socket.close()

    def _read(self) -> None:
        try:
            while not self.closing:
                if message := receive_frame(self._socket):
                    self.closing = self.closing or message == self._last
                    self._inbox.put(message)
        except OSError as error:
            self._gone(error)
        finally:
            self.close()

    def _beat(self) -> None:
        while not self.closing:
            self.send(b"")
            time.sleep(BEAT_SECONDS)

    def _gone(self, error: OSError) -> None:
        if self.closing:
            return  # it has ended as it should
        silent = isinstance(error, TimeoutError)
        reason = f"has said nothing for {self._socket.gettimeout():g} s" if silent else "is gone"
        print(f"jaxllm: error: {self.who} {reason}; this process ends", file=sys.stderr, flush=True)
        os._exit(1)


class Alone:
    """The engine of one process: nobody to tell, nobody to agree with."""

    announce = None

    def least(self, number: int) -> int:
        """See `Leader.least`."""
        return number

    def start(self, obey: Callable[[bytes], bool]) -> None:
        """See `Leader.start`."""


class Leader:
    """Process 0's end: sends every message to all followers, in one order."""

    def __init__(self, peers: Sequence[Peer], last: bytes):
        self._peers, self._last, self.is_ready = list(peers), last, False

    def start(self, obey: Callable[[bytes], bool]) -> None:
        """The engine is ready: process 0 goes on, the others do what `obey` makes of its messages, and end with it."""
        self.is_ready = True
        for peer in self._peers:
            peer.ready()

    def announce(self, message: bytes) -> None:
        """Send to every follower."""
        for peer in self._peers:
            peer.send(message)

    def least(self, number: int) -> int:
        """The least of what the processes have, the same on all."""
        answer = min(number, *(_NUMBER.unpack(peer.receive())[0] for peer in self._peers))
        self.announce(_NUMBER.pack(answer))
        return answer

    def stop(self) -> None:
        """The last message: the followers end well."""
        for peer in self._peers:
            peer.closing = True
        self.announce(self._last)


class Follower:
    """Another process's end: does what process 0 says."""

    announce = None

    def __init__(self, process_id: int, peer: Peer):
        self.process_id, self._peer, self.is_ready = process_id, peer, False

    def stop(self) -> None:
        """No more messages."""
        self._peer.close()

    def least(self, number: int) -> int:
        """See `Leader.least`."""
        self._peer.send(_NUMBER.pack(number))
        return _NUMBER.unpack(self._peer.receive())[0]

    def start(self, obey: Callable[[bytes], bool]) -> NoReturn:
        """Do as process 0 says until `obey` says that this was all (exit code 0); what fails here ends all (1)."""
        self.is_ready = True
        self._peer.ready()
        try:
            while obey(self._peer.receive()):
                pass
        except Exception:
            traceback.print_exc()
            print("jaxllm: error: this process failed; all end", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the others, who wait for this one
        self.stop()
        raise SystemExit(0)


Connection = Alone | Leader | Follower
