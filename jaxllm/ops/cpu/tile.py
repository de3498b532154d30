"""What the two tiles of the CPU attention kernel share: sizes, products, and whose queries and keys they are.

A tile is one key/value head and some (query, head of its group) pairs, its *lanes*, of one row:
`@NAME(ptr buffers, i64 row, head, first lane, number of lanes, first query, number of queries)`. `query_lanes.py` lays
the lanes along vectors, `key_lanes.py` keys; both do the same arithmetic on each number in the same order, so that a
query's result has the same bits from either. The softmax is online (Milakov & Gimelshein 2018), in powers of two. It
begins anew in every segment of keys, and segments are merged in order: so several cores can take those of one query
(FlashDecoding), and a query's result still does not depend on who did what.

Where the cache is bfloat16, products take two numbers at a time (`vdpbf16ps`, twice as many a cycle): two of a key's
for the scores, and two keys' for the weighted sums, with the exponentials rounded to bfloat16. Queries are then kept as
they came, which is exact for a bfloat16 model, and the scale multiplies the scores.

Dimension letters: L vectors of 16 lanes, S keys of a block, H head width, C tokens per page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.ops.attention.metadata import AttentionSpec
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO, Lanes, constant, literal

KEYS = 64  # of a block
SEGMENT = 512  # keys; short, so that the cores share one query's context evenly, and blocks enough to hide the merging
_LINE = 64  # bytes that memory gives at once
INTS = "<16 x i32>"
MASKED = constant(-1e30)  # finite: differences of two masked scores must not be NaN
LOG2E = math.log2(math.e)
SIZE = {"float": 4, "i16": 2, "i8": 1}
DECLARATIONS = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare ptr @aligned_alloc(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare float @llvm.maxnum.f32(float, float)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Everything static of one kernel.

    Attributes:
        width, value_width: of a key and of a value.
        cache: LLVM's type of a number in the cache: "float", "i16" (bfloat16) or "i8" (int8 with scales).
        operands: names of the buffers in order; the result is the last.
    """

    heads: int
    group: int
    width: int
    value_width: int
    page_size: int
    pages_per_row: int
    cache: str
    spec: AttentionSpec
    operands: tuple[str, ...]

    @property
    def halves(self) -> int:
        """1 where one row of the cache is both key and value."""
        return 1 if self.spec.value_width else 2

    @property
    def paired(self) -> bool:
        """Whether a word of 32 bits holds two numbers, and products take both."""
        return self.cache == "i16"

    @property
    def words(self) -> int:
        """Of 32 bits that a product reads of a key."""
        return self.width // 2 if self.paired else self.width

    @property
    def key_steps(self) -> int:
        """Of the weighted sum of a block."""
        return KEYS // 2 if self.paired else KEYS

    @property
    def factor(self) -> float:
        """What scores are multiplied with before they are seen, in powers of two where no soft-cap comes between."""
        return self.spec.scale / self.spec.softcap if self.spec.softcap else self.spec.scale * LOG2E


