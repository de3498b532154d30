"""A tile whose lanes are keys: for the few queries of a decode, or of a prompt's last tokens.

Sizes -> LLVM IR of `@few`, for up to 16 (query, head of its group) pairs of one head; `key_segments.py` makes of it the
tile of all heads. Sixteen keys at a time are transposed, so that a vector holds one number of each; a query's numbers
are broadcast over them. Work grows with the queries that are there, where `QueryLanes` pays for whole vectors of them.

Every score is summed over H in order, every total and weighted sum over the keys in order, as in `QueryLanes`: the same
bits. That is why totals are summed one key after another.

Dimension letters: Q queries of one product, S keys of a block, H head width, N vectors of a value.
"""

from __future__ import annotations

from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO
from jaxllm.ops.cpu.tile import INTS, KEYS, MASKED, SIZE, Sizes, Tile, prefetch, products, scale

MOST = 16  # lanes of a tile of one head
_VECTORS = KEYS // 16  # of a row of scores
_IOTA = "<" + ", ".join(f"i32 {i}" for i in range(16)) + ">"
_SUMS = 16  # vectors that one product keeps in registers
_PARTS = KEYS // 16  # of a block, each within a page
_TRICKLE = 128  # bytes that a step of a product asks of memory; of more, the processor drops some. Twice that of pairs:
# with half as many steps, what is left for the transposing is too much for it


def few(s: Sizes) -> str:
    """The tile and the two products that it calls."""
    return key_products(s) + Few(s, "few", MOST).text()


