"""Which parameters are kept quantised, and how: what was asked for, or what the checkpoint has.

Configuration and the decoder's parameters as shapes in; parameter path -> `Scheme` out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxllm.checkpoints.quantized import QuantizedTensor
from jaxllm.config.quantization import Activations, Scheme
from jaxllm.families.sources import Part, Source, WeightMap
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import num_parts
from jaxllm.weights.pieces import merged_part

log = logging.getLogger(__name__)

ROUNDED = ("int8", "int4", "fp8")  # what numbers can be rounded to while they are loaded
INT8 = Scheme(codes="int8")
FP8 = Scheme(codes="float8_e4m3fn")
INT4_GROUPS = (128, 64, 32)  # the largest that divides


def int4(group: int) -> Scheme:
    """Symmetric 4-bit integers."""
    return Scheme(codes="uint4", group=group, offset=8, scale_dtype="bfloat16")


@dataclass(frozen=True, slots=True)
class JoinedScheme:
    """A parameter of several parts along one of its dims: where each begins, and how it is kept (None: plain)."""

    axis: int
    runs: tuple[tuple[int, Scheme | None], ...]

    def at(self, start: int) -> Scheme | None:
        """How the part that holds this index is kept."""
        return next(scheme for first, scheme in reversed(self.runs) if first <= start)


def schemes_of(scheme: Scheme | JoinedScheme | None) -> Iterator[Scheme]:
    """Of every quantised part of a parameter."""
    if isinstance(scheme, JoinedScheme):
        yield from (one for _, one in scheme.runs if one is not None)
    elif scheme is not None:
        yield scheme


Schemes = Mapping[tuple, "Scheme | JoinedScheme"]


def checkpoint_schemes(
    sources: WeightMap, state: Any, tensors: Mapping[str, QuantizedTensor]
) -> dict[tuple, Scheme | JoinedScheme]:
    """Every parameter that can be kept as the checkpoint has it; what it has otherwise is expanded, said once."""
    found, expanded = {}, []
    for path, variable in nnx.to_flat_state(state):
        source = sources[path]  # type: ignore[index]  (keys of the state are names and numbers)
        if any(part.name in tensors for part in source.parts):
            scheme = _kept(source, variable.get_metadata("inputs"), tensors, variable.get_value().dtype)
            found |= {} if scheme is None else {path: scheme}
            expanded += [source.parts[0].name] if scheme is None else []
    if expanded:
        log.info("%d quantised tensors are expanded when they are read, %s among them", len(expanded), expanded[0])
    return found


def _kept(
    source: Source, inputs: tuple[int, ...], tensors: Mapping[str, QuantizedTensor], dtype: jnp.dtype
) -> Scheme | JoinedScheme | None:
    """How one parameter is kept; None where its parts do not allow that."""
    if not inputs or source.offset:
        return None
    runs: dict[int, set[Scheme | None]] = {}
    axis = _joining(source, inputs)
    for part in source.parts:
        tensor = tensors.get(part.name)
        runs.setdefault(part.start[axis], set()).add(None if tensor is None else _scheme(part, inputs, tensor, dtype))
    if any(len(schemes) > 1 for schemes in runs.values()):
        names = ", ".join(part.name for part in source.parts[:3])
        raise ValueError(f"tensors {names}, ... of one parameter are quantised in several ways; that is not supported")
    ordered = [(start, next(iter(schemes))) for start, schemes in sorted(runs.items())]
    first = ordered[0][1]
    own = first is not None and (first.is_permuted or (first.activations is not None and first.activations.is_static))
    if all(scheme == first for _, scheme in ordered) and (len(ordered) == 1 or not own):
        return first
    return JoinedScheme(
        axis, tuple(run for i, run in enumerate(ordered) if own or i == 0 or run[1] != ordered[i - 1][1])
    )


def _joining(source: Source, inputs: tuple[int, ...]) -> int:
    """The dim along which the parts of one matrix follow each other."""
    starts = [part.start for part in source.parts]
    kept = range(inputs[-1] + 1, len(starts[0]))
    return next((i for i in kept if any(start[i] != starts[0][i] for start in starts)), len(starts[0]) - 1)


def _scheme(part: Part, inputs: tuple[int, ...], tensor: QuantizedTensor, dtype: jnp.dtype) -> Scheme | None:
    try:
        _, dim = merged_part(part, inputs)
    except ValueError:
        return None
    return narrowed(tensor.scheme, dtype) if dim == tensor.axis else None


def narrowed(scheme: Scheme, dtype: jnp.dtype) -> Scheme:
    """With 16-bit scales and minima of small groups where the matrix is multiplied in 16 bits anyway."""
    if dtype.itemsize > 2 or scheme.codes == "float8_e4m3fn" or not 0 < scheme.group <= 128:
        return scheme
    return replace(scheme, scale_dtype="float16") if scheme.scale_dtype == "float32" else scheme


def asked_schemes(name: str, state: Any, placement: Placement) -> dict[tuple, Scheme]:
    """The blocks' matrices, where quantising at load is asked for; tables, routers and norms stay as they are.

    Raises ValueError naming a matrix whose inputs no group divides.
    """
    if name not in ROUNDED:
        return {}
    paths = ((path, variable) for path, variable in nnx.to_flat_state(state) if path[0] == "layers")
    return {
        path: _asked(name, path, variable, placement) for path, variable in paths if variable.get_metadata("inputs")
    }


def _asked(name: str, path: tuple, variable: Any, placement: Placement) -> Scheme:
    if name != "int4":
        return INT8 if name == "int8" else FP8
    shape, inputs, dims = variable.get_value().shape, variable.get_metadata("inputs"), variable.get_metadata("dims")
    size = math.prod(shape[i] for i in inputs)
    axes = next((axes for i in inputs if (axes := placement.spec(dims, parameter=True)[i])), None)
    parts = num_parts(axes, placement.sizes)
    for group in INT4_GROUPS:
        if size % (parts * group) == 0:
            return int4(group)
    raise ValueError(
        f"{'.'.join(map(str, path))}: its {size} inputs (in {parts} parts) do not divide into groups of "
        f"{' or '.join(map(str, INT4_GROUPS))}; use quantization='int8' or a smaller mesh"
    )


def with_activations(schemes: Schemes, dtype: str) -> Schemes:
    """The same, with activations rounded where matrices are integers and nothing is said of their activations.

    Raises ValueError where that changes nothing.
    """
    if dtype == "auto":
        return schemes
    changed = {path: _with_activations(scheme) for path, scheme in schemes.items()}
    if changed == schemes:
        raise ValueError(
            "activation_dtype='int8' is for matrices of 4-bit or 8-bit integers, and this model has none that multiply "
            "16-bit activations; use auto, or quantization='int4' or 'int8' with it"
        )
    return changed


def _with_activations(scheme: Scheme | JoinedScheme) -> Scheme | JoinedScheme:
    if isinstance(scheme, JoinedScheme):
        runs = tuple((start, one if one is None else _rounding(one)) for start, one in scheme.runs)
        return replace(scheme, runs=runs)
    return _rounding(scheme)


def _rounding(scheme: Scheme) -> Scheme:
    if scheme.activations is not None or scheme.codes == "float8_e4m3fn" or scheme.table:
        return scheme
    return replace(scheme, activations=Activations(codes="int8", by_group=True))
