"""Ragged paged attention for NVIDIA GPUs: a Pallas kernel lowered through Triton.

Flat queries, pages, rows -> flat outputs, equal to `xla.ragged_paged_attention`. One kernel body serves two calls: rows
of one query, their keys split over several programs and merged by log-sum-exp (FlashDecoding, Dao et al. 2023), and
tiles of rows with many queries. A program owns one key/value head and up to `tile` (query, head of its group) pairs,
so the heads of a group share every load; its softmax is online (FlashAttention, Dao et al. 2022), in powers of two.
Grids are static; a program without work exits at once. A latent row (`value_width`) is read once, for scores and
values. Knows nothing of what is not a multiple of 16 wide: `unsupported` says so beforehand.

Dimension letters: T tokens, R rows, I work items, Z splits of the keys, K key/value heads, G query heads per
key/value head, H head width, P pages, C tokens per page, M pages per row, X (query, head) pairs of a program,
S keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxllm.ops.attention.kv import split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows

_MASKED = -1e30  # finite: differences of two masked scores must not be NaN
_LOG2E = math.log2(math.e)
_MIN_WIDTH = 16  # of a matrix product's every side
_PROGRAMS_WANTED = 1024  # several for each processor of a large GPU, also where half of the rows are idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes of one program: (query, head) pairs, keys of a block, warps, and blocks in flight."""

    pairs: int
    keys: int
    warps: int
    stages: int


