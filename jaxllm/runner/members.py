"""Which process this is among several, as the user or a launcher says.

`EngineConfig` and environment variables -> a `Member`, checked; None for a process that is alone. Knows nothing of
connections; asks JAX only where it is to find out from the cluster.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.config import EngineConfig

_DETECTION_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """This process among several: where process 0 is, how many there are, and which one this is."""

    host: str
    port: int
    num_processes: int
    process_id: int

    @property
    def address(self) -> str:
        """As a user writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def member_of(config: EngineConfig, environment: Mapping[str, str] = os.environ) -> Member | None:
    """This process among several, as the configuration or else a launcher's variables say; None where it is alone.

    Raises:
        ValueError: what is said is not whole, or no address or number.
    """
    address = config.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS") or None
    count = _number(config.num_processes, "JAX_NUM_PROCESSES", environment)
    number = _number(config.process_id, "JAX_PROCESS_ID", environment)
    if config.distributed:
        address, count, number = _detected(address, count, number)
    elif address is None and count is None and number is None:
        return None
    if address is None or count is None or number is None:
        raise ValueError(
            "coordinator_address, num_processes and process_id belong together; give all three, or distributed=True "
            "(--distributed) to take them from Slurm, GKE or a TPU slice"
        )
    if count < 1 or not 0 <= number < count:
        raise ValueError(f"process_id={number} of num_processes={count}; count from 0")
    host, port = parse_address(address)
    return Member(host=host, port=port, num_processes=count, process_id=number) if count > 1 else None


def _number(value: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name, "")
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment; it must be a whole number")
    return int(text)


def _detected(address: str | None, count: int | None, number: int | None) -> tuple[str | None, int | None, int | None]:
    """What is not given, as JAX finds it out from the cluster that this process runs in."""
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(address, count, number, None, None, _DETECTION_SECONDS)
    if None in found[:3]:
        raise ValueError(
            "distributed=True (--distributed), but no Slurm, GKE or TPU slice is found here; give coordinator_address, "
            "num_processes and process_id"
        )
    return found[:3]


def parse_address(text: str) -> tuple[str, int]:
    """`"host:port"` -> both. Raises ValueError where it is none, or nobody knows the host."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"coordinator_address={text!r} is not HOST:PORT; give process 0's, for example 'host0:1234'")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError(f"coordinator_address={text!r}: no machine is known as {host!r}; correct it") from None
    return host, int(port)