def key_products(s: Sizes) -> str:
    """The two products of a tile whose lanes are keys."""
    value, part, count = _counts(s)
    num_bytes = _token_bytes(s)
    steps = s.words // _PARTS, s.key_steps // _PARTS
    scores, weighted = (((n, 16 * num_bytes // n), (0, min(16 * num_bytes // n, _trickle(s)))) for n in steps)
    return products("few_scores", _VECTORS, count, s.words, 1, paired=s.paired, ahead=scores) + products(
        "few_weighted", part, count, KEYS, 1, row=value, scaled_by="rows", paired=s.paired, ahead=weighted
    )


def _trickle(s: Sizes) -> int:
    return 2 * _TRICKLE if s.paired else _TRICKLE


def _token_bytes(s: Sizes) -> int:
    """Of a key or a value."""
    return SIZE[s.cache] * s.width


def _counts(s: Sizes) -> tuple[int, int, int]:
    """Vectors of a value, how many of them one product takes, and for how many lanes."""
    value = -(-s.value_width // 16)
    part = max(n for n in range(1, 6) if value % n == 0)
    return value, part, min(s.group, _SUMS // max(part, _VECTORS))


class KeyLanes(Tile):
    """What tiles with keys as lanes have in common; `most` lanes at a time."""

    def __init__(self, s: Sizes, name: str, most: int):
        super().__init__(s, name)
        self.most = most
        self.value, self.part, self.count = _counts(s)

    def _allocate(self) -> None:
        f, s = self.f, self.s
        lanes = self.most + self.count  # the last product may begin at the last lane
        numbers = BYTES * (-(-lanes // 16) + 1)
        sizes = [BYTES * -(-lanes * s.words // 16), lanes * self.value * BYTES]  # queries, results
        sizes += [s.words * _VECTORS * BYTES, s.key_steps * self.value * BYTES]  # keys, values
        sizes += [lanes * _VECTORS * BYTES, *[numbers] * 5]  # scores; positions, sinks, factors, maxima, totals
        sizes += [BYTES] * 2  # addresses of the next block's keys and values
        places = self._cut(sizes + self._more(lanes, numbers))
        self.query_at, self.out_at, self.key_at, self.value_at, self.score_at = places[:5]
        self.position_at, self.sink_at, self.factor_at, self.maximum_at, self.total_at = places[5:10]
        self.ahead_at, self.more_at = places[10:12], places[12:]
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.query_at}, i8 0, i64 {sizes[0]}, i1 false)")
        for addresses in self.ahead_at:
            for i in range(_PARTS):
                f.store("ptr", self.block, f.at(addresses, 8 * i), 8)

    def _more(self, lanes: int, numbers: int) -> list[int]:
        """Bytes of further places, `more_at`."""
        del lanes, numbers
        return []

    def _query_place(self, lane: Value, h: Value) -> str:
        f, s = self.f, self.s
        return f.at(self.query_at, f.add(f.mul(lane, 4 * s.words), f.mul(h, 2 if s.paired else 4)))

    def _begin_segment(self) -> None:
        f = self.f
        num_bytes = (self.most + self.count) * self.value * BYTES
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.out_at}, i8 0, i64 {num_bytes}, i1 false)")
        for vector in range(0, BYTES * -(-self.most // 16), BYTES):
            self.lanes.store(MASKED, f.at(self.maximum_at, vector))
            self.lanes.store(ZERO, f.at(self.total_at, vector))

    def _attend_head(self, first_key: Value, first_lane: Value, num_lanes: Value) -> None:
        """Up to `KEYS` keys of `self.head`, for some lanes."""
        f, s = self.f, self.s
        num_keys = f.smaller(f.sub(self._end, first_key), KEYS)
        with f.loop(0, num_keys, 16) as c:
            self._transpose(f.add(first_key, c), c)
        self._fetch_values(first_key, num_keys, self.value_at, self.value * BYTES)
        end = f.add(first_lane, num_lanes)
        with f.loop(first_lane, end, self.count) as i:
            f.do(
                f"call void @few_scores(ptr {f.at(self.query_at, f.mul(i, 4 * s.words))}, ptr {self.key_at}, "
                f"ptr {f.at(self.score_at, f.mul(i, 4 * KEYS))}, i64 {s.words}, ptr null, "
                f"ptr {self.ahead_at[0]})"
            )
        with f.loop(first_lane, end) as i:
            self._soften(first_key, i)
        with f.loop(first_lane, end, self.count) as i:
            self._add_up(i, num_keys)

    def _before_value(self, key: Value) -> None:
        self._ask_for_rest(1, key)

    def _ask_for_rest(self, half: int, token: Value) -> None:
        """What the products leave of a token of the next block."""
        num_bytes = _token_bytes(self.s)
        prefetch(self.f, self.ahead_at[half], token, (16, num_bytes), (_trickle(self.s), num_bytes))

    def _transpose(self, position: Value, c: Value) -> None:
        """Sixteen keys into columns c .. c + 15; those beyond the last are hidden later, whatever they hold."""
        f, s = self.f, self.s
        indices = self._indices(position)
        sources = [f.at(self.pages, f.mul(index, SIZE[s.cache] * s.width)) for index in indices]
        scales = self._scales(indices) if s.cache == "i8" else None

        def block(first: Value, count: int) -> None:
            if count == 16:
                tokens = 256 // words  # so that all blocks of these keys ask for sixteen
                for i in range(tokens):
                    self._ask_for_rest(0, f.add(c, f.add(f.mul(f.arithmetic("udiv", first, 16), tokens), i)))
            at = [f.at(source, f.mul(first, 4)) for source in sources]
            rows = [_wide(f, f.load(f"<{count} x i32>", row, SIZE[s.cache]), count) for row in at]
            for i, word in enumerate(transposed(f, rows)[:count]):
                numbers = _numbers(f, s.cache, word)
                for part, x in enumerate(numbers):
                    h = f.add(f.mul(f.add(first, i), len(numbers)), part)
                    target = f.at(self.key_at, f.add(f.mul(h, _VECTORS * BYTES), f.mul(c, 4)))
                    self.lanes.store(self.lanes.mul(x, scales) if scales else x, target)

        per_word = 4 // SIZE[s.cache]
        words = s.width // per_word
        with f.loop(0, words // 16 * 16, 16) as first:
            block(first, 16)
        if words % 16:
            block(words // 16 * 16, words % 16)

    def _indices(self, position: Value) -> list[Value]:
        """Of sixteen keys; a page of a multiple of sixteen tokens is looked up once, others for every key."""
        f, s = self.f, self.s
        if s.page_size % 16 == 0:
            first = self._index(position, 0)
            return [f.add(first, i * s.heads) for i in range(16)]
        last = f.sub(self._end, 1)
        return [self._index(f.smaller(f.add(position, i), last), 0) for i in range(16)]

    def _scales(self, indices: list[Value]) -> str:
        f, base = self.f, self._operand("scales")
        vector = "poison"
        for lane, index in enumerate(indices):
            number = scale(f, f.at(base, f.mul(index, 2)))
            vector = f.let(f"insertelement {VECTOR} {vector}, float {number}, i64 {lane}")
        return vector

    def _soften(self, first_key: Value, lane: Value) -> None:
        """A lane's scores become exponentials; its maximum rises, and what came before is to fade by a factor."""
        f, lanes = self.f, self.lanes
        position = f.splat("i32", f.load("i32", f.at(self.position_at, f.mul(lane, 4))), 16)
        slots = [f.at(self.score_at, f.add(f.mul(lane, 4 * KEYS), BYTES * v)) for v in range(_VECTORS)]
        first = f.splat("i32", f.let(f"trunc i64 {first_key} to i32"), 16)
        scores = []
        for v, slot in enumerate(slots):
            keys = f.let(f"add {INTS} {f.let(f'add {INTS} {first}, {_IOTA}')}, splat (i32 {16 * v})")
            scores.append(self._seen(self._capped(lanes.load(slot)), keys, position))
        top = scores[0]
        for x in scores[1:]:
            top = lanes.maximum(top, x)
        old_at = f.at(self.maximum_at, f.mul(lane, 4))
        old, highest = f.load("float", old_at), f.let(f"call float @llvm.vector.reduce.fmax.v16f32({VECTOR} {top})")
        new = f.let(f"call float @llvm.maxnum.f32(float {old}, float {highest})")
        f.store("float", new, old_at)
        maximum = f.splat("float", new, 16)
        factor = lanes.power(lanes.sub(f.splat("float", old, 16), maximum))
        number = f.let(f"extractelement {VECTOR} {factor}, i64 0")
        f.store("float", number, f.at(self.factor_at, f.mul(lane, 4)))
        for x, slot in zip(scores, slots, strict=True):
            lanes.store(self._weights(x, maximum), slot)

    def _add_up(self, first: Value, num_keys: Value) -> None:
        """Totals and weighted values of the lanes of one product."""
        f = self.f
        weights, totals = f.at(self.score_at, f.mul(first, 4 * KEYS)), f.at(self.total_at, f.mul(first, 4))
        factors = f.at(self.factor_at, f.mul(first, 4))
        faded = [[f.load("float", f.at(place, 4 * i)) for place in (totals, factors)] for i in range(self.count)]
        sums = [f.variable("float", f.let(f"fmul float {total}, {factor}")) for total, factor in faded]
        with f.loop(0, num_keys) as c:
            column = f.at(weights, f.mul(c, 4))
            for i, total in enumerate(sums):
                x = f.load("float", f.at(column, 4 * KEYS * i))
                total.set(f.let(f"fadd float {total.get()}, {x}"))
        for i, total in enumerate(sums):
            f.store("float", total.get(), f.at(totals, 4 * i))
        steps = num_keys
        if self.s.paired:  # rounded where they lie: two neighbours make a pair
            steps = f.arithmetic("udiv", f.add(num_keys, 1), 2)
            for i in range(self.count):
                row = f.at(weights, 4 * KEYS * i)
                halves = [self.lanes.halves(self.lanes.load(f.at(row, BYTES * v))) for v in range(_VECTORS)]
                for v, x in enumerate(halves):
                    f.store("<16 x i16>", x, f.at(row, BYTES // 2 * v), BYTES // 2)
        for n in range(0, self.value, self.part):
            out = f.at(self.out_at, f.add(f.mul(first, self.value * BYTES), n * BYTES))
            listed = f"ptr {weights}, ptr {f.at(self.value_at, n * BYTES)}, ptr {out}, i64 {steps}, ptr {factors}"
            f.do(f"call void @few_weighted({listed}, ptr {self.ahead_at[1]})")


class Few(KeyLanes):
    """Writes `@few`: one head, segment after segment."""

    def _more(self, lanes: int, numbers: int) -> list[int]:
        return [lanes * self.value * BYTES, *[numbers] * 3]  # results, maxima and totals of all segments; factors

    def _begin(self) -> None:
        f = self.f
        self.result_at, self.all_maximum_at, self.all_total_at, self.before_at = self.more_at
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.result_at}, i8 0, i64 {MOST * self.value * BYTES}, i1 false)")
        self.lanes.store(MASKED, self.all_maximum_at)
        self.lanes.store(ZERO, self.all_total_at)

    def _attend_block(self, first_key: Value) -> None:
        self._attend_head(first_key, 0, self.num_lanes)

    def _end_segment(self) -> None:
        f, lanes = self.f, self.lanes
        top, before, now = self._merged(lanes.load(self.all_maximum_at), lanes.load(self.maximum_at))
        lanes.store(top, self.all_maximum_at)
        total = self._sum_of_both(lanes.load(self.all_total_at), before, lanes.load(self.total_at), now)
        lanes.store(total, self.all_total_at)
        lanes.store(before, self.before_at)
        lanes.store(now, self.factor_at)
        with f.loop(0, self.num_lanes) as lane:
            number = f.mul(lane, 4)
            factors = [
                f.splat("float", f.load("float", f.at(at, number)), 16) for at in (self.before_at, self.factor_at)
            ]
            for v in range(self.value):
                place = f.add(f.mul(lane, self.value * BYTES), v * BYTES)
                result, out = f.at(self.result_at, place), f.at(self.out_at, place)
                both = self._sum_of_both(lanes.load(result), factors[0], lanes.load(out), factors[1])
                lanes.store(both, result)

    def _finish(self) -> None:
        lanes = self.lanes
        factor = self._last_factor(lanes.load(self.all_maximum_at), lanes.load(self.all_total_at), self.sink_at)
        lanes.store(factor, self.factor_at)

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        f, width = self.f, self.s.value_width
        target = f.at(self._operand("out"), f.mul(place, 4 * width))
        factor = f.load("float", f.at(self.factor_at, f.mul(lane, 4)))
        source = f.at(self.result_at, f.mul(lane, self.value * BYTES))
        with f.loop(0, width) as h:
            x = f.load("float", f.at(source, f.mul(h, 4)))
            f.store("float", f.let(f"fmul float {x}, {factor}"), f.at(target, f.mul(h, 4)))


def _wide(f: Function, x: str, count: int) -> str:
    """A shorter vector of words as the beginning of one of 16."""
    if count == 16:
        return x
    order = ", ".join(f"i32 {min(i, count - 1)}" for i in range(16))
    return f.let(f"shufflevector <{count} x i32> {x}, <{count} x i32> poison, <16 x i32> <{order}>")


def transposed(f: Function, rows: list[str]) -> list[str]:
    """A square of 16 vectors of words, by four rounds of exchanges between those 8, 4, 2 and 1 apart."""
    rows = list(rows)
    for d in (8, 4, 2, 1):
        low = ", ".join(f"i32 {16 + lane - d if lane & d else lane}" for lane in range(16))
        high = ", ".join(f"i32 {16 + lane if lane & d else lane + d}" for lane in range(16))
        for i in range(16):
            if not i & d:
                pair = f"{INTS} {rows[i]}, {INTS} {rows[i + d]}"
                rows[i], rows[i + d] = (f.let(f"shufflevector {pair}, <16 x i32> <{order}>") for order in (low, high))
    return rows


def _numbers(f: Function, kind: str, words: str) -> list[str]:
    """What products take of 16 words of the cache: pairs as they are, or the float32 numbers of each place."""

    def floats(ints: str) -> str:
        return f.let(f"bitcast {INTS} {ints} to {VECTOR}")

    def shifted(op: str, x: str, bits: int) -> str:
        return f.let(f"{op} {INTS} {x}, splat (i32 {bits})") if bits else x

    if kind in ("float", "i16"):
        return [floats(words)]
    signed = [shifted("ashr", shifted("shl", words, 24 - 8 * part), 24) for part in range(4)]
    return [f.let(f"sitofp {INTS} {x} to {VECTOR}") for x in signed]
