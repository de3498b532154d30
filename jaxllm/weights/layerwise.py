"""A checkpoint's decoder over a text, one block at a time: memory for one block's matrices and all hidden states.

Token ids in, hidden states after each block out, in float32 and without a cache; what each product was given can be
looked at. Knows nothing of what is done with it.

Dimension letters: S spans, T tokens, D model width, K inputs of a product, M routed rows, E experts, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.checkpoints import Checkpoint
from jaxllm.families import family_of, read_config
from jaxllm.families.sources import Read
from jaxllm.models.decoder import Context, Decoder
from jaxllm.models.primitives import contract
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.attention.packed import packed_attention
from jaxllm.ops.moe import grouped_product
from jaxllm.ops.rope import rope_tables
from jaxllm.weights.loader import read_values

_BATCH = 2048  # tokens that go through a block together, or one span
_FLOAT32 = jnp.dtype(jnp.float32)
Values = Mapping[tuple, jax.Array]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one product was given: rows `[T, K]`; with experts `[M, K]`, sorted by expert, and each expert's count."""

    rows: jax.Array
    sizes_E: jax.Array | None


jax.tree_util.register_dataclass(Inputs)


class LayerwiseDecoder:
    """The decoder of a checkpoint.

    Args:
        checkpoint: of tensors; quantised ones are read as numbers.
        span: tokens that are attended together.
    """

    def __init__(self, checkpoint: Checkpoint, span: int):
        self.checkpoint, self.span = checkpoint, span
        self.cfg = read_config(checkpoint.config)
        self.sources: Mapping[Any, Any] = family_of(checkpoint.config).weight_map(self.cfg, 1)
        self._decoder = nnx.eval_shape(lambda: Decoder(self.cfg, dtype=_FLOAT32))
        self._shapes = dict(nnx.to_flat_state(nnx.state(self._decoder)))
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        for path, value in self._read(lambda path: path[0] != "layers").items():
            holder: Any = functools.reduce(getattr, path, self._decoder)
            holder.set_value(value)

    def batches(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Token ids `[S, T]` as flat batches of whole spans, all of one length; a last one that is shorter is left."""
        spans = max(1, min(len(tokens), _BATCH // self.span))
        for first in range(0, len(tokens) - spans + 1, spans):
            yield tokens[first : first + spans].reshape(-1)

    def embedded(self, tokens_T: np.ndarray) -> np.ndarray:
        """What the first block gets, `[T, D]`."""
        return np.asarray(self._decoder.embed(jnp.asarray(tokens_T), self._positions(len(tokens_T)), _FLOAT32))

    def logits(self, x_TD: Any) -> jax.Array:
        """float32 `[T, V]` of what the last block gave."""
        return self._decoder.logits(jnp.asarray(x_TD), lambda x, *dims: x)

    def inputs(self, path: tuple) -> tuple[int, ...]:
        """The dims of a parameter that its linear takes in; none where it is no linear."""
        return self._shapes[path].get_metadata("inputs")

    def block(self, layer: int, read: Read | None = None) -> Values:
        """One block's parameters, by their paths below the block; `read` instead of the checkpoint's own."""
        values = self._read(lambda path: path[:2] == ("layers", layer), read)
        return {path[2:]: value for path, value in values.items()}

    def run(self, layer: int, values: Values, x_TD: Any) -> tuple[np.ndarray, dict[tuple, Inputs]]:
        """What the block gives, `[T, D]`, and what its products were given, by their parameters' paths."""
        like = next(i for i in range(layer + 1) if self._kind(i) == self._kind(layer))
        key = (like, x_TD.shape)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(functools.partial(self._run, like))
        out, seen = self._compiled[key](dict(values), x_TD)
        return np.asarray(out), seen

    def _read(self, wanted: Callable[[tuple], bool], read: Read | None = None) -> dict[tuple, jax.Array]:
        found = {}
        for path, variable in self._shapes.items():
            if wanted(path):
                value = read_values(self.sources[path], variable.get_value(), self.checkpoint, read)
                found[path] = jnp.asarray(value)
        return found

    def _positions(self, count: int) -> jax.Array:
        return jnp.arange(count, dtype=jnp.int32) % self.span

    def _kind(self, layer: int) -> tuple:
        """Layers of one kind are one program with other parameters."""
        cfg = self.cfg
        return cfg.window(layer), cfg.rope(layer), cfg.is_routed(layer), cfg.score_scale(layer)

    def _run(
        self, layer: int, values: dict[tuple, jax.Array], x_TD: jax.Array
    ) -> tuple[jax.Array, dict[tuple, Inputs]]:
        block: Any = self._decoder.layers[layer]
        graph, state = nnx.split(block)
        filled = [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)]
        seen: dict[tuple, Inputs] = {}
        rope = self.cfg.rope(layer)
        tables = rope and rope_tables(self._positions(x_TD.shape[0]), rope, self.span)
        out = nnx.merge(graph, nnx.from_flat_state(filled))(x_TD, tables, self._context(seen))
        return out, seen

    def _context(self, seen: dict[tuple, Inputs]) -> Context:
        def attend(
            layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array, spec: AttentionSpec, sinks_KG: jax.Array | None
        ) -> jax.Array:
            return packed_attention(q_TKGH, kv_TK2H, None, span=self.span, spec=spec, sinks_KG=sinks_KG)

        def product(name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
            seen[_path(name)] = Inputs(x.reshape(x.shape[0], -1), None)
            return contract(spec, x, weight)

        def experts_product(name: str, spec: str, x_MD: jax.Array, weight: Any, sizes_E: jax.Array) -> jax.Array:
            seen[_path(name)] = Inputs(x_MD, sizes_E)
            return grouped_product(spec, x_MD, weight, sizes_E)

        return Context(
            attend,
            lambda x, *dims: x,
            lambda function, in_dims, out_dims: function,
            _FLOAT32,
            longest=self.span,
            product=product,
            experts_product=experts_product,
        )


def _path(name: str) -> tuple:
    """`layers.3.ffn.shared.down` below its block."""
    return tuple(name.split(".")[2:])