def decode_tiling(group: int, width: int, itemsize: int) -> Tiling:
    """Memory-bound: few pairs, many keys in flight."""
    if itemsize > 2:  # exact float32 products run outside the matrix units: what matters is that it fits
        return Tiling(pairs=_MIN_WIDTH, keys=_MIN_WIDTH, warps=4, stages=2)
    pairs = min(max(_MIN_WIDTH, pl.next_power_of_2(group)), 64 if width <= 256 else 32)
    keys = max(_MIN_WIDTH, min(64, (1 << 15) // (pl.next_power_of_2(width) * itemsize)))
    return Tiling(pairs=pairs, keys=keys, warps=4 if width <= 256 else 8, stages=3 if width <= 256 else 2)


def prefill_tiling(group: int, width: int, itemsize: int) -> Tiling:
    """Compute-bound: as many pairs as the accumulators' registers allow."""
    if itemsize > 2:
        return Tiling(pairs=2 * _MIN_WIDTH, keys=_MIN_WIDTH, warps=8, stages=2)
    keys = max(_MIN_WIDTH, min(64, (1 << 15) // (pl.next_power_of_2(width) * itemsize)))
    return Tiling(pairs=64 if width <= 256 else 32, keys=keys, warps=4 if width <= 128 else 8, stages=2)


def unsupported(pages: Any, spec: AttentionSpec) -> str | None:
    """Why this kernel cannot take a layer, or None."""
    values, _ = split_pages(pages)
    width, value_width = values.shape[-1], spec.value_width or values.shape[-1]
    if width % _MIN_WIDTH or value_width % _MIN_WIDTH:
        return f"head widths {width} and {value_width} are not multiples of {_MIN_WIDTH}"
    if values.dtype.itemsize == 1 and 2**31 < values.size <= 2**32:
        return "an 8-bit layer of 2 to 4 GiB, whose offsets JAX counts in 32 bits with a sign"
    if spec.value_width is not None and value_width not in (sum(w for _, w in _parts(width)[:n]) for n in range(1, 9)):
        return f"value width {value_width} does not end at a power-of-two part of {width}"
    return None


def attention(
    q_TKGH: jax.Array,
    pages: Any,
    rows: RaggedRows | SingleRows,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    interpret: bool = False,
    decode: Tiling | None = None,
    prefill: Tiling | None = None,
) -> jax.Array:
    """As `xla.ragged_paged_attention` (or, for `SingleRows`, `xla.single_query_attention`).

    Args:
        interpret: run the kernel's own operations through XLA, on any backend: slow, for tests.
        decode, prefill: sizes, where the defaults are not wanted.
    """
    call = _Call.of(q_TKGH, pages, spec, sinks_KG, interpret)
    if isinstance(rows, SingleRows):
        return call.singles(rows, decode).astype(q_TKGH.dtype)
    num_tokens, num_rows = q_TKGH.shape[0], rows.q_len.shape[0]
    some = min(num_rows, num_tokens)
    kv_len = jnp.where(jnp.arange(some) < rows.num_single, rows.kv_len[:some], 0)
    singles = call.first(some).singles(SingleRows(kv_len, rows.page_table[:some]), decode)
    base = jnp.pad(singles, ((0, num_tokens - some), (0, 0), (0, 0), (0, 0)))
    return call.tiles(base, rows, prefill).astype(q_TKGH.dtype)


def _parts(width: int) -> tuple[tuple[int, int], ...]:
    """Cut a width into powers of two, largest first: `(start, width)` each. Triton's arrays have no other sizes."""
    parts, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        parts.append((start, size))
        start += size
    return tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Static:
    """What the kernel is compiled for. `group` heads of a key/value head's `chunks * group` share one program."""

    spec: AttentionSpec
    tiling: Tiling
    group: int
    chunks: int
    num_kv_heads: int
    splits: int
    page_size: int
    parts: tuple[tuple[int, int], ...]
    value_parts: tuple[tuple[int, int], ...]
    dtype: Any
    interpret: bool

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.chunks * self.group

    @property
    def queries(self) -> int:
        """Queries of one program."""
        return self.tiling.pairs // self.group

    def dot(self, x: jax.Array, y: jax.Array, over: int) -> jax.Array:
        """Matrix product over the last dim of `x` and dim `over` of `y`, accumulated in float32."""
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        dims = (((1,), (over,)), ((), ()))
        return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer's arguments, made ready for the kernel."""

    q: jax.Array
    pages: Any
    sinks: jax.Array | None
    spec: AttentionSpec
    interpret: bool

    @classmethod
    def of(cls, q_TKGH: jax.Array, pages: Any, spec: AttentionSpec, sinks: Any, interpret: bool) -> _Call:
        values, scales = split_pages(pages)
        dtype = values.dtype if scales is None else jnp.dtype(jnp.bfloat16)  # holds every 8-bit number exactly
        return cls(q_TKGH.astype(dtype), pages, sinks, spec, interpret)

    def first(self, num_tokens: int) -> _Call:
        """The same for the first tokens."""
        return dataclasses.replace(self, q=self.q[:num_tokens])

    def singles(self, rows: SingleRows, tiling: Tiling | None) -> jax.Array:
        """`[R, K, G, H]`, zeros for idle rows."""
        num_rows = self.q.shape[0]
        static = self._static(tiling or decode_tiling(*self._sizes()), 1)
        heads = self.q.shape[1] * static.chunks
        blocks = -(-rows.page_table.shape[1] * static.page_size // static.tiling.keys)
        splits = pl.next_power_of_2(max(1, min(_PROGRAMS_WANTED // (num_rows * heads), blocks, 32)))
        static = dataclasses.replace(static, splits=splits)
        row = jnp.arange(num_rows, dtype=jnp.int32)
        active = rows.kv_len > 0
        facts = jnp.stack([row, row, active.astype(jnp.int32), rows.kv_len], axis=1)
        out = self._run(static, facts, rows.page_table, None)
        if splits > 1:
            return self._merge(static, active, *out)
        return jnp.where(active[:, None, None, None], out, 0)

    def tiles(self, base: jax.Array, rows: RaggedRows, tiling: Tiling | None) -> jax.Array:
        """Write the outputs of rows with many queries into `base`, which holds those of the others."""
        num_tokens, num_rows = self.q.shape[0], rows.q_len.shape[0]
        static = self._static(tiling or prefill_tiling(*self._sizes()), 1)
        tile = static.queries
        tiles = jnp.where(jnp.arange(num_rows) < rows.num_single, 0, -(-rows.q_len // tile))
        ends = jnp.cumsum(tiles)
        item = jnp.arange(min(num_tokens, num_tokens // tile + min(num_rows, num_tokens)), dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(ends <= item[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
        offset = (item - (ends - tiles)[row]) * tile
        count = jnp.where(item < ends[-1], jnp.minimum(tile, rows.q_len[row] - offset), 0)
        sees = rows.kv_len[row] - rows.q_len[row] + offset + 1
        facts = jnp.stack([row, rows.q_start[row] + offset, count, sees], axis=1)
        return self._run(static, facts.astype(jnp.int32), rows.page_table, base)

    def _sizes(self) -> tuple[int, int, int]:
        return self.q.shape[2], self.q.shape[3], self.q.dtype.itemsize

    def _static(self, tiling: Tiling, splits: int) -> _Static:
        width, whole = self.q.shape[3], self.q.shape[2]
        group = max(g for g in range(1, min(whole, tiling.pairs) + 1) if whole % g == 0)
        values, _ = split_pages(self.pages)
        return _Static(
            spec=self.spec,
            tiling=tiling,
            group=group,
            chunks=whole // group,
            splits=splits,
            num_kv_heads=self.q.shape[1],
            page_size=values.shape[-3],
            parts=_parts(width),
            value_parts=_parts(self.spec.value_width or width),
            dtype=self.q.dtype,
            interpret=self.interpret,
        )

    def _run(self, static: _Static, facts: jax.Array, table: jax.Array, base: jax.Array | None) -> Any:
        """Launch. Returns outputs like `q`, or with several splits their maxima, sums and weighted values."""
        values, scales = split_pages(self.pages)
        (num, k, g, h), wide = self.q.shape, sum(static.value_parts[-1])
        rows = math.prod(values.shape[:3])  # the kernel sees matrices: one row is one token's keys, or values
        named = {"facts": facts, "table": table, "q": self.q.reshape(-1, h), "values": values.reshape(rows, -1)}
        optional = {"scales": (scales, (-1,)), "sinks": (self.sinks, (-1,)), "base": (base, (-1, wide))}
        named |= {name: array.reshape(shape) for name, (array, shape) in optional.items() if array is not None}
        count, z = num * k * g, static.splits
        if z == 1:
            shapes: Any = [jax.ShapeDtypeStruct((count, wide), self.q.dtype)]
        else:
            shapes = [
                jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((z * count,), (z * count,), (z * count, wide))
            ]
        out = pl.pallas_call(
            functools.partial(_kernel, tuple(named), static),
            out_shape=shapes,
            grid=(facts.shape[0], static.splits, k * static.chunks),
            input_output_aliases={} if base is None else {len(named) - 1: 0},
            compiler_params=plgpu.CompilerParams(num_warps=static.tiling.warps, num_stages=static.tiling.stages),
            interpret=self.interpret,
            name="ragged_paged_attention",
        )(*named.values())
        if z == 1:
            return out[0].reshape(num, k, g, wide)
        return out

    def _merge(self, static: _Static, active: jax.Array, *partial: jax.Array) -> jax.Array:
        """Join the splits, in one kernel: `[Z * R * K * G]` maxima and sums, `[Z * R * K * G, H]` values."""
        (num, k, g, _), wide = self.q.shape, sum(static.value_parts[-1])
        (out,) = pl.pallas_call(
            functools.partial(_merge_kernel, static),
            out_shape=[jax.ShapeDtypeStruct((num * k * g, wide), self.q.dtype)],
            grid=(num, k * g),
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=self.interpret,
            name="merge_splits",
        )(active.astype(jnp.int32), *partial)
        return out.reshape(num, k, g, wide)


def _merge_kernel(c: _Static, active: Any, top: Any, total: Any, values: Any, out: Any) -> None:
    """One program: a head of a row."""
    row, at = pl.program_id(0), pl.program_id(0) * c.num_heads + pl.program_id(1)
    from_Z = jnp.arange(c.splits, dtype=jnp.int32) * (top.shape[0] // c.splits) + at
    is_active = active[row] > 0
    top_Z = plgpu.load(top.at[from_Z], mask=jnp.broadcast_to(is_active, from_Z.shape), other=0.0)
    weight_Z = jnp.exp2(top_Z - jnp.max(top_Z))
    sum_Z = plgpu.load(total.at[from_Z], mask=jnp.broadcast_to(is_active, from_Z.shape), other=1.0)
    weight_Z = weight_Z / jnp.sum(weight_Z * sum_Z)
    for start, width in c.value_parts:
        columns = start + jnp.arange(width, dtype=jnp.int32)
        mask = jnp.broadcast_to(is_active, (c.splits, width))
        part = plgpu.load(values.at[from_Z[:, None], columns[None, :]], mask=mask, other=0.0)
        merged = jnp.sum(part * weight_Z[:, None], axis=0)
        plgpu.store(out.at[jnp.full((width,), at), columns], merged.astype(out.dtype))


def _rectangle(rows: jax.Array, part: tuple[int, int], column: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Index of some rows and a run of columns of a matrix. Pallas wants slices alone or arrays alone."""
    start, width = part
    return rows[:, None], (column + start + jnp.arange(width, dtype=jnp.int32))[None, :]


def _kernel(names: tuple[str, ...], c: _Static, *refs: Any) -> None:
    """One program: an item, a split of its keys, a head (or a chunk of its group)."""
    inputs, outputs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    item = pl.num_programs(0) - 1 - pl.program_id(0)  # the last tiles of a row see most keys: they begin first
    split, head, count = pl.program_id(1), pl.program_id(2), inputs["facts"][item, 2]

    @pl.when(count > 0)
    def _() -> None:
        tile = _Tile.of(inputs, c, item, split, head)
        begin, end = _blocks_of_split(tile, c)
        state = _start(tile, c)
        if c.spec.window is None:  # blocks that every query sees whole need no mask
            whole = jnp.clip(tile.sees // c.tiling.keys, begin, end)
            state = jax.lax.fori_loop(begin, whole, functools.partial(_attend_block, tile, c, False), state)
            begin = whole
        state = jax.lax.fori_loop(begin, end, functools.partial(_attend_block, tile, c, True), state)
        _store(tile, c, outputs, state)


@dataclass(frozen=True, slots=True)
class _Tile:
    """A program's place in the arrays, and its queries."""

    inputs: dict[str, Any]
    split: jax.Array
    row: jax.Array
    count: jax.Array  # queries
    sees: jax.Array  # keys that the first query sees, its own included
    token_X: jax.Array
    kv_head: jax.Array
    head_X: jax.Array
    is_real_X: jax.Array
    nth_X: jax.Array  # which query of the tile
    q_parts: tuple[jax.Array, ...]  # `[X, width]`

    @classmethod
    def of(cls, inputs: dict[str, Any], c: _Static, item: jax.Array, split: jax.Array, head: jax.Array) -> _Tile:
        row, start, count, sees = (inputs["facts"][item, n] for n in range(4))
        pair_X = jnp.arange(c.tiling.pairs, dtype=jnp.int32)
        kv_head, chunk = head // c.chunks, head % c.chunks
        nth_X, is_real_X = pair_X // c.group, pair_X < count * c.group
        head_X = (kv_head * c.chunks + chunk) * c.group + pair_X % c.group
        tile = cls(inputs, split, row, count, sees, start + nth_X, kv_head, head_X, is_real_X, nth_X, ())
        at, from_X = inputs["q"].at, (start + nth_X) * c.num_heads + head_X
        q_parts = [plgpu.load(at[_rectangle(from_X, part)], mask=is_real_X[:, None], other=0.0) for part in c.parts]
        return dataclasses.replace(tile, q_parts=tuple(q_parts))


def _blocks_of_split(tile: _Tile, c: _Static) -> tuple[jax.Array, jax.Array]:
    """First block of keys of this program, and the one after its last."""
    size = c.tiling.keys
    first = 0 if c.spec.window is None else jnp.maximum(tile.sees - c.spec.window, 0) // size
    last = pl.cdiv(tile.sees + tile.count - 1, size)
    if c.splits == 1:
        return jnp.int32(first), last
    share = pl.cdiv(last - first, c.splits)
    begin = jnp.minimum(first + tile.split * share, last)
    return begin, jnp.minimum(begin + share, last)


def _start(tile: _Tile, c: _Static) -> Any:
    """The empty softmax: maximum, sum, weighted values. A sink is a key without a value."""
    top, total = jnp.full((c.tiling.pairs,), _MASKED, jnp.float32), jnp.zeros((c.tiling.pairs,), jnp.float32)
    if (sinks := tile.inputs.get("sinks")) is not None:
        mine = tile.is_real_X & (tile.split == 0)
        sink = plgpu.load(sinks.at[tile.head_X], mask=mine, other=0.0).astype(jnp.float32)
        top, total = jnp.where(mine, sink * _LOG2E, top), jnp.where(mine, 1.0, total)
    return top, total, tuple(jnp.zeros((c.tiling.pairs, w), jnp.float32) for _, w in c.value_parts)


def _attend_block(tile: _Tile, c: _Static, masked: bool, j: jax.Array, state: Any) -> Any:
    """Take one block of keys into the softmax."""
    position_S = j * c.tiling.keys + jnp.arange(c.tiling.keys, dtype=jnp.int32)
    block = _Block.of(tile, c, j)
    keys = [block.load(0, part) for part in c.parts]
    s_XS = functools.reduce(jnp.add, [c.dot(q, key, 1) for q, key in zip(tile.q_parts, keys, strict=True)])
    seen_XS = _seen(tile, c, position_S) if masked else None
    s_XS, factor = _scores(c, block, s_XS, seen_XS)

    top, total, values = state
    new_top = jnp.maximum(top, jnp.max(s_XS, axis=1) * factor)
    p_XS, keep = _exponentials(s_XS, factor, new_top, c.interpret), jnp.exp2(top - new_top)
    total = total * keep + jnp.sum(p_XS, axis=1)
    half = 0 if c.spec.value_width is not None else 1
    loaded = keys if half == 0 else [block.load(1, part) for part in c.value_parts]
    scale_S = block.scales(half)
    if seen_XS is not None:  # what nobody sees may be anything, and 0 times NaN is NaN
        is_seen_S = jnp.max(jnp.where(seen_XS & tile.is_real_X[:, None], 1, 0), axis=0) > 0
        loaded = [jnp.where(is_seen_S[:, None], value, 0.0).astype(c.dtype) for value in loaded]
        scale_S = None if scale_S is None else jnp.where(is_seen_S, scale_S, 0.0)
    if scale_S is not None:
        p_XS = p_XS * scale_S[None, :]
    p_XS = p_XS.astype(c.dtype)
    new = [value * keep[:, None] + c.dot(p_XS, v, 0) for value, v in zip(values, loaded, strict=False)]
    return new_top, total, tuple(new)


def _seen(tile: _Tile, c: _Static, position_S: jax.Array) -> jax.Array:
    """Which queries see which keys."""
    sees_X = tile.sees + tile.nth_X
    seen_XS = position_S[None, :] < sees_X[:, None]
    if c.spec.window is not None:
        seen_XS &= position_S[None, :] >= (sees_X - c.spec.window)[:, None]
    return seen_XS


def _scores(c: _Static, block: _Block, s_XS: jax.Array, seen_XS: jax.Array | None) -> tuple[jax.Array, float]:
    """Soft-capped and masked (None: all are seen), and the factor that makes exponents of two of them."""
    if (scale_S := block.scales(0)) is not None:
        s_XS = s_XS * scale_S[None, :]
    factor = c.spec.scale * _LOG2E
    if (cap := c.spec.softcap) is not None:
        s_XS, factor = jnp.tanh(s_XS * (c.spec.scale / cap)), cap * _LOG2E
    return (s_XS if seen_XS is None else jnp.where(seen_XS, s_XS, _MASKED)), factor


def _exponentials(s_XS: jax.Array, factor: float, top_X: jax.Array, interpret: bool) -> jax.Array:
    """`exp2(s * factor - top)` in two instructions for each number; as plain operations it takes the compiler six."""
    if interpret:
        return jnp.exp2(s_XS * factor - top_X[:, None])
    number = np.float32(factor).view(np.uint32)
    minus_top_XS = jnp.broadcast_to(-top_X[:, None], s_XS.shape)
    (out,) = plgpu.elementwise_inline_asm(
        f"{{.reg .f32 t; fma.rn.ftz.f32 t, $1, 0f{number:08X}, $2; ex2.approx.ftz.f32 $0, t;}}",
        args=[s_XS, minus_top_XS],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(s_XS.shape, jnp.float32)],
    )
    return out


@dataclass(frozen=True, slots=True)
class _Block:
    """Where the keys and values of one block lie: a row of the cache is one token's keys, or its values."""

    tile: _Tile
    c: _Static
    key_S: jax.Array  # row of each position's keys; its values lie one page size further

    @classmethod
    def of(cls, tile: _Tile, c: _Static, j: jax.Array) -> _Block:
        """What lies beyond the row's end is read too, from whatever page the table names, and masked later."""
        table, size = tile.inputs["table"], c.tiling.keys
        position_S = j * size + jnp.arange(size, dtype=jnp.int32)
        halves = 2 if c.spec.value_width is None else 1
        if c.page_size % size == 0:  # the block lies in one page
            page = table[tile.row, j * size // c.page_size]
        else:
            page = plgpu.load(table.at[tile.row, jnp.minimum(position_S // c.page_size, table.shape[1] - 1)])
        return cls(tile, c, page * (halves * c.page_size) + position_S % c.page_size)

    def load(self, half: int, part: tuple[int, int]) -> jax.Array:
        """`[S, width]` of the keys (half 0) or the values (half 1)."""
        column = self.tile.kv_head * sum(self.c.parts[-1])
        at = self.tile.inputs["values"].at[_rectangle(self.key_S + half * self.c.page_size, part, column)]
        return plgpu.load(at).astype(self.c.dtype)

    def scales(self, half: int) -> jax.Array | None:
        """`[S]` of a quantised cache."""
        if "scales" not in self.tile.inputs:
            return None
        row_S = self.key_S + half * self.c.page_size
        at = self.tile.inputs["scales"].at[row_S * self.c.num_kv_heads + self.tile.kv_head]
        return plgpu.load(at).astype(jnp.float32)


def _store(tile: _Tile, c: _Static, outputs: Any, state: Any) -> None:
    """Normalised outputs, or this split's maximum, sum and weighted values."""
    top, total, values = state
    at_X = tile.token_X * c.num_heads + tile.head_X
    if c.splits == 1:
        values = [value / jnp.maximum(total, 1e-30)[:, None] for value in values]
    else:
        at_X = tile.split * (outputs[0].shape[0] // c.splits) + at_X
        plgpu.store(outputs[0].at[at_X], top, mask=tile.is_real_X)
        plgpu.store(outputs[1].at[at_X], total, mask=tile.is_real_X)
    out = outputs[-1]
    for part, value in zip(c.value_parts, values, strict=True):
        plgpu.store(out.at[_rectangle(at_X, part)], value.astype(out.dtype), mask=tile.is_real_X[:, None])
