"""The adapters an engine serves, by name: read, checked, and made ready for the device's slots. Safe on any thread.

Name and folder -> `ReadyAdapter`. So many are kept ready in host memory; others are read again when they are asked for.
Knows nothing of requests: whoever has a `ReadyAdapter` may go on with it after its name is gone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.adapters.peft import PeftAdapter, read_peft
from jaxllm.adapters.product import Slots, adapter_arrays
from jaxllm.adapters.slots import as_in_slots
from jaxllm.adapters.targets import Target


@dataclass(frozen=True, slots=True, eq=False)
class ReadyAdapter:
    """An adapter as the runner takes it.

    Attributes:
        identity: changes with its numbers.
        arrays: matrices for every target, with zeros up to the slots' rank, as the slots keep them.
    """

    name: str
    identity: str
    arrays: Mapping[str, Slots]


@dataclass(frozen=True, slots=True)
class Served:
    """An entry of the store: a name, where the adapter came from (None: memory), and the caller's number for it."""

    name: str
    path: str | None
    number: int = 0


class UnknownAdapter(ValueError):
    """Nothing is served under a name."""


class AdapterStore:
    """Adapters of one model.

    Args:
        targets: the model's parameters that take adapters; none: adapters are off.
        max_rank: of an adapter.
        num_ready: adapters that are kept in host memory.
    """

    def __init__(self, targets: Mapping[str, Target], max_rank: int, num_ready: int):
        self._targets, self._max_rank, self._num_ready = targets, max_rank, num_ready
        self._served: dict[str, Served] = {}
        self._ready: OrderedDict[str, ReadyAdapter] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether the engine takes adapters at all."""
        return bool(self._targets)

    @property
    def served(self) -> list[Served]:
        """What is served, in the order in which it came."""
        return list(self._served.values())

    def load(self, name: str, path: str | Path, *, number: int = 0, replace: bool = False) -> ReadyAdapter:
        """Read an adapter and serve it under a name.

        Args:
            name: not in use, unless `replace`.
            path: the folder.
            number: the caller's own for it.
            replace: what was served under the name goes; requests that run finish with it.

        Raises:
            ValueError: it cannot be served, and why.
        """
        self._check_name(name, replace)
        ready = self._made(name, read_peft(path))
        with self._lock:
            self._check_name(name, replace)
            self._keep(Served(name, str(path), number), ready)
        return ready

    def add(self, name: str, adapter: PeftAdapter) -> ReadyAdapter:
        """Serve an adapter that is in memory (one that is being trained, say), in place of what has its name."""
        self._check_name(name, replace=True)
        ready = self._made(name, adapter)
        with self._lock:
            self._keep(Served(name, None), ready)
        return ready

    def unload(self, name: str) -> None:
        """Serve it no more. Requests that have it go on."""
        with self._lock:
            if self._served.pop(name, None) is None:
                raise UnknownAdapter(f"there is no adapter {name!r}")
            self._ready.pop(name, None)

    def get(self, name: str) -> ReadyAdapter:
        """The adapter of a name. Raises ValueError where there is none, or its folder has gone bad."""
        with self._lock:
            if (entry := self._served.get(name)) is None:
                raise UnknownAdapter(f"there is no adapter {name!r}")
            if (ready := self._ready.get(name)) is not None:
                self._ready.move_to_end(name)
                return ready
        assert entry.path is not None, "what came from memory stays there"
        ready = self._made(name, read_peft(entry.path))
        with self._lock:
            if self._served.get(name) is entry:
                self._keep(entry, ready)
        return ready

    def of(self, name: str, number: int, path: str, *, replace: bool = False) -> ReadyAdapter:
        """The adapter that a call names by all it knows: loaded, if it is not there yet."""
        entry = self._served.get(name)
        if not replace and entry == Served(name, path, number):
            return self.get(name)
        return self.load(name, path, number=number, replace=True)

    def _check_name(self, name: str, replace: bool) -> None:
        if not self.is_on:
            raise ValueError("adapters are off; start with enable_lora=True (--enable-lora)")
        if not isinstance(name, str) or not name or len(name) > 256:
            raise ValueError(f"adapter name {str(name)[:60]!r}; give a text of up to 256 characters")
        if name in self._served and not replace:
            raise ValueError(f"the adapter {name!r} is loaded already; unload it first, or set load_inplace")

    def _made(self, name: str, adapter: PeftAdapter) -> ReadyAdapter:
        arrays = adapter_arrays(self._targets, adapter, self._max_rank)
        for product, matrices in arrays.items():
            for matrix in (matrices.a, matrices.b):
                if not np.isfinite(matrix.astype(np.float32)).all():
                    raise ValueError(f"the adapter {name!r} has a number that is none (NaN or infinity) in {product}")
        return ReadyAdapter(name, adapter.identity, as_in_slots(self._targets, arrays))

    def _keep(self, entry: Served, ready: ReadyAdapter) -> None:
        self._served[entry.name] = entry
        self._ready[entry.name] = ready
        self._ready.move_to_end(entry.name)
        from_files = [name for name in self._ready if self._served[name].path is not None]
        for name in from_files[: max(0, len(from_files) - self._num_ready)]:
            del self._ready[name]
