"""Processes find each other at the coordinator's address, before JAX's runtime takes it over.

A `Member` and what must be the same on all -> a `Leader` on process 0, a `Follower` on every other. What a user can
get wrong (nobody there, another program there, a number twice, other arguments) is one line on every process that has
come. Knows nothing of JAX.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.runner.connections import Follower, Leader, Peer, receive_frame, send_frame
from jaxllm.runner.members import Member

JOIN_SECONDS = 60.0  # how long processes wait for each other
_HELLO_SECONDS = 5.0  # for a peer that is there to say who it is; others wait in line meanwhile
_SAY_SECONDS, _RETRY_SECONDS = 5.0, 0.1
_GREETING = b"jaxllm process 0\n"
_MAX_HELLO = 1 << 16


# Process 0: who comes, and whether it was started alike.


def gather(member: Member, facts: dict[str, Any], last: bytes) -> Leader:
    """Wait for all others at the coordinator's port, then leave the port to JAX.

    Args:
        member: process 0.
        facts: what must be the same on all processes, as JSON has it.
        last: the message that ends the conversation.

    Raises:
        ValueError: the port is taken, somebody did not come in time, or was started differently.
    """
    joined: dict[int, socket.socket] = {}
    try:
        with _listen(member.port) as listener, _saying(f"waiting for {member.num_processes - 1} more processes"):
            deadline = time.monotonic() + JOIN_SECONDS
            while len(joined) < member.num_processes - 1:
                connection = _accept(listener, deadline, member, joined)
                if (hello := _read_hello(connection)) is None:
                    connection.close()  # nobody of ours
                elif problem := _objection(hello, member, facts, joined):
                    _dismiss(connection, problem)
                    raise ValueError(problem)
                else:
                    joined[hello["process_id"]] = connection
    except ValueError as error:
        for connection in joined.values():
            _dismiss(connection, str(error))
        raise
    for connection in joined.values():
        send_frame(connection, b"")
    return Leader([Peer(connection, f"process {i}", last) for i, connection in sorted(joined.items())], last)


def _dismiss(connection: socket.socket, problem: str) -> None:
    with contextlib.suppress(OSError), connection:
        send_frame(connection, problem.encode())


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise ValueError(f"process 0 cannot listen at port {port}: {reason}; choose another port") from None


def _accept(
    listener: socket.socket, deadline: float, member: Member, joined: Mapping[int, socket.socket]
) -> socket.socket:
    listener.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        absent = ", ".join(str(i) for i in range(1, member.num_processes) if i not in joined)
        raise ValueError(
            f"process {absent} of {member.num_processes} did not come to {member.address} within {JOIN_SECONDS:g} s; "
            "start all of them with the same coordinator_address"
        ) from None
    connection.settimeout(_HELLO_SECONDS)
    return connection


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
    try:
        connection.sendall(_GREETING)
        hello = json.loads(receive_frame(connection, _MAX_HELLO))
    except (OSError, ValueError):
        return None
    return hello if isinstance(hello, dict) and hello.keys() == {"process_id", "num_processes", "facts"} else None


def _objection(
    hello: dict[str, Any], member: Member, facts: dict[str, Any], joined: Mapping[int, socket.socket]
) -> str | None:
    """Why this process cannot take part, as one line for both ends."""
    number = hello["process_id"]
    if hello["num_processes"] != member.num_processes:
        return (
            f"process {number} was started with num_processes={hello['num_processes']}, process 0 with "
            f"{member.num_processes}; give all the same"
        )
    if number in joined or number == 0:
        return f"two processes have process_id={number}; number them from 0 to {member.num_processes - 1}"
    theirs, ours = hello["facts"], json.loads(json.dumps(facts))
    for name in ours:
        if theirs.get(name) != ours[name]:
            return (
                f"process {number} was started with {name}={theirs.get(name)!r}, process 0 with {ours[name]!r}; start "
                "all with the same arguments"
            )
    return None


# The others.


def reach(member: Member, facts: dict[str, Any], last: bytes) -> Follower:
    """Connect to process 0, say who this is, and wait until all are there. Arguments and errors as of `gather`."""
    with _saying(f"waiting for process 0 at {member.address}"):
        connection = _connect(member)
        try:
            _introduce(connection, member, facts)
        except BaseException:
            connection.close()
            raise
    _connect(member).close()  # JAX's runtime listens there now: its own attempts would be seconds apart
    return Follower(member.process_id, Peer(connection, "process 0", last))


def _introduce(connection: socket.socket, member: Member, facts: dict[str, Any]) -> None:
    try:
        if (got := connection.recv(len(_GREETING), socket.MSG_WAITALL)) != _GREETING:
            raise ConnectionError(got)
    except OSError:
        raise ValueError(
            f"what listens at {member.address} is not process 0 of jaxllm; correct coordinator_address"
        ) from None
    hello = {"process_id": member.process_id, "num_processes": member.num_processes, "facts": facts}
    try:
        send_frame(connection, json.dumps(hello).encode())
        connection.settimeout(2 * JOIN_SECONDS)
        problem = receive_frame(connection).decode()
    except OSError:
        raise ValueError(f"process 0 at {member.address} ended before all processes had come") from None
    if problem:
        raise ValueError(problem)


def _connect(member: Member) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((member.host, member.port), timeout=2 * _HELLO_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                raise ValueError(
                    f"process 0 cannot be reached at {member.address} within {JOIN_SECONDS:g} s: {reason}; start it "
                    "there, or correct coordinator_address"
                ) from None
        time.sleep(_RETRY_SECONDS)


@contextlib.contextmanager
def _saying(text: str) -> Iterator[None]:
    """Tell whoever watches what takes so long."""
    timer = threading.Timer(_SAY_SECONDS, lambda: print(f"jaxllm: {text}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
