"""KV offloading: what an engine's configuration says of host memory and disk -> tiers and mover of a `KVMemory`."""

from __future__ import annotations

from pathlib import Path

from jaxllm.config import EngineConfig
from jaxllm.kv.disk_store import DiskStore
from jaxllm.kv.memory import KVMemory
from jaxllm.kv.mover import HostPages, Mover, page_format
from jaxllm.scheduling.host_pool import HostPool
from jaxllm.scheduling.tiers import Tiers


def check_tiers(memory: KVMemory, config: EngineConfig) -> None:
    """Raise ValueError where lower tiers are asked for that cannot be; on every process, before weights are read."""
    page_bytes = memory.host_page_bytes
    if not config.host_kv_bytes and config.preemption_mode == "swap":
        raise ValueError("preemption_mode='swap' needs room in host memory; set host_kv_bytes")
    if 0 < config.host_kv_bytes < page_bytes:
        raise ValueError(f"host_kv_bytes={config.host_kv_bytes} is less than one page; use at least {page_bytes}")
    if config.disk_kv_bytes and memory.placement.mesh.is_multi_process:
        raise ValueError(
            "disk_kv_bytes is for one process; where there are several leave it and disk_kv_path out, host_kv_bytes "
            "works without"
        )


def add_tiers(
    memory: KVMemory, config: EngineConfig, arrays: HostPages, identity: str, *, receives: bool = False
) -> None:
    """Put host memory, and a disk, under the pages, where the configuration asks for them.

    Args:
        memory: gets `tiers` and `mover`.
        config: sizes in bytes, which `check_tiers` has passed.
        arrays: who runs the programs that move pages.
        identity: what decides the content of a page besides its tokens.
        receives: other engines hand their pages over, so there is a mover even where nothing is kept below.
    """
    if not config.host_kv_bytes and not receives:
        return
    slab, page_bytes = memory.slab(), memory.host_page_bytes
    disk = None
    if config.disk_kv_path is not None:
        form = page_format(slab, identity, memory.layout)
        disk = DiskStore(Path(config.disk_kv_path), config.disk_kv_bytes, form)
    host = HostPool(config.host_kv_bytes // page_bytes)
    memory.tiers = Tiers(host, disk, page_bytes=page_bytes, preemption=config.preemption_mode)
    memory.mover = Mover(arrays, memory.tiers, slab, disk, memory.layout)
    if disk is not None:
        host.on_evict = memory.mover.evict
