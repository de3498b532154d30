"""Several processes, one engine: they find each other, agree on how they were started, and join JAX's runtime.

A `Member` -> a `Leader` on process 0, which schedules, or a `Follower` on every other, which does what it says (see
`connections`). The connections are made first, at the coordinator's address,
which JAX's own runtime takes over afterwards: what a user can get wrong is said in one line on every process, where
JAX would wait for minutes and abort. JAX's runtime carries every tensor.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import EngineConfig
from jaxllm.runner.connections import Follower, Leader
from jaxllm.runner.members import Member
from jaxllm.runner.messages import STOP
from jaxllm.runner.rendezvous import JOIN_SECONDS, gather, reach
from jaxllm.sharding.mesh import MAX_EMULATED
from jaxllm.sharding.rules import parse_mesh
from jaxllm.version import __version__

_OWN = ("coordinator_address", "process_id", "tokenizer", "disk_kv_path")  # may differ between processes


def join(member: Member, config: EngineConfig) -> Leader | Follower:
    """Connect the processes and start JAX's runtime, before any device is touched.

    Raises:
        ValueError: they cannot reach each other in time, or were not started alike.
    """
    if jax.distributed.is_initialized():
        raise ValueError("JAX's distributed runtime runs already; leave jax.distributed.initialize to jaxllm")
    facts = shared_facts(config)
    connection = (gather if member.process_id == 0 else reach)(member, facts, STOP)
    start_runtime(member, config)
    atexit.register(_end, connection)
    return connection


def shared_facts(config: EngineConfig) -> dict[str, Any]:
    """What must be the same on all processes; a model's files may lie elsewhere on another machine."""
    facts = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OWN}
    return {**facts, "model": Path(config.model).name, "num_processes": None, "version": __version__}


# JAX's runtime.


def start_runtime(member: Member, config: EngineConfig) -> None:
    """Join JAX's runtime; each process has its part of the mesh. Raises ValueError where that fails."""
    if jax.config.values.get("jax_cpu_collectives_implementation") in (None, "none", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _share_emulated_devices(member, config)
    _keep_stdout_clean()
    late = threading.Timer(JOIN_SECONDS, _too_late, args=(member,))  # JAX itself would abort, with a stack trace
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            member.address, member.num_processes, member.process_id, initialization_timeout=2 * int(JOIN_SECONDS)
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes could not join: {str(error).splitlines()[0]}") from None
    finally:
        late.cancel()


def _too_late(member: Member) -> None:
    line = f"JAX's runtime did not start at {member.address} within {JOIN_SECONDS:g} s; this process ends"
    print(f"jaxllm: error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def _share_emulated_devices(member: Member, config: EngineConfig) -> None:
    """Where nobody said how many CPU devices to emulate, each process has its part of the mesh."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.values["jax_num_cpu_devices"] > 0 or "xla_force_host_platform_device_count" in flags:
        return
    needed = config.device_offset + math.prod(parse_mesh(config.mesh).values())
    jax.config.update("jax_num_cpu_devices", min(MAX_EMULATED, -(-needed // member.num_processes)))


def _keep_stdout_clean() -> None:
    """Gloo greets on file descriptor 1: that becomes standard error, and `sys.stdout` goes on writing where it did."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.fileno() == 1:
            sys.stdout.flush()
            ours = os.dup(1)
            os.dup2(2, 1)
            sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding)


def _end(connection: Leader | Follower) -> None:
    """At the end of this process: an orderly one for all, if the engine was ready and no error went unhandled.

    Else no orderly end: it would wait for the others, who may wait for this one.
    """
    if connection.is_ready and getattr(sys, "last_value", None) is None:
        connection.stop()
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    time.sleep(1.0)  # if another process is gone, the thread that watches it says so and ends this one first
    os._exit(1)
