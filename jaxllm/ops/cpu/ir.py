"""LLVM IR written by Python: one function at a time, with loops, conditions and variables.

`Function(...)`, calls that append instructions, `text()` -> the definition. Values are names (`%v3`) or literals;
integers of 64 bits may be Python integers, which are folded. A variable is a stack slot that LLVM turns into a
register. Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

Value = str | int


class Function:
    """The body of one internal function under construction.

    Args:
        name: without the `@`.
        arguments: types; the values are `%0`, `%1` and so on, as `args`.
        attributes: of the function, such as `noinline`.
    """

    def __init__(self, name: str, arguments: Sequence[str], attributes: str = ""):
        self.args = [f"%a{i}" for i in range(len(arguments))]
        listed = ", ".join(f"{kind} {arg}" for kind, arg in zip(arguments, self.args, strict=True))
        self._head = f"define internal void @{name}({listed}) {attributes} {{\nentry:\n"
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._count = 0

    def text(self) -> str:
        """The whole definition."""
        return self._head + "\n".join([*self._slots, "  br label %body", "body:", *self._lines, "  ret void\n}\n"])

    def do(self, instruction: str) -> None:
        """Append an instruction without a result."""
        self._lines.append("  " + instruction)

    def let(self, instruction: str) -> str:
        """Append an instruction; its result's name."""
        name = self._name()
        self.do(f"{name} = {instruction}")
        return name

    def _name(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def arithmetic(self, op: str, a: Value, b: Value) -> Value:
        """`add`, `sub`, `mul`, `udiv` or `urem` of 64-bit integers."""
        if isinstance(a, int) and isinstance(b, int):
            return {"add": a + b, "sub": a - b, "mul": a * b}.get(op) or self.let(f"{op} i64 {a}, {b}")
        if (op, b) in (("add", 0), ("sub", 0), ("mul", 1), ("udiv", 1)):
            return a
        return self.let(f"{op} i64 {a}, {b}")

    def add(self, a: Value, b: Value) -> Value:
        """`a + b`."""
        return self.arithmetic("add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        """`a - b`."""
        return self.arithmetic("sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """`a * b`."""
        return self.arithmetic("mul", a, b)

    def smaller(self, a: Value, b: Value) -> str:
        """The smaller of two signed integers."""
        return self.let(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def larger(self, a: Value, b: Value) -> str:
        """The larger of two signed integers."""
        return self.let(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")

    def at(self, pointer: str, num_bytes: Value) -> str:
        """The address so many bytes further."""
        return pointer if num_bytes == 0 else self.let(f"getelementptr i8, ptr {pointer}, i64 {num_bytes}")

    def load(self, kind: str, pointer: str, align: int = 4) -> str:
        """A value from memory."""
        return self.let(f"load {kind}, ptr {pointer}, align {align}")

    def load_index(self, pointer: str) -> str:
        """An int32 from memory, widened."""
        return self.let(f"sext i32 {self.load('i32', pointer)} to i64")

    def store(self, kind: str, value: Value, pointer: str, align: int = 4) -> None:
        """A value to memory."""
        self.do(f"store {kind} {value}, ptr {pointer}, align {align}")

    def splat(self, kind: str, value: str, lanes: int) -> str:
        """A vector of one number."""
        one = self.let(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i64 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        return self.let(f"shufflevector <{lanes} x {kind}> {one}, <{lanes} x {kind}> poison, {zeros}")

    def variable(self, kind: str, initial: str) -> Variable:
        """A value that changes."""
        slot = self._name()
        self._slots.append(f"  {slot} = alloca {kind}")
        variable = Variable(self, kind, slot)
        variable.set(initial)
        return variable

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[str]:
        """`for i in range(start, stop, step)`; yields i."""
        self._count += 1
        n, index = self._count, self.variable("i64", str(start))
        self._jump(f"test{n}", f"test{n}")
        i = index.get()
        inside = self.let(f"icmp slt i64 {i}, {stop}")
        self.do(f"br i1 {inside}, label %loop{n}, label %after{n}")
        self._lines.append(f"loop{n}:")
        yield i
        index.set(str(self.add(i, step)))
        self._jump(f"test{n}", f"after{n}")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Do what follows only where the i1 is true."""
        self._count += 1
        n = self._count
        self.do(f"br i1 {condition}, label %then{n}, label %after{n}")
        self._lines.append(f"then{n}:")
        yield
        self._jump(f"after{n}", f"after{n}")

    def _jump(self, target: str, label: str) -> None:
        self.do(f"br label %{target}")
        self._lines.append(f"{label}:")


class Variable:
    """A stack slot; see `Function.variable`."""

    def __init__(self, function: Function, kind: str, slot: str):
        self._function, self._kind, self._slot = function, kind, slot

    def get(self) -> str:
        """Its value now."""
        return self._function.let(f"load {self._kind}, ptr {self._slot}")

    def set(self, value: str) -> None:
        """Change it."""
        self._function.do(f"store {self._kind} {value}, ptr {self._slot}")
