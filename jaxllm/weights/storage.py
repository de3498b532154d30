"""What every way of keeping a parameter has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxllm.weights.boxes import Box


class Storage(Protocol):
    """One way to keep a parameter."""

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> Any:
        """What is kept, as shapes with shardings."""
        ...

    def from_pieces(
        self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding, read: Callable[[Box], Any]
    ) -> Any:
        """What is kept, from a function that reads boxes of the parameter: in its dtype, or `Pieces` of it."""
        ...

    def from_array(self, array: jax.Array, sharding: jax.sharding.NamedSharding) -> Any:
        """What is kept, of a parameter that is there already."""
        ...
