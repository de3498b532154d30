"""Several processes, one engine: process 0 schedules, the others follow what it dispatches.

JAX's own runtime (`jax.distributed`) joins the processes and carries every tensor. Beside it, process 0 sends each
dispatch (see `wire`) over one TCP connection per follower: the address and a random token come through JAX's runtime,
and a connection without the token is closed. Both ends beat every second: a process that ends, or says nothing for
`_SILENCE_SECONDS`, ends all others with exit code 1 and a message.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.config import EngineConfig
from jaxllm.runner.messages import MAX_BYTES, encode
from jaxllm.runner.runner import ModelRunner

_BEAT_SECONDS, _SILENCE_SECONDS, _JOIN_SECONDS = 1.0, 10.0, 120.0
_LENGTH = struct.Struct("<I")  # 0: a beat
STOP = encode(("stop", 0, True), ())
_TOKEN_BYTES = 32
_HELLO = struct.Struct("<I")  # process id, after the token


def initialize(config: EngineConfig) -> None:
    """Join JAX's runtime where the configuration or the environment says that there are several processes.

    Before any device is touched. Raises ValueError where the parts do not agree.
    """
    given = _given(config)
    if not config.distributed and all(value is None for value in given):
        return
    if not config.distributed and any(value is None for value in given):
        raise ValueError(
            "coordinator_address, num_processes and process_id belong together; give all three, or distributed=True "
            "(--distributed) to take them from Slurm, GKE or a TPU slice"
        )
    if jax.distributed.is_initialized():
        return
    if jax.config.values.get("jax_cpu_collectives_implementation") in (None, "none", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _keep_stdout_clean()
    try:
        jax.distributed.initialize(*given, initialization_timeout=int(_JOIN_SECONDS))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes could not join: {str(error).splitlines()[0]}") from None


def _keep_stdout_clean() -> None:
    """Gloo greets on file descriptor 1: that becomes standard error, and `sys.stdout` goes on writing where it did."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.fileno() == 1:
            sys.stdout.flush()
            ours = os.dup(1)
            os.dup2(2, 1)
            sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding)


def _given(config: EngineConfig) -> tuple[str | None, int | None, int | None]:
    """Address, number and own number: from the configuration, else from the variables that the launchers set."""
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    numbers = []
    for value, name in ((config.num_processes, "JAX_NUM_PROCESSES"), (config.process_id, "JAX_PROCESS_ID")):
        text = os.environ.get(name, "")
        if value is None and text and not text.isdecimal():
            raise ValueError(f"{name}={text!r} in the environment; it must be a whole number")
        numbers.append(int(text) if value is None and text else value)
    return address, numbers[0], numbers[1]


def check_mesh(mesh: Any) -> None:
    """Raise ValueError where a process would have no device in the mesh: it could not take part."""
    absent = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if absent:
        raise ValueError(
            f"process {min(absent)} has no device in mesh {dict(mesh.shape)}; use all {jax.device_count()} devices, "
            "or fewer processes"
        )


