"""Whether an engine fits into the memory of its devices, said before anything is allocated.

A model and its `RunnerShapes` -> nothing, or a ValueError of one line: what takes how much, what to lower and to what.
Where a device's limit is not known, or the estimate was too low, the allocator's own error is put into the same words.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxllm.adapters.slots import slot_bytes
from jaxllm.kv.page_programs import device_bytes
from jaxllm.runner.programs import abstract_state
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel

_LOGITS_BYTES = 8  # per row and vocabulary entry: float32 logits, and what the sampler makes of them
_WORTH_SAYING = 0.01  # parts below this share of the whole are not listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Bytes that an engine takes of one memory: a device's, or the host's where its CPU devices share that.

    Attributes:
        weights, pages, slots, logits: parameters and adapters, KV cache, tokens of the requests' slots, the sampler's
            rows.
        cache_setting: `kv_cache_memory_bytes` that leads to `pages`.
        least_pages: of `pages`, what one request of `max_model_len` takes.
        max_num_seqs: that leads to `slots`.
    """

    weights: int
    pages: int
    slots: int
    logits: int
    cache_setting: int
    least_pages: int
    max_num_seqs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.slots + self.logits

    def text(self) -> str:
        """The parts, largest first."""
        parts = {"weights": self.weights, "KV cache": self.pages, "slots": self.slots, "logits": self.logits}
        shown = [item for item in parts.items() if item[1] >= _WORTH_SAYING * self.total]
        return ", ".join(f"{name} {_size(size)}" for name, size in sorted(shown, key=lambda item: -item[1]))

    def advice(self, excess: int) -> str:
        """What to lower so that `excess` bytes less are taken."""
        options = []
        if (pages := self.pages - excess) >= self.least_pages:
            setting = int(self.cache_setting * pages / self.pages)
            options.append(f"kv_cache_memory_bytes by {_size(self.cache_setting - setting)} to {setting}")
        if (seqs := int(self.max_num_seqs * (1 - excess / (self.slots + self.logits)))) >= 1:
            options.append(f"max_num_seqs to {seqs}")
        if options:
            return f"lower {' or '.join(options)}"
        if excess <= self.pages + self.slots + self.logits:
            return "lower max_model_len, max_num_seqs and kv_cache_memory_bytes together"
        return "use a mesh of more devices, or a smaller model"


def needed(model: AbstractModel, shapes: RunnerShapes, devices: int = 1) -> Needed:
    """What the engine takes of the memory that so many of its devices share."""
    state = abstract_state(model, shapes)
    size = model.placement.mesh.size
    all_pages = device_bytes(state.pages)
    tokens = shapes.num_pages * shapes.page_size * shapes.num_replicas
    copies = all_pages // max(1, tokens) * shapes.num_replicas  # bytes of a token of every replica, on all devices
    cut = model.placement.parts("heads") if model.cfg.cache_row.is_cut else 1
    rows = shapes.row_buckets[-1]
    return Needed(
        weights=devices * (model.parameter_bytes_per_device() + _adapter_bytes(model, shapes)),
        pages=devices * all_pages // size,
        slots=devices * device_bytes(state.slots) // size,
        logits=devices * rows * model.cfg.vocab_size * _LOGITS_BYTES,
        cache_setting=all_pages // size * cut,
        least_pages=devices * (shapes.pages_per_row + 1) * shapes.page_size * copies // size,
        max_num_seqs=shapes.max_num_seqs,
    )


def _adapter_bytes(model: AbstractModel, shapes: RunnerShapes) -> int:
    return slot_bytes(model.targets, model.placement, shapes.max_loras, shapes.max_lora_rank)


def check_memory(model: AbstractModel, shapes: RunnerShapes) -> None:
    """Raise ValueError where what the engine takes is more than what this process's devices have free."""
    devices = model.placement.mesh.local_devices
    if devices[0].platform == "cpu":
        problem = problem_of(needed(model, shapes, len(devices)), free_host_bytes(), "this machine")
    else:
        free = [s["bytes_limit"] - s["bytes_in_use"] for d in devices if (s := d.memory_stats()) and "bytes_limit" in s]
        problem = problem_of(needed(model, shapes), min(free, default=None), "a device")
    if problem:
        raise ValueError(problem)


def problem_of(needs: Needed, free: int | None, where: str) -> str | None:
    """One line where `needs` exceeds what is free; None where it fits, or nobody knows."""
    if free is None or needs.total <= free:
        return None
    excess = needs.total - free
    return (
        f"out of memory: the engine takes {_size(needs.total)} ({needs.text()}) and {where} has {_size(free)} free, "
        f"{_size(excess)} too little; {needs.advice(excess)}"
    )


@contextlib.contextmanager
def out_of_memory_explained(model: AbstractModel, shapes: RunnerShapes) -> Iterator[None]:
    """Allocations in the block that fail are a ValueError of one line too."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needs = needed(model, shapes)
        match = re.search(r"allocat\w+ (\d+) ?bytes", str(error))
        asked = min(int(match[1]) if match else needs.total // 10, needs.total)
        what = f"{_size(asked)} could not be allocated" if match else str(error).splitlines()[0]
        raise ValueError(
            f"out of memory: {what}; the engine takes {_size(needs.total)} per device ({needs.text()}) and what its "
            f"programs need beside that; {needs.advice(asked)}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def free_host_bytes() -> int | None:
    """Bytes that this process may still take of the host's memory, its container's limit included; None: unknown."""
    known = [_available(Path("/proc/meminfo")), *(_container(Path(root)) for root in ("/sys/fs/cgroup", _CGROUP_V1))]
    return min((size for size in known if size is not None), default=None)


_CGROUP_V1 = "/sys/fs/cgroup/memory"
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def _available(meminfo: Path) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    return None


def _container(folder: Path) -> int | None:
    """What a control group leaves; files that can be dropped from memory are free."""
    for limit_file, usage_file in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
            files = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
            return max(0, limit - usage + max(map(int, files), default=0))
    return None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
