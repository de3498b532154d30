"""Which parameters are kept quantised, and how: what was asked for, or what the checkpoint has.

Configuration and the decoder's parameters as shapes in; parameter path -> `Scheme` out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import nnx

from jaxllm.config.quantization import Activations, Scheme
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import num_parts

INT8 = Scheme(codes="int8")
FP8 = Scheme(codes="float8_e4m3fn")
INT4_GROUPS = (128, 64, 32)  # the largest that divides


def int4(group: int) -> Scheme:
    """Symmetric 4-bit integers."""
    return Scheme(codes="uint4", group=group, offset=8, scale_dtype="bfloat16")


def asked_schemes(name: str, state: Any, placement: Placement) -> dict[tuple, Scheme]:
    """The blocks' matrices, where quantising at load is asked for; tables, routers and norms stay as they are.

    Raises ValueError naming a matrix whose inputs no group divides.
    """
    if name in ("auto", "none"):
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


def with_activations(schemes: dict[tuple, Scheme], dtype: str) -> dict[tuple, Scheme]:
    """The same, with activations rounded where matrices are integers and nothing is said of their activations.

    Raises ValueError where that changes nothing.
    """
    if dtype == "auto":
        return schemes
    activations = Activations(codes="int8", by_group=True)
    changed = {
        path: dataclasses.replace(scheme, activations=activations)
        for path, scheme in schemes.items()
        if scheme.activations is None and scheme.codes != "float8_e4m3fn" and not scheme.table
    }
    if not changed:
        raise ValueError(
            "activation_dtype='int8' is for matrices of 4-bit or 8-bit integers, and this model has none that multiply "
            "16-bit activations; use auto, or quantization='int4' or 'int8' with it"
        )
    return schemes | changed
