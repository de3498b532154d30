"""Single queries over contexts of any length, shared by all cores: segments of keys, then their merging.

Sizes -> LLVM IR of two kernels. `segments`: a part is one segment of one row, for all heads, so that a page is read
from its beginning to its end: memory gives several times as much as when each head reads its own lines of it.
`merge`: a part is a row and a head; the segments' sums are weighted by their maxima (FlashDecoding, Dao et al. 2023) in
the order in which the other tiles do it, so the bits are the same.

Dimension letters: R rows, S segments, K key/value heads, G query heads per key/value head, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.key_lanes import KeyLanes, key_products
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO
from jaxllm.ops.cpu.tile import KEYS, MASKED, SEGMENT, SIZE, Sizes, Tile


def num_segments(s: Sizes) -> int:
    """Of the longest context."""
    return -(-s.pages_per_row * s.page_size // SEGMENT)


def partial_width(s: Sizes) -> int:
    """Float32 numbers that a query head has in a segment's result: weighted values, then maximum and total."""
    return 16 * (-(-s.value_width // 16) + 1)


def segments(s: Sizes, num_rows: int) -> tuple[str, int]:
    """The kernel whose result is `[R, S, K * G, partial_width]`, and its parts; what no row has is not written."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    row, segment = (f.arithmetic(op, part, num_segments(s)) for op in ("udiv", "urem"))
    f.do(f"call void @segment(ptr {buffers}, i64 {row}, i64 0, i64 {segment}, i64 0, i64 {row}, i64 1)")
    return key_products(s) + Segment(s).text() + f.text(), num_rows * num_segments(s)


def merge(s: Sizes, num_rows: int) -> tuple[str, int]:
    """The kernel whose result is `[R, K, G, H]`, and its parts; rows without a context give zeros."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    row, head = (f.arithmetic(op, part, s.heads) for op in ("udiv", "urem"))
    f.do(f"call void @merge(ptr {buffers}, i64 {row}, i64 {head}, i64 0, i64 {s.group}, i64 {row}, i64 1)")
    return Merge(s, "merge").text() + f.text(), num_rows * s.heads


class Segment(KeyLanes):
    """Writes `@segment`; the argument that is a tile's first lane says which segment."""

    def __init__(self, s: Sizes):
        super().__init__(s, "segment", 0)
        self.head_lanes = -(-s.group // self.count) * self.count  # a product does not reach into the next head
        self.most = s.heads * self.head_lanes

    def text(self) -> str:
        """The definition."""
        f, s = self.f, self.s
        kv_len = f.load_index(f.at(self._operand("kv_len"), f.mul(self.row, 4)))
        self.before = f.sub(kv_len, 1)
        segment = f.mul(self.first, SEGMENT)
        self._end = f.smaller(kv_len, f.add(segment, SEGMENT))
        start = f.larger(segment, _first_key(f, s, kv_len))
        with f.when(f.let(f"icmp slt i64 {start}, {self._end}")):
            self._allocate()
            self._each_lane(self._take_lane)
            self.pages = self._operand("pages")
            self.table = f.at(self._operand("table"), f.mul(self.row, 4 * s.pages_per_row))
            self._begin_segment()
            with f.loop(start, self._end, KEYS) as first_key:
                self._attend_block(first_key)
            self._each_lane(self._give_result)
            f.do(f"call void @free(ptr {self.block})")
        return f.text()

    def _each_lane(self, visit: Callable[[Value, Value, Value, Value], None]) -> None:
        f, s = self.f, self.s
        with f.loop(0, s.heads) as head, f.loop(0, s.group) as member:
            lane = f.add(f.mul(head, self.head_lanes), member)
            place = f.add(f.mul(f.add(f.mul(self.row, s.heads), head), s.group), member)
            visit(lane, 0, member, place)

    def _attend_block(self, first_key: Value) -> None:
        with self.f.loop(0, self.s.heads) as self.head:
            if self.s.page_size % 16 == 0:
                self._look_ahead(first_key)
            self._attend_head(first_key, self.f.mul(self.head, self.head_lanes), self.s.group)

    def _look_ahead(self, first_key: Value) -> None:
        """Each head's products ask for its share of the next block, in which the heads of a token lie side by side."""
        f, s = self.f, self.s
        size = SIZE[s.cache] * s.width
        for i in range(KEYS // 16):
            position = f.smaller(f.add(first_key, KEYS + 16 * i), f.sub(self._end, 1))
            for half in range(s.halves):
                first = f.sub(self._index(position, half), self.head)
                start = f.at(self.pages, f.add(f.mul(first, size), f.mul(self.head, 16 * size)))
                f.store("ptr", start, f.at(self.ahead_at[half], 8 * i), 8)

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        f, s = self.f, self.s
        heads = s.heads * s.group
        index = f.add(
            f.mul(f.add(f.mul(self.row, num_segments(s)), self.first), heads), f.sub(place, f.mul(self.row, heads))
        )
        target = f.at(self._operand("out"), f.mul(index, 4 * partial_width(s)))
        for v in range(self.value):
            x = self.lanes.load(f.at(self.out_at, f.add(f.mul(lane, self.value * BYTES), v * BYTES)))
            f.store(VECTOR, x, f.at(target, v * BYTES))
        for i, at in enumerate((self.maximum_at, self.total_at)):
            f.store("float", f.load("float", f.at(at, f.mul(lane, 4))), f.at(target, self.value * BYTES + 4 * i))


class Merge(Tile):
    """Writes `@merge`."""

    def text(self) -> str:
        """The definition."""
        f = self.f
        self.value = -(-self.s.value_width // 16)
        self.result_at, self.sink_at = self._cut([self.value * BYTES, BYTES])
        self.kv_len = f.load_index(f.at(self._operand("kv_len"), f.mul(self.row, 4)))
        self._each_lane(self._give_result)
        f.do(f"call void @free(ptr {self.block})")
        return f.text()

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        f, s, lanes = self.f, self.s, self.lanes
        maximum, total = f.variable(VECTOR, MASKED), f.variable(VECTOR, ZERO)
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.result_at}, i8 0, i64 {self.value * BYTES}, i1 false)")
        first = f.arithmetic("udiv", _first_key(f, s, self.kv_len), SEGMENT)
        with f.loop(first, f.arithmetic("udiv", f.add(self.kv_len, SEGMENT - 1), SEGMENT)) as segment:
            index = f.add(f.mul(f.add(f.mul(self.row, num_segments(s)), segment), s.heads * s.group), member)
            index = f.add(index, f.mul(self.head, s.group))
            source = f.at(self._operand("partial"), f.mul(index, 4 * partial_width(s)))
            theirs = [f.splat("float", f.load("float", f.at(source, self.value * BYTES + 4 * i)), 16) for i in range(2)]
            top, before, now = self._merged(maximum.get(), theirs[0])
            maximum.set(top)
            total.set(self._sum_of_both(total.get(), before, theirs[1], now))
            for v in range(0, self.value * BYTES, BYTES):
                result = f.at(self.result_at, v)
                both = self._sum_of_both(lanes.load(result), before, f.load(VECTOR, f.at(source, v)), now)
                lanes.store(both, result)
        self._scale_result(maximum.get(), total.get(), member, place)

    def _scale_result(self, maximum: str, total: str, member: Value, place: Value) -> None:
        f, width = self.f, self.s.value_width
        self._take_sink(0, member)
        factor = self._last_factor(maximum, total, self.sink_at)
        number = f.let(f"extractelement {VECTOR} {factor}, i64 0")
        target = f.at(self._operand("out"), f.mul(place, 4 * width))
        with f.loop(0, width) as h:
            x = f.load("float", f.at(self.result_at, f.mul(h, 4)))
            f.store("float", f.let(f"fmul float {x}, {number}"), f.at(target, f.mul(h, 4)))


def _first_key(f: Function, s: Sizes, kv_len: Value) -> Value:
    """Of the first block that a context's last token sees."""
    if s.spec.window is None:
        return 0
    return f.mul(f.arithmetic("udiv", f.larger(f.sub(kv_len, s.spec.window), 0), KEYS), KEYS)