def least(number: int) -> int:
    """The least of what the processes have, for sizes that all must agree on."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def lead_or_follow(runner: ModelRunner, config: EngineConfig) -> None:
    """On process 0 (or a process that is alone) returns; on others it follows until process 0 ends, and exits."""
    connection = connect(config)
    if isinstance(connection, Follower):
        connection.run(runner.obey)
    if connection is not None:
        runner.leader = connection
        atexit.register(_stop, connection)


def _stop(leader: Leader) -> None:
    """At the end of process 0. After an error that nobody handled, no orderly end: it would wait for the others."""
    if getattr(sys, "last_value", None) is None:
        leader.stop()
        return
    sys.stderr.flush()
    time.sleep(2.0)  # if another process is gone, the thread that watches it says so and ends this one first
    os._exit(1)


def connect(config: EngineConfig) -> Leader | Follower | None:
    """The connection of this process; None where it is alone."""
    import jax

    if jax.process_count() == 1:
        return None
    leads = jax.process_index() == 0
    listener = socket.create_server((_own_address(config), 0)) if leads else None
    greeting = np.zeros(_TOKEN_BYTES + 6, np.uint8)
    if listener is not None:
        host, port = listener.getsockname()[:2]
        address = secrets.token_bytes(_TOKEN_BYTES) + socket.inet_aton(host) + port.to_bytes(2, "big")
        greeting = np.frombuffer(address, np.uint8)
    greeting = bytes(np.asarray(multihost_utils.broadcast_one_to_all(greeting)).astype(np.uint8))
    token, host, port = greeting[:_TOKEN_BYTES], socket.inet_ntoa(greeting[_TOKEN_BYTES:-2]), greeting[-2:]
    if listener is not None:
        return Leader(listener, token, jax.process_count() - 1)
    return Follower(host, int.from_bytes(port, "big"), token, jax.process_index())


def _own_address(config: EngineConfig) -> str:
    """Where the others reach process 0: the coordinator's host, which is this one, or this machine's name."""
    coordinator = _given(config)[0]
    return socket.gethostbyname(coordinator.rpartition(":")[0] if coordinator else socket.gethostname())


class _Peer:
    """One connection: framed messages, beats, and an end of the process when the other end is gone."""

    def __init__(self, connection: socket.socket, who: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SILENCE_SECONDS)
        self._socket, self.who = connection, who
        self._lock = threading.Lock()
        self.closing = False
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, message: bytes) -> None:
        """Send a message; b"" is a beat."""
        try:
            with self._lock:
                self._socket.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            self.gone(error)

    def receive(self) -> bytes:
        """The next message. Does not return where the other end is gone."""
        try:
            while True:
                (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
                if size:
                    return self._exactly(size)
        except OSError as error:
            self.gone(error)

    def gone(self, error: OSError) -> NoReturn:
        """End this process: whatever is on the devices waits for the lost one and would wait for ever."""
        if not self.closing:
            silent = isinstance(error, TimeoutError)
            reason = f"has said nothing for {_SILENCE_SECONDS:g} s" if silent else "is gone"
            print(f"jaxllm: error: {self.who} {reason}; this process ends", file=sys.stderr, flush=True)
            os._exit(1)
        raise SystemExit(0)

    def close(self) -> None:
        """No more messages."""
        self.closing = True
        with contextlib.suppress(OSError):
            self._socket.close()

    def _exactly(self, size: int) -> bytes:
        if size > MAX_BYTES:
            raise ConnectionError(f"a message of {size} bytes")
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("closed")
            data += part
        return bytes(data)

    def _beat(self) -> None:
        while not self.closing:
            self.send(b"")
            time.sleep(_BEAT_SECONDS)


class Leader:
    """Process 0's end: sends every dispatch to all followers, in one order."""

    def __init__(self, listener: socket.socket, token: bytes, num_followers: int):
        self._peers: list[_Peer] = []
        listener.settimeout(_JOIN_SECONDS)
        with listener:
            while len(self._peers) < num_followers:
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(_SILENCE_SECONDS)
                    hello = connection.recv(_TOKEN_BYTES + _HELLO.size, socket.MSG_WAITALL)
                except TimeoutError:
                    raise ValueError(f"{num_followers - len(self._peers)} processes did not connect") from None
                if not hmac.compare_digest(hello[:_TOKEN_BYTES], token):
                    connection.close()
                    continue
                (number,) = _HELLO.unpack(hello[_TOKEN_BYTES:])
                self._peers.append(_Peer(connection, f"process {number}"))
        for peer in self._peers:
            threading.Thread(target=peer.receive, name="watch", daemon=True).start()

    def send(self, message: bytes) -> None:
        """To every follower."""
        for peer in self._peers:
            peer.send(message)

    def stop(self) -> None:
        """The last message: the followers end well; JAX's runtime waits for them."""
        for peer in self._peers:
            peer.closing = True
        self.send(STOP)


class Follower:
    """Another process's end: reads what process 0 dispatches."""

    def __init__(self, host: str, port: int, token: bytes, process_id: int):
        try:
            connection = socket.create_connection((host, port), timeout=_SILENCE_SECONDS)
        except OSError as error:
            raise ValueError(f"process 0 cannot be reached at {host}:{port}: {error}") from None
        connection.sendall(token + _HELLO.pack(process_id))
        self._peer = _Peer(connection, "process 0")
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="read", daemon=True).start()

    def _read(self) -> None:
        """Beside the work, so that the end of process 0 is seen while this process computes or compiles."""
        while not self._peer.closing:
            message = self._peer.receive()
            self._peer.closing = message == STOP
            self._messages.put(message)

    def run(self, execute: Callable[[bytes], bool]) -> NoReturn:
        """Do as process 0 says until it says stop (exit code 0); what fails here ends all (exit code 1)."""
        try:
            while execute(self._messages.get()):
                pass
        except Exception:
            traceback.print_exc()
            print("jaxllm: error: this process failed; all end", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the others, who wait for this one
        self._peer.close()
        raise SystemExit(0)
