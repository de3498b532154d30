"""Products of rows with low-rank matrices of their own: `y + (x A_s) B_s`, with another s in every row.

Rows come in groups of up to six of one slot (`RowsBySlot`), so that the matrices of a slot are read once for a group,
and those of a slot without rows not at all. One call does both products: its first parts make `h = x A_s`, 4 of A's
rows at a time, which lie interleaved, 32 inputs of each by turns, so that they are read as one stream; the others add
`h B_s` to panels of y's columns, where B lies as `jaxllm.ops.cpu.packed` has its matrices, all slots of a panel one
after the other. Where the matrix itself lies in such panels, its product is part of the same call, and y is in the
core's own cache when B's turn comes. bfloat16 throughout, accumulated in float32, in one order for each row whatever
stands beside it.

Dimension letters: T rows, S slots, P modules, R rank, K inputs, N outputs, B panels, C columns of a panel; A's blocks
are D, and I and J the inputs' two parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, DOT, PAIRS, VECTOR, ZERO
from jaxllm.ops.cpu.packed import DECLARATIONS, PANEL, multiply_panel, pack, row_functions, share

_ROWS = 6  # of one slot at a time: with 4 of A's rows 24 sums, of 32 registers
LANES = 32  # bfloat16 numbers of a register
_AHEAD = 4096  # bytes to prefetch ahead
_PREFETCH = "call void @llvm.prefetch.p0(ptr {}, i32 0, i32 3, i32 1)"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RowsBySlot:
    """Which rows have which slot, in groups of up to six rows of one slot; rows without a slot are in none.

    Attributes:
        order: int32 `[T]`, the rows' numbers, sorted by their slot.
        groups: int32 `[G, 3]`: slot (from 0 on), first row in the order and number of rows of each group.
        count: int32 `[1]`, how many groups there are; those beyond it are empty.
    """

    order: jax.Array
    groups: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, slot_T: jax.Array, num_slots: int) -> RowsBySlot:
        """Of each row's slot: 0 (none) to S. The groups of a slot are as even as can be."""
        starts = jnp.sum(slot_T[None, :] < jnp.arange(1, num_slots + 2)[:, None], axis=1, dtype=jnp.int32)
        begin, rows = starts[:-1], jnp.diff(starts)
        per_slot = -(-rows // _ROWS)
        ends = jnp.cumsum(per_slot, dtype=jnp.int32)
        number = jnp.arange(slot_T.shape[0] // _ROWS + min(slot_T.shape[0], num_slots), dtype=jnp.int32)
        slot = jnp.minimum(jnp.sum(ends[None, :] <= number[:, None], axis=1, dtype=jnp.int32), num_slots - 1)
        nth, parts = number - (ends - per_slot)[slot], jnp.maximum(per_slot[slot], 1)
        first, end = (rows[slot] * n // parts for n in (nth, nth + 1))
        size = jnp.where(number < ends[-1], end - first, 0)
        order = jnp.argsort(slot_T, stable=True).astype(jnp.int32)
        return cls(order, jnp.stack([slot, begin[slot] + first, size], axis=1), ends[-1:])


@dataclass(frozen=True, slots=True)
class LowRankSizes:
    """Everything static of one kernel.

    Attributes:
        module_of: the number of each panel's module.
        is_alone: y is given and added to; else the matrix is, and y is made.
    """

    rows: int
    inputs: int
    slots: int
    modules: int
    rank: int
    module_of: tuple[int, ...]
    is_alone: bool

    @property
    def panels(self) -> int:
        """Of y's columns."""
        return len(self.module_of)

    @property
    def block(self) -> int:
        """Rows of A at a time."""
        return block_of(self.rank)

    @property
    def blocks(self) -> int:
        """Of a slot's A."""
        return self.modules * self.rank // self.block


def takes(inputs: int, outputs: int, rank: int, dtype: np.dtype) -> bool:
    """Whether the kernel multiplies with such matrices."""
    return dtype == jnp.bfloat16 and rank % 2 == 0 and inputs % LANES == 0 and outputs % PANEL == 0


def block_of(rank: int) -> int:
    """Rows of A that lie interleaved."""
    return math.gcd(rank, 4)


def pack_a(a_PRK: np.ndarray) -> np.ndarray:
    """`[D, I, 4, J]` of one adapter's A: blocks of rows (2 where the rank does not divide by 4), interleaved."""
    modules, rank, k = a_PRK.shape
    block = block_of(rank)
    rows = a_PRK.reshape(modules * rank // block, block, k // LANES, LANES)
    return np.ascontiguousarray(rows.swapaxes(1, 2))


def unpack_a(a_DIRJ: np.ndarray, rank: int) -> np.ndarray:
    """`[P, R, K]`: the reverse."""
    blocks, steps, block, lanes = a_DIRJ.shape
    return a_DIRJ.swapaxes(1, 2).reshape(blocks * block // rank, rank, steps * lanes)


def pack_b(b_RN: np.ndarray) -> np.ndarray:
    """uint32 panels `[B, R/2, C]` of one adapter's B."""
    return pack(b_RN, (0,))


def unpack_b(panels_BRC: np.ndarray) -> np.ndarray:
    """bfloat16 `[R, N]`: the reverse."""
    num_panels, half, columns = panels_BRC.shape
    numbers = panels_BRC.view(jnp.bfloat16).reshape(num_panels, half, columns, 2)
    return numbers.transpose(1, 3, 0, 2).reshape(2 * half, num_panels * columns)


def add_low_rank(
    y_TN: jax.Array,
    x_TK: jax.Array,
    a_SDIRJ: jax.Array,
    b_BSRC: jax.Array,
    rows: RowsBySlot,
    module_of: tuple[int, ...],
) -> jax.Array:
    """`y + (x A_s) B_s`, float32 `[T, N]`, written over y; rows of slot 0 stay as they are.

    Args:
        y_TN: float32.
        x_TK: rounded to bfloat16.
        a_SDIRJ: bfloat16, see `pack_a`.
        b_BSRC: uint32, see `pack_b`.
        rows: their slots.
        module_of: the number of each panel's module.
    """
    return _call(x_TK, a_SDIRJ, b_BSRC, rows, module_of, y_TN)


def product_and_low_rank(
    x_TK: jax.Array,
    panels_BKC: jax.Array,
    a_SDIRJ: jax.Array,
    b_BSRC: jax.Array,
    rows: RowsBySlot,
    module_of: tuple[int, ...],
) -> jax.Array:
    """`x W + (x A_s) B_s`, float32 `[T, N]`, of a matrix in panels; see `add_low_rank`."""
    return _call(x_TK, a_SDIRJ, b_BSRC, rows, module_of, panels_BKC)


def _call(
    x_TK: jax.Array, a: jax.Array, b: jax.Array, rows: RowsBySlot, module_of: tuple[int, ...], last: jax.Array
) -> jax.Array:
    (slots, blocks, *_, block, _), (_, k), rank = a.shape, x_TK.shape, 2 * b.shape[2]
    modules = blocks * block // rank
    sizes = LowRankSizes(x_TK.shape[0], k, slots, modules, rank, module_of, is_alone=last.ndim == 2)
    y = jax.ShapeDtypeStruct((sizes.rows, PANEL * sizes.panels), jnp.float32)
    h = jax.ShapeDtypeStruct((sizes.rows, modules * rank), jnp.bfloat16)
    operands = (x_TK.astype(jnp.bfloat16), a, b, rows.order, rows.groups, rows.count, last)
    aliases = {len(operands) - 1: 0} if sizes.is_alone else {}
    return jax.ffi.ffi_call(_target(sizes), (y, h), input_output_aliases=aliases)(*operands)[0]


@functools.cache  # every layer's trace asks again
def _target(s: LowRankSizes) -> str:
    num_first, num_parts = 2 * ffi.num_threads(), min(s.panels, 4 * ffi.num_threads())
    return ffi.register(_kernel(s, num_first, num_parts), num_first + num_parts, 7, num_results=2, num_first=num_first)


def _kernel(s: LowRankSizes, num_first: int, num_parts: int) -> str:
    names = ("x", "a", "b", "order", "groups", "count", "last", "y", "h")
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    at = {name: f.load("ptr", f.at(buffers, 8 * i), 8) for i, name in enumerate(names)}
    is_first, is_later = (f.let(f"icmp {test} i64 {part}, {num_first}") for test in ("slt", "sge"))
    with f.when(is_first):
        _narrow_share(f, s, at, *share(f, part, num_first, f.mul(f.load_index(at["count"]), s.blocks)))
    with f.when(is_later), f.loop(*share(f, f.sub(part, num_first), num_parts, s.panels)) as panel:
        if not s.is_alone:
            b = f.at(at["b"], f.mul(panel, 2 * PANEL * s.rank * s.slots))
            multiply_panel(f, (s.rows, s.inputs, s.panels), at["x"], at["last"], at["y"], panel, then=b)
        _widen_panel(f, s, at, panel)
    most = min(_ROWS, s.rows)
    parts = [make(s, count) for make in (_narrow, _widen) for count in range(1, most + 1)]
    modules = f"@modules = internal constant [{s.panels} x i32] [{', '.join(f'i32 {m}' for m in s.module_of)}]\n"
    base = "" if s.is_alone else row_functions(s.rows, s.inputs, s.panels)
    return DECLARATIONS + modules + base + "".join(parts) + f.text()


def _narrow_share(f: Function, s: LowRankSizes, at: dict[str, str], first: Value, end: Value) -> None:
    """Some of the times that a group meets a block of A: group by group, block by block."""
    with f.loop(first, end) as unit:
        group, block = f.arithmetic("udiv", unit, s.blocks), f.arithmetic("urem", unit, s.blocks)

        def operands(slot: Value) -> tuple[str, str, str]:
            a = f.at(at["a"], f.mul(f.add(f.mul(slot, s.blocks), block), 2 * s.block * s.inputs))
            return at["x"], a, f.at(at["h"], f.mul(block, 2 * s.block))

        _on_group(f, s, "narrow", at, group, operands)


def _widen_panel(f: Function, s: LowRankSizes, at: dict[str, str], panel: Value) -> None:
    """Every row's own in one panel of y."""
    module = f.load_index(f.at("@modules", f.mul(panel, 4)))
    h, y = f.at(at["h"], f.mul(module, 2 * s.rank)), f.at(at["y"], f.mul(panel, 4 * PANEL))
    size = 2 * PANEL * s.rank
    b_panel = f.at(at["b"], f.mul(panel, size * s.slots))
    with f.loop(0, f.load_index(at["count"])) as group:
        _on_group(f, s, "widen", at, group, lambda slot: (y, f.at(b_panel, f.mul(slot, size)), h))


def _on_group(
    f: Function,
    s: LowRankSizes,
    name: str,
    at: dict[str, str],
    group: Value,
    operands: Callable[[Value], tuple[str, str, str]],
) -> None:
    """Call the function for as many rows as a group has; operands are x or y, the slot's matrix, and h."""
    entry = f.at(at["groups"], f.mul(group, 12))
    slot, row, size = (f.load_index(f.at(entry, 4 * i)) for i in range(3))
    wide, matrix, h = operands(slot)
    order, h = f.at(at["order"], f.mul(row, 4)), f.at(h, f.mul(row, 2 * s.modules * s.rank))
    for rows in range(1, min(_ROWS, s.rows) + 1):
        with f.when(f.let(f"icmp eq i64 {size}, {rows}")):
            f.do(f"call void @{name}{rows}(ptr {order}, ptr {wide}, ptr {matrix}, ptr {h})")


def _narrow(s: LowRankSizes, count: int) -> str:
    """So many rows of x times a block of A's rows. Arguments: the rows' numbers, x, the block, h."""
    f = Function(f"narrow{count}", ["ptr"] * 4, "noinline")
    order, x, a, h = f.args
    rows = [f.at(x, f.mul(f.load_index(f.at(order, 4 * i)), 2 * s.inputs)) for i in range(count)]
    sums = {(i, r): f.variable(VECTOR, ZERO) for i in range(count) for r in range(s.block)}
    with f.loop(0, s.inputs // LANES) as step:
        near = [f.at(a, f.add(f.mul(step, 2 * LANES * s.block), 2 * LANES * r)) for r in range(s.block)]
        matrix = [f.load(PAIRS, place, 2 * LANES) for place in near]
        for place in near:
            f.do(_PREFETCH.format(f.at(place, _AHEAD)))
        for i in range(count):
            numbers = f.load(PAIRS, f.at(rows[i], f.mul(step, 2 * LANES)), 2 * LANES)
            for r in range(s.block):
                sums[i, r].set(_dot(f, sums[i, r].get(), numbers, matrix[r]))
    for i in range(count):
        total = _totals(f, [sums[i, r].get() for r in range(s.block)])
        narrow = f.let(f"fptrunc <{s.block} x float> {total} to <{s.block} x bfloat>")
        f.store(f"<{s.block} x bfloat>", narrow, f.at(h, 2 * s.modules * s.rank * i), 2)
    return f.text()


def _widen(s: LowRankSizes, count: int) -> str:
    """So many rows of h times a slot's panel of B, added to y's. Arguments: the rows' numbers, y, the panel, h."""
    f = Function(f"widen{count}", ["ptr"] * 4, "noinline")
    order, y, b, h = f.args
    rows = [f.at(y, f.mul(f.load_index(f.at(order, 4 * i)), 4 * PANEL * s.panels)) for i in range(count)]
    places = {(i, half): f.at(rows[i], BYTES * half) for i in range(count) for half in (0, 1)}
    sums = {place: f.variable(VECTOR, f.load(VECTOR, pointer, BYTES)) for place, pointer in places.items()}
    with f.loop(0, s.rank // 2) as pair:
        near = [f.at(b, f.add(f.mul(pair, 2 * BYTES), BYTES * half)) for half in (0, 1)]
        matrix = [f.load(PAIRS, place, BYTES) for place in near]
        for place in near:
            f.do(_PREFETCH.format(f.at(place, _AHEAD)))
        for i in range(count):
            column = f.at(h, f.add(f.mul(pair, 4), 2 * s.modules * s.rank * i))
            both = f.splat("i32", f.load("i32", column), 16)
            numbers = f.let(f"bitcast <16 x i32> {both} to {PAIRS}")
            for half in (0, 1):
                sums[i, half].set(_dot(f, sums[i, half].get(), numbers, matrix[half]))
    for place, total in sums.items():
        f.store(VECTOR, total.get(), places[place], BYTES)
    return f.text()


def _dot(f: Function, total: str, x: str, y: str) -> str:
    return f.let(f"call {VECTOR} @{DOT}({VECTOR} {total}, {PAIRS} {x}, {PAIRS} {y})")


def _totals(f: Function, vectors: list[str]) -> str:
    """The sum of each of 2 or 4 vectors' numbers, as one small vector: pairs of them are folded into each other."""
    width = 1  # numbers of one vector that lie side by side
    while len(vectors) > 1:
        masks = [[], []]
        for lane in range(0, 16, 4):
            for half in (0, 1):
                near = [lane + 2 * half + i for i in (0, 1)]
                masks[half] += [near[0], 16 + near[0], near[1], 16 + near[1]] if width == 1 else [*near, *_far(near)]
        vectors = [_folded(f, (x, y), masks, 16) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
        width *= 2
    (total,), size = vectors, 16
    while size > width:
        size //= 2
        total = _folded(f, (total, "poison"), [list(range(size)), list(range(size, 2 * size))], 2 * size)
    return total


def _far(lanes: list[int]) -> list[int]:
    return [16 + lane for lane in lanes]


def _folded(f: Function, pair: tuple[str, str], masks: list[list[int]], size: int) -> str:
    """The sum of two choices from a pair's lanes."""
    kind, (x, y) = f"<{size} x float>", pair
    chosen = []
    for mask in masks:
        lanes = ", ".join(f"i32 {lane}" for lane in mask)
        chosen.append(f.let(f"shufflevector {kind} {x}, {kind} {y}, <{len(mask)} x i32> <{lanes}>"))
    return f.let(f"fadd <{len(masks[0])} x float> {chosen[0]}, {chosen[1]}")
