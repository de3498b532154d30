"""Which parameters of the decoder take an adapter, and how a module's two matrices lie in them.

A family's weight map says of which checkpoint modules a parameter is made (queries, keys and values of one `qkv`, say);
from the same boxes follow the places of the low-rank matrices, in both directions. Data and NumPy only.

Dimension letters: P modules of a parameter, R rank, I inputs of a module, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxllm.families.sources import Part, WeightMap
from jaxllm.families.text_half import text_name

Matrices = Mapping[str, tuple[np.ndarray, np.ndarray]]  # module -> A [R, I], B [O, R]


@dataclass(frozen=True)
class Target:
    """One parameter that takes an adapter.

    Its matrices are `a [P, R, *dims that products sum over]` and `b [R, *dims that they keep]`. Where it is made of
    several modules, these lie one after the other along one kept dim.

    Attributes:
        name: as products are named, `layers.0.attention.qkv`.
        shape, dims, dtype: of the parameter.
        contracted: its dims that products sum over.
        parts: the boxes that it is made of.
        in_panels: the processor's own kernels multiply here, and may have the matrices of slots as they want them.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: np.dtype
    contracted: tuple[int, ...]
    parts: tuple[Part, ...]
    in_panels: bool = False

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of its modules in the checkpoint, each once."""
        return tuple(dict.fromkeys(part.name.removesuffix(".weight") for part in self.parts))

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Its dims that products keep."""
        return tuple(i for i in range(len(self.shape)) if i not in self.contracted)

    @cached_property
    def stacked(self) -> int | None:
        """Which of the kept dims the modules lie along; None where there is one module."""
        if len(self.modules) == 1:
            return None
        starts = zip(*(part.start for part in self.parts), strict=True)
        return self.kept.index(next(i for i, where in enumerate(starts) if len(set(where)) > 1))

    @cached_property
    def module_of(self) -> tuple[int, ...]:
        """For each index of the stacked dim, the number of its module."""
        if self.stacked is None:
            return ()
        dim, numbers = self.kept[self.stacked], {}
        for part in self.parts:
            first = part.start[dim]
            for i in range(first, first + part.box_shape[dim]):
                numbers[i] = self.modules.index(part.name.removesuffix(".weight"))
        return tuple(numbers[i] for i in range(self.shape[dim]))

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of `a` and `b`."""
        inputs, outputs = (tuple(self.shape[i] for i in dims) for dims in (self.contracted, self.kept))
        return (len(self.modules), rank, *inputs), (rank, *outputs)

    def sizes(self, module: str) -> tuple[int, int]:
        """Inputs and outputs of one of its modules."""
        part = next(part for part in self.parts if part.name == f"{module}.weight")
        inputs = self._input_dim(part)
        return part.shape[inputs], part.shape[1 - inputs]

    def from_modules(self, matrices: Matrices, rank: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """`a` and `b` of the modules given; others, and what lies beyond a module's rank, are zeros."""
        a, b = (np.zeros(shape, dtype) for shape in self.shapes(rank))
        for number, module in enumerate(self.modules):
            if module not in matrices:
                continue
            a_RI, b_OR = matrices[module]
            size = a_RI.shape[0]
            for part in self._parts_of(module):
                inputs, kept = self._axes(part)
                a[number, :size] = a_RI.reshape(size, *inputs.sizes).transpose(0, *_order(inputs.targets))
                rows = b_OR[slice(*part.rows) if part.rows else slice(None)]
                box = rows.T.reshape(size, *kept.sizes).transpose(0, *_order(kept.targets))
                b[(slice(0, size), *self._box(part))] = self._repeated(part, box)
        return a, b

    def to_modules(self, a: np.ndarray, b: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The reverse: A `[R, I]` and B `[O, R]` of every module."""
        rank, found = b.shape[0], {}
        for number, module in enumerate(self.modules):
            size_in, size_out = self.sizes(module)
            b_OR = np.zeros((size_out, rank), b.dtype)
            a_RI = np.zeros((rank, size_in), a.dtype)
            for part in self._parts_of(module):
                inputs, kept = self._axes(part)
                a_RI = a[number].transpose(0, *_back(inputs.targets)).reshape(rank, size_in)
                box = self._once(part, b[(slice(None), *self._box(part))])
                rows = box.transpose(0, *_back(kept.targets)).reshape(rank, -1)
                b_OR[slice(*part.rows) if part.rows else slice(None)] = rows.T
            found[module] = (a_RI, b_OR)
        return found

    def _parts_of(self, module: str) -> Iterator[Part]:
        return (part for part in self.parts if part.name == f"{module}.weight")

    def _input_dim(self, part: Part) -> int:
        """Which dim of a module's matrix the products sum over: the second, or GPT-2's first."""
        return int(part.order.index(0) not in self.contracted)

    def _axes(self, part: Part) -> tuple[_Axes, _Axes]:
        """Those that the products sum over, and those that they keep."""
        summed = [axis for axis in range(len(part.view)) if part.order.index(axis) in self.contracted]
        return _Axes.of(part, summed), _Axes.of(part, [i for i in range(len(part.view)) if i not in summed])

    def _box(self, part: Part) -> tuple[slice, ...]:
        return tuple(slice(part.start[i], part.start[i] + part.box_shape[i]) for i in self.kept)

    def _repeated(self, part: Part, box: np.ndarray) -> np.ndarray:
        if part.repeat is None:
            return box
        return np.repeat(box, part.repeat[1], axis=1 + self.kept.index(part.repeat[0]))

    def _once(self, part: Part, box: np.ndarray) -> np.ndarray:
        if part.repeat is None:
            return box
        index = (slice(None),) * (1 + self.kept.index(part.repeat[0]))
        return box[(*index, slice(None, None, part.repeat[1]))]


@dataclass(frozen=True, slots=True)
class _Axes:
    """Some dims of a part's view, in its order: their sizes, and the parameter's dims that they become."""

    sizes: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, part: Part, axes: Sequence[int]) -> _Axes:
        return cls(tuple(part.view[i] for i in axes), tuple(part.order.index(i) for i in axes))


def _order(targets: Sequence[int]) -> list[int]:
    """The dims of a view, after a leading one, in the order in which the parameter has them."""
    return [int(i) + 1 for i in np.argsort(targets)]


def _back(targets: Sequence[int]) -> list[int]:
    """The inverse permutation."""
    return [int(i) + 1 for i in np.argsort(np.argsort(targets))]


def targets_of(sources: WeightMap, parameters: Mapping[Any, Any], *, in_panels: bool = False) -> dict[str, Target]:
    """Every parameter of the blocks that products sum over, by name.

    Args:
        sources: the family's weight map for the placement.
        parameters: the variables of the decoder by path, with metadata `dims` and `contracted`.
        in_panels: see `Target`.
    """
    found = {}
    for path, variable in parameters.items():
        contracted = variable.get_metadata("contracted") or ()
        if path[0] != "layers" or not contracted:
            continue
        value = variable.get_value()
        name = ".".join(map(str, path))
        found[name] = Target(
            name,
            tuple(value.shape),
            tuple(variable.get_metadata("dims")),
            np.dtype(value.dtype),
            tuple(contracted),
            sources[path].parts,
            in_panels,
        )
    return found


def place(targets: Mapping[str, Target], modules: Mapping[str, tuple[int, int, int]]) -> dict[str, str]:
    """The checkpoint's name of each module of an adapter.

    Args:
        targets: the decoder's.
        modules: rank, inputs and outputs of every module, as the adapter names it.

    Raises:
        ValueError: a module that the model lacks or that takes no adapter here, or a shape that does not fit.
    """
    sizes = {module: target.sizes(module) for target in targets.values() for module in target.modules}
    names = {}
    for theirs, (rank, size_in, size_out) in modules.items():
        ours = _known_name(theirs, sizes)
        if ours is None:
            raise ValueError(f"the adapter changes {theirs}, which takes no adapter here; {_takers(sizes, theirs)}")
        if sizes[ours] != (size_in, size_out):
            raise ValueError(
                f"the adapter's {theirs} has lora_A {[rank, size_in]} and lora_B {[size_out, rank]}; the model's has "
                f"{sizes[ours][0]} inputs and {sizes[ours][1]} outputs"
            )
        names[theirs] = ours
    return names


def _known_name(module: str, known: Mapping[str, Any]) -> str | None:
    """A module under the name of its family's checkpoints: with or without the prefix, or of a model that also sees."""
    of_text = (text_name(f"{module}.weight") or "").removesuffix(".weight")
    prefixes = {name.split(".")[0] for name in known}
    candidates = (module, of_text, *(f"{prefix}.{module}" for prefix in prefixes))
    return next((name for name in candidates if name in known), None)


def _takers(known: Mapping[str, Any], module: str) -> str:
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
    experts = " (experts do not)" if "expert" in module else ""
    return f"those that do are {kinds}{experts}"


def num_elements(targets: Mapping[str, Target], rank: int) -> int:
    """Numbers of one adapter."""
    return sum(math.prod(shape) for target in targets.values() for shape in target.shapes(rank))
