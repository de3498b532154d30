"""A tile whose lanes are (query, head of its group) pairs: a prompt's queries fill them.

Sizes -> LLVM IR of `@tile{L}`. Keys and values come 64 at a time into a buffer, as float32 or pairs of bfloat16; a
score is a sum of products with broadcast numbers of the key, so nothing is summed across lanes.

Dimension letters: L vectors of 16 lanes, S keys of a block, H head width.
"""

from __future__ import annotations

import math

from jaxllm.ops.cpu.ir import Value
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO
from jaxllm.ops.cpu.tile import INTS, KEYS, MASKED, Sizes, Tile, products


def tile(s: Sizes, vectors: int) -> str:
    """The function and the two products that it calls."""
    keys = 4  # so that the sums of one call fill half of the registers
    dims = math.gcd(s.value_width, keys)
    value_row = s.width if s.halves == 1 and not s.paired else s.value_width
    return (
        products(f"scores{vectors}", vectors, keys, s.words, 1, paired=s.paired)
        + products(f"weighted{vectors}", vectors, dims, 1, value_row, scaled_by="columns", paired=s.paired)
        + QueryLanes(s, vectors, keys, dims).text()
    )


class QueryLanes(Tile):
    """Writes `@tile{L}`."""

    def __init__(self, s: Sizes, vectors: int, keys: int, dims: int):
        super().__init__(s, f"tile{vectors}")
        self.vectors, self.keys, self.dims = vectors, keys, dims
        self.stride = BYTES * vectors  # of a row of lanes

    def _allocate(self) -> None:
        """One block of memory for everything; lanes beyond the last see no key and give nothing."""
        f, s = self.f, self.s
        sizes = [s.words * self.stride, s.value_width * self.stride]  # queries, results
        sizes += [4 * KEYS * s.words, 4 * KEYS * s.value_width, KEYS * self.stride]  # keys, values, scores
        sizes += [self.stride] * 3 + [s.value_width * self.stride]  # positions, sinks, factors, results of a segment
        places = self._cut(sizes)
        self.query_at, self.result_at, self.key_at, self.value_at, self.score_at = places[:5]
        self.position_at, self.sink_at, self.factor_at, self.out_at = places[5:]
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.block}, i8 0, i64 {sizes[0] + sizes[1]}, i1 false)")
        for v in range(self.vectors):
            f.store(INTS, "splat (i32 -1)", f.at(self.position_at, BYTES * v), BYTES)
            self.lanes.store(MASKED, f.at(self.sink_at, BYTES * v))

    def _query_place(self, lane: Value, h: Value) -> str:
        """A query is a column."""
        f = self.f
        if not self.s.paired:
            return f.at(self.query_at, f.add(f.mul(h, self.stride), f.mul(lane, 4)))
        word, half = f.arithmetic("udiv", h, 2), f.arithmetic("urem", h, 2)
        return f.at(self.query_at, f.add(f.add(f.mul(word, self.stride), f.mul(lane, 4)), f.mul(half, 2)))

    def _begin(self) -> None:
        f = self.f
        self.positions = [f.load(INTS, f.at(self.position_at, BYTES * v), BYTES) for v in range(self.vectors)]
        self.maxima, self.all_maxima = ([f.variable(VECTOR, MASKED) for _ in self.positions] for _ in range(2))
        self.totals, self.all_totals = ([f.variable(VECTOR, ZERO) for _ in self.positions] for _ in range(2))

    def _begin_segment(self) -> None:
        num_bytes = self.s.value_width * self.stride
        self.f.do(f"call void @llvm.memset.p0.i64(ptr {self.out_at}, i8 0, i64 {num_bytes}, i1 false)")
        for maximum, total in zip(self.maxima, self.totals, strict=True):
            maximum.set(MASKED)
            total.set(ZERO)

    def _end_segment(self) -> None:
        f, factors = self.f, []
        for v in range(self.vectors):
            top, before, now = self._merged(self.all_maxima[v].get(), self.maxima[v].get())
            self.all_maxima[v].set(top)
            self.all_totals[v].set(self._sum_of_both(self.all_totals[v].get(), before, self.totals[v].get(), now))
            factors.append((before, now))
        with f.loop(0, self.s.value_width) as h:
            for v, (before, now) in enumerate(factors):
                place = f.add(f.mul(h, self.stride), BYTES * v)
                result, out = f.at(self.result_at, place), f.at(self.out_at, place)
                both = self._sum_of_both(self.lanes.load(result), before, self.lanes.load(out), now)
                self.lanes.store(both, result)

    def _attend_block(self, first_key: Value) -> None:
        f, s, stride = self.f, self.s, self.stride
        num_keys = f.smaller(f.sub(self._end, first_key), KEYS)
        with f.loop(0, num_keys) as c:
            self._fetch_key(f.add(first_key, c), f.at(self.key_at, f.mul(c, 4 * s.words)))
        own = s.halves == 2 or s.paired  # values are no part of the keys' rows
        values = self.value_at if own else self.key_at
        if own:
            self._fetch_values(first_key, num_keys, values, 4 * s.value_width)
        with f.loop(0, num_keys, self.keys) as c:
            key, score = f.at(self.key_at, f.mul(c, 4 * s.words)), f.at(self.score_at, f.mul(c, stride))
            f.do(
                f"call void @scores{self.vectors}(ptr {key}, ptr {self.query_at}, ptr {score}, i64 {s.words}, ptr null)"
            )
        steps, evenly = num_keys, num_keys
        if s.paired:  # a pair's second key, if there is none, is out of sight as any other
            steps = f.arithmetic("udiv", f.add(num_keys, 1), 2)
            evenly = f.mul(steps, 2)
        if s.spec.window is None:  # most blocks of a long prompt lie before all of a tile's queries
            lowest = f.add(self.before, f.arithmetic("udiv", self.first, s.group))
            full = f.let(f"icmp eq i64 {num_keys}, {KEYS}")
            before = f.let(f"icmp sle i64 {f.add(first_key, KEYS - 1)}, {lowest}")
            seen = f.let(f"and i1 {full}, {before}")
            with f.when(seen):
                self._soften(first_key, KEYS, all_seen=True)
            with f.when(f.let(f"xor i1 {seen}, true")):
                self._soften(first_key, evenly)
        else:
            self._soften(first_key, evenly)
        with f.loop(0, s.value_width, self.dims) as h:
            value, out = f.at(values, f.mul(h, 4)), f.at(self.out_at, f.mul(h, stride))
            listed = f"ptr {value}, ptr {self.score_at}, ptr {out}, i64 {steps}, ptr {self.factor_at}"
            f.do(f"call void @weighted{self.vectors}({listed})")

    def _soften(self, first_key: Value, num_keys: Value, *, all_seen: bool = False) -> None:
        """Scores become exponentials; maxima rise, and what came before is to fade by factors."""
        f, lanes = self.f, self.lanes
        tops = self._mask(first_key, num_keys, all_seen)
        for v in range(self.vectors):
            factor = lanes.power(lanes.sub(self.maxima[v].get(), tops[v]))
            self.maxima[v].set(tops[v])
            lanes.store(factor, f.at(self.factor_at, BYTES * v))
            self.totals[v].set(lanes.mul(self.totals[v].get(), factor))
        self._exponentials(num_keys, all_seen)

    def _mask(self, first_key: Value, num_keys: Value, all_seen: bool) -> list[str]:
        """Hide what a lane does not see; the new maxima."""
        f, lanes = self.f, self.lanes
        tops = [f.variable(VECTOR, maximum.get()) for maximum in self.maxima]
        with f.loop(0, num_keys) as c:
            key = f.splat("i32", f.let(f"trunc i64 {f.add(first_key, c)} to i32"), 16)
            for v in range(self.vectors):
                slot = f.at(self.score_at, f.add(f.mul(c, self.stride), BYTES * v))
                x = self._capped(lanes.load(slot))
                if not all_seen:
                    x = self._seen(x, key, self.positions[v])
                lanes.store(x, slot)
                tops[v].set(lanes.maximum(tops[v].get(), x))
        return [top.get() for top in tops]

    def _fetch_key(self, position: Value, target: str) -> None:
        """As float32, or as it lies in its page."""
        f, s = self.f, self.s
        if not s.paired:
            return self._fetch(position, 0, target, s.width)
        source, count = f.at(self.pages, f.mul(self._index(position, 0), 2 * s.width)), math.gcd(s.words, 16)
        for i in range(0, 4 * s.words, 4 * count):
            f.store(f"<{count} x i32>", f.load(f"<{count} x i32>", f.at(source, i), 2), f.at(target, i))

    def _exponentials(self, num_keys: Value, all_seen: bool) -> None:
        """In place of the scores; those of two keys as one row of pairs."""
        f, lanes, words = self.f, self.lanes, INTS
        step = 2 if self.s.paired else 1
        with f.loop(0, num_keys, step) as c:
            for v in range(self.vectors):
                row, found = f.at(self.score_at, f.add(f.mul(c, self.stride), BYTES * v)), []
                for key in range(step):
                    scores = lanes.load(f.at(row, key * self.stride))
                    y = (self._powers if all_seen else self._weights)(scores, self.maxima[v].get())
                    self.totals[v].set(lanes.add(self.totals[v].get(), y))
                    found.append(y)
                if step == 1:
                    lanes.store(found[0], row)
                    continue
                low, high = (f.let(f"zext <16 x i16> {lanes.halves(y)} to {words}") for y in found)
                pair = f.let(f"or {words} {low}, {f.let(f'shl {words} {high}, splat (i32 16)')}")
                place = f.add(f.mul(f.arithmetic("udiv", c, 2), self.stride), BYTES * v)
                f.store(words, pair, f.at(self.score_at, place), BYTES)

    def _finish(self) -> None:
        f = self.f
        for v in range(self.vectors):
            factor = self._last_factor(
                self.all_maxima[v].get(), self.all_totals[v].get(), f.at(self.sink_at, BYTES * v)
            )
            self.lanes.store(factor, f.at(self.factor_at, BYTES * v))

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        f, width = self.f, self.s.value_width
        target = f.at(self._operand("out"), f.mul(place, 4 * width))
        scale = f.load("float", f.at(self.factor_at, f.mul(lane, 4)))
        with f.loop(0, width) as h:
            x = f.load("float", f.at(self.result_at, f.add(f.mul(h, self.stride), f.mul(lane, 4))))
            f.store("float", f.let(f"fmul float {x}, {scale}"), f.at(target, f.mul(h, 4)))
