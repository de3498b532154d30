"""How the numbers of a quantised matrix are kept: codes, the groups that share a scale, and what activations become.

Plain data, known without arrays: `value = scale * (code - offset) + minimum`, or `scale * table[code]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Codes = Literal["uint4", "int8", "float8_e4m3fn"]
ACTIVATION_LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # what the largest number of a token becomes
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # fp4, code by code


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What a product does to its other operand first.

    Attributes:
        codes: the numbers that it is rounded to.
        is_static: with a scale from the checkpoint; otherwise with one of its own for each token.
        by_group: with one for each of the token's groups, those of the matrix.
    """

    codes: Literal["int8", "float8_e4m3fn"]
    is_static: bool = False
    by_group: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one quantised matrix is kept.

    Attributes:
        codes: uint4 (two in a byte), int8 or float8_e4m3fn.
        group: neighbouring inputs of the product that share a scale; 0: all of them.
        scale_dtype: of scales and minima.
        offset: the code that stands for zero.
        has_minima: whether a minimum is added in each group.
        table: the value of each 4-bit code, where codes are no numbers; empty where they are.
        is_permuted: whether inputs are taken in another order, in which groups are neighbours.
        activations: None: left as they are.
    """

    codes: Codes
    group: int = 0
    scale_dtype: str = "float32"
    offset: int = 0
    has_minima: bool = False
    table: tuple[float, ...] = ()
    is_permuted: bool = False
    activations: Activations | None = None

    @property
    def bits(self) -> int:
        """Of one code."""
        return 4 if self.codes == "uint4" else 8

    @property
    def name(self) -> str:
        """For a person: `4-bit integers in groups of 32 with minima`."""
        kind = {"uint4": "4-bit integers", "int8": "8-bit integers"}.get(self.codes, "fp8")
        kind = "4-bit codes" if self.table else kind
        groups = f" in groups of {self.group}" if self.group else " per channel"
        return kind + groups + (" with minima" if self.has_minima else "")