def products(
    name: str,
    vectors: int,
    count: int,
    stride: int,
    step: int,
    *,
    row: int | None = None,
    scaled_by: str = "",
    paired: bool = False,
    ahead: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> str:
    """`out[i] = sum_j a[i * stride + j * step] * b[j]` for `count` i, where b and out are rows of vectors.

    Only the first `vectors` of a row's `row` vectors are computed. With `scaled_by` the old `out` is added, times what
    stands at the factors: a vector per place in the row ("columns") or a number per i ("rows"). Numbers of a and b are
    float32, or `paired`: two of bfloat16, both of which are multiplied and added. Arguments: a, b, out, number of j,
    factors. All sums stay in registers, and every sum runs over j in order. With `ahead`, the steps and part of
    `prefetch`, there is a last argument: addresses of what is asked of memory meanwhile.
    """
    f = Function(name, ["ptr", "ptr", "ptr", "i64", "ptr", *["ptr"] * bool(ahead)], "noinline")
    lanes, (a, b, out, length, factors) = Lanes(f), f.args[:5]
    row = row or vectors
    places = [(i, v) for i in range(count) for v in range(vectors)]
    at = {(i, v): f.at(out, (i * row + v) * BYTES) for i, v in places}
    if scaled_by == "columns":
        columns = [lanes.load(f.at(factors, BYTES * v)) for v in range(vectors)]
        first = {(i, v): lanes.mul(lanes.load(at[i, v]), columns[v]) for i, v in places}
    elif scaled_by == "rows":
        numbers = [f.splat("float", f.load("float", f.at(factors, 4 * i)), 16) for i in range(count)]
        first = {(i, v): lanes.mul(lanes.load(at[i, v]), numbers[i]) for i, v in places}
    else:
        first = dict.fromkeys(places, ZERO)
    multiply = lanes.dot if paired else lanes.fma
    sums = {place: f.variable(VECTOR, first[place]) for place in places}
    with f.loop(0, length) as j:
        line = f.at(b, f.mul(j, BYTES * row))
        right = [lanes.load(f.at(line, BYTES * v)) for v in range(vectors)]
        column = f.at(a, f.mul(j, 4 * step))
        if ahead:
            prefetch(f, f.args[5], j, *ahead)
        for i in range(count):
            left = f.splat("float", f.load("float", f.at(column, 4 * stride * i)), 16)
            for v in range(vectors):
                sums[i, v].set(multiply(left, right[v], sums[i, v].get()))
    for place in places:
        lanes.store(sums[place].get(), at[place])
    return f.text()


def prefetch(f: Function, addresses: str, j: Value, steps: tuple[int, int], part: tuple[int, int]) -> None:
    """Ask for part of what a step needs: `steps = (how many of an address, bytes of each)`, `part = (start, end)`.

    Into the second level of cache: the first one takes too few requests at a time.
    """
    count, size = steps
    if not part[0] < part[1]:
        return
    base = f.load("ptr", f.at(addresses, f.mul(f.arithmetic("udiv", j, count), 8)), 8)
    at = f.at(base, f.mul(f.arithmetic("urem", j, count), size))
    for line in range(*part, _LINE):
        f.do(f"call void @llvm.prefetch.p0(ptr {f.at(at, line)}, i32 0, i32 2, i32 1)")


class Tile:
    """Writes the function of one tile; see `QueryLanes` and `KeyLanes`."""

    query_at: str
    position_at: str
    sink_at: str
    block: str

    def __init__(self, s: Sizes, name: str):
        self.s, self.f = s, Function(name, ["ptr", *["i64"] * 6], "noinline")
        self.lanes = Lanes(self.f)
        self.buffers, self.row, self.head, self.first, self.num_lanes, self.q_start, self.q_len = self.f.args

    def text(self) -> str:
        """The definition: queries in, blocks of keys, results out."""
        f, s = self.f, self.s
        self._allocate()
        self.kv_len = f.load_index(f.at(self._operand("kv_len"), f.mul(self.row, 4)))
        self.before = f.sub(self.kv_len, self.q_len)  # position of the row's first query
        self._each_lane(self._take_lane)
        self._begin()
        self.pages = self._operand("pages")
        self.table = f.at(self._operand("table"), f.mul(self.row, 4 * s.pages_per_row))
        start, self._end = self._keys_seen()
        with f.loop(f.mul(f.arithmetic("udiv", start, SEGMENT), SEGMENT), self._end, SEGMENT) as segment:
            self._begin_segment()
            with f.loop(f.larger(segment, start), f.smaller(f.add(segment, SEGMENT), self._end), KEYS) as first_key:
                self._attend_block(first_key)
            self._end_segment()
        self._finish()
        self._each_lane(self._give_result)
        f.do(f"call void @free(ptr {self.block})")
        return f.text()

    def _allocate(self) -> None:
        """Memory of the tile."""
        raise NotImplementedError

    def _query_place(self, lane: Value, h: Value) -> str:
        """Where number h of a lane's query is kept."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Before the first segment."""

    def _begin_segment(self) -> None:
        """Nothing seen yet."""
        raise NotImplementedError

    def _end_segment(self) -> None:
        """Merge it with those before it."""
        raise NotImplementedError

    def _attend_block(self, first_key: Value) -> None:
        """Up to `KEYS` keys from `first_key` on."""
        raise NotImplementedError

    def _finish(self) -> None:
        """After the last segment."""
        raise NotImplementedError

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        """One lane's outputs."""
        raise NotImplementedError

    def _cut(self, sizes: list[int]) -> list[str]:
        """One block of memory cut into places of so many bytes."""
        self.block = self.f.let(f"call ptr @aligned_alloc(i64 {BYTES}, i64 {sum(sizes)})")
        return [self.f.at(self.block, sum(sizes[:i])) for i in range(len(sizes))]

    def _operand(self, name: str) -> str:
        return self.f.load("ptr", self.f.at(self.buffers, 8 * self.s.operands.index(name)), 8)

    def _each_lane(self, visit: Callable[[Value, Value, Value, Value], None]) -> None:
        """Calls visit(lane, the row's query, member of the group, place among all queries' heads)."""
        f, s = self.f, self.s
        with f.loop(0, self.num_lanes) as lane:
            index = f.add(self.first, lane)
            query, member = f.arithmetic("udiv", index, s.group), f.arithmetic("urem", index, s.group)
            token_head = f.add(f.mul(f.add(self.q_start, query), s.heads), self.head)
            visit(lane, query, member, f.add(f.mul(token_head, s.group), member))

    def _keys_seen(self) -> tuple[Value, Value]:
        """First (a multiple of a block) and end of the keys that some lane sees."""
        f, group, window = self.f, self.s.group, self.s.spec.window
        last = f.arithmetic("udiv", f.add(self.first, f.sub(self.num_lanes, 1)), group)
        end = f.smaller(f.add(f.add(self.before, last), 1), self.kv_len)
        if window is None:
            return 0, end
        lowest = f.add(self.before, f.arithmetic("udiv", self.first, group))
        start = f.larger(f.sub(lowest, window - 1), 0)
        return f.mul(f.arithmetic("udiv", start, KEYS), KEYS), end

    def _take_lane(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        """A lane's query, position and sink."""
        f, s = self.f, self.s
        source = f.at(self._operand("q"), f.mul(place, 4 * s.width))
        with f.loop(0, s.width) as h:
            x = f.load("float", f.at(source, f.mul(h, 4)))
            if s.paired:
                f.store("bfloat", f.let(f"fptrunc float {x} to bfloat"), self._query_place(lane, h), 2)
            else:
                f.store("float", f.let(f"fmul float {x}, {literal(s.factor)}"), self._query_place(lane, h))
        position = f.let(f"trunc i64 {f.add(self.before, query)} to i32")
        f.store("i32", position, f.at(self.position_at, f.mul(lane, 4)))
        self._take_sink(lane, member)

    def _take_sink(self, lane: Value, member: Value) -> None:
        f, s = self.f, self.s
        if "sinks" in s.operands:
            index = f.add(f.mul(self.head, s.group), member)
            sink = f.load("float", f.at(self._operand("sinks"), f.mul(index, 4)))
            f.store("float", f.let(f"fmul float {sink}, {literal(LOG2E)}"), f.at(self.sink_at, f.mul(lane, 4)))

    def _capped(self, scores: str) -> str:
        """Scores in powers of two, with a soft-cap."""
        lanes, spec = self.lanes, self.s.spec
        if self.s.paired:
            scores = lanes.mul(scores, constant(self.s.factor))
        return lanes.mul(lanes.tanh(scores), constant(spec.softcap * LOG2E)) if spec.softcap else scores

    def _seen(self, scores: str, keys: str, positions: str) -> str:
        """Scores, and `MASKED` where the key is out of sight; keys and positions are int32 vectors."""
        f, lanes, spec = self.f, self.lanes, self.s.spec
        sees = f.let(f"icmp sle {INTS} {keys}, {positions}")
        if spec.window is not None:
            edge = f.let(f"sub {INTS} {positions}, splat (i32 {spec.window})")
            sees = f.let(f"and <16 x i1> {sees}, {f.let(f'icmp sgt {INTS} {keys}, {edge}')}")
        return lanes.select(sees, scores, MASKED)

    def _weights(self, scores: str, maxima: str) -> str:
        """Exponentials; 0 for what is out of sight."""
        lanes = self.lanes
        return lanes.select(lanes.equal(scores, MASKED), ZERO, self._powers(scores, maxima))

    def _powers(self, scores: str, maxima: str) -> str:
        degree = 4 if self.s.paired else 7  # pairs are rounded to 2e-3 afterwards
        return self.lanes.power(self.lanes.sub(scores, maxima), degree)

    def _merged(self, maximum: str, other: str) -> tuple[str, str, str]:
        """The maximum of two parts, and what the totals and weighted sums of each are to be multiplied with."""
        lanes = self.lanes
        top = lanes.maximum(maximum, other)
        return top, lanes.power(lanes.sub(maximum, top)), lanes.power(lanes.sub(other, top))

    def _sum_of_both(self, x: str, factor: str, y: str, other_factor: str) -> str:
        """`x * factor + y * other_factor`."""
        lanes = self.lanes
        return lanes.add(lanes.mul(x, factor), lanes.mul(y, other_factor))

    def _last_factor(self, maximum: str, total: str, sink_at: str) -> str:
        """What the weighted sums are to be multiplied with: 0 where nothing was seen."""
        lanes = self.lanes
        scale = constant(1.0)
        if "sinks" in self.s.operands:
            sink = lanes.load(sink_at)
            top = lanes.maximum(maximum, sink)
            scale = lanes.power(lanes.sub(maximum, top))
            total = lanes.add(lanes.mul(total, scale), lanes.power(lanes.sub(sink, top)))
        return lanes.select(lanes.equal(total, ZERO), ZERO, lanes.div(scale, total))

    def _index(self, position: Value, half: int) -> Value:
        """Which row of the cache, counted in heads, a token's key (half 0) or value (1) is."""
        f, s = self.f, self.s
        page = f.load_index(f.at(self.table, f.mul(f.arithmetic("udiv", position, s.page_size), 4)))
        offset = f.arithmetic("urem", position, s.page_size)
        token = f.add(f.mul(f.add(f.mul(page, s.halves), half), s.page_size), offset)
        return f.add(f.mul(token, s.heads), self.head)

    def _fetch(self, position: Value, half: int, target: str, width: int) -> None:
        """The first numbers of one token's key or value from its page, as float32."""
        f, s = self.f, self.s
        index = self._index(position, half)
        source = f.at(self.pages, f.mul(index, SIZE[s.cache] * s.width))
        scale = f.at(self._operand("scales"), f.mul(index, 2)) if s.cache == "i8" else None
        copy_as_float(f, s.cache, source, target, width, scale)

    def _fetch_values(self, first_key: Value, num_keys: Value, target: str, stride: int) -> None:
        """A block's values, each key's (or two keys', number by number) in a row of so many bytes."""
        f, s = self.f, self.s
        if not s.paired:
            with f.loop(0, num_keys) as c:
                self._before_value(c)
                self._fetch(f.add(first_key, c), s.halves - 1, f.at(target, f.mul(c, stride)), s.value_width)
            return
        with f.loop(0, num_keys, 2) as c:
            self._before_value(c)
            self._before_value(f.add(c, 1))
            place = f.at(target, f.mul(f.arithmetic("udiv", c, 2), stride))
            self._fetch_two(f.add(first_key, c), s.halves - 1, place, s.value_width)

    def _before_value(self, key: Value) -> None:
        """Before a key's value of a block is fetched."""

    def _fetch_two(self, position: Value, half: int, target: str, width: int) -> None:
        """Of an even position and the next one; zeros in place of the next where there is none."""
        f, s = self.f, self.s
        index, last = self._index(position, half), f.sub(self._end, 1)
        following = f.smaller(f.add(position, 1), last)
        other = f.add(index, s.heads) if s.page_size % 2 == 0 else self._index(following, half)
        exists = f.let(f"sext i1 {f.let(f'icmp slt i64 {position}, {last}')} to i32")
        sources = [f.at(self.pages, f.mul(i, 2 * s.width)) for i in (index, other)]
        count = math.gcd(width, 16)
        words, mask = f"<{count} x i32>", f.splat("i32", exists, count)
        for i in range(0, width, count):
            low, high = (f.load(f"<{count} x i16>", f.at(source, 2 * i), 2) for source in sources)
            low, high = (f.let(f"zext <{count} x i16> {x} to {words}") for x in (low, high))
            high = f.let(f"shl {words} {f.let(f'and {words} {high}, {mask}')}, splat (i32 16)")
            f.store(words, f.let(f"or {words} {low}, {high}"), f.at(target, 4 * i))


def copy_as_float(f: Function, kind: str, source: str, target: str, width: int, scale_at: str | None) -> None:
    """Numbers of the cache, times their scale where they have one."""
    count = math.gcd(width, 16)
    scales = scale_at and f.splat("float", scale(f, scale_at), count)
    for i in range(0, width, count):
        x = as_floats(f, kind, f.at(source, i * SIZE[kind]), count)
        if scales is not None:
            x = f.let(f"fmul <{count} x float> {x}, {scales}")
        f.store(f"<{count} x float>", x, f.at(target, 4 * i))


def as_floats(f: Function, kind: str, source: str, count: int) -> str:
    """So many numbers of the cache as a vector of float32, without their scale."""
    floats = f"<{count} x float>"
    x = f.load(f"<{count} x {kind}>", source, SIZE[kind])
    if kind == "i16":
        return widened(f, f"<{count} x i32>", floats, x)
    return f.let(f"sitofp <{count} x i8> {x} to {floats}") if kind == "i8" else x


def scale(f: Function, pointer: str) -> str:
    """A bfloat16 number as float32."""
    return widened(f, "i32", "float", f.load("i16", pointer, 2))


def widened(f: Function, integer: str, number: str, bits: str) -> str:
    """bfloat16 -> float32: its bits are the upper half."""
    sixteen = "splat (i32 16)" if integer.startswith("<") else "16"
    wide = f.let(f"zext {integer.replace('i32', 'i16')} {bits} to {integer}")
    return f.let(f"bitcast {integer} {f.let(f'shl {integer} {wide}, {sixteen}')} to {number}")
