"""The columns of a row: unit, power of the gradient, and the rule by which ``moments.py`` merges each.

The native core holds the same order in ``csrc/accumulator.h``; the two are compared when it is loaded.
No torch here: the functions take NumPy arrays, and torch tensors as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Column:
    """One raw moment of a gradient: float64, mergeable."""

    name: str
    unit: str
    power: int  # of the gradient: what a gradient scale divides it by is raised to this
    merge: Literal["sum", "max"]
    meaning: str


GRADIENT_COLUMNS: Final = (
    Column("sum", "gradient", 1, "sum", "sum of the elements (complex: of their real parts)"),
    Column("sum_sq", "gradient squared", 2, "sum", "sum of the squared moduli; its root is the L2 norm"),
    Column("abs_max", "gradient", 1, "max", "largest modulus; NaN if any element is"),
    Column("zeros", "elements", 0, "sum", "elements that are zero, those a sparse gradient does not store included"),
    Column("nans", "elements", 0, "sum", "elements that are NaN"),
    Column("infs", "elements", 0, "sum", "elements that are infinite"),
)
"""The columns of one tensor's row."""

MAX_SUM_SQ: Final = Column("max_sum_sq", "gradient squared", 2, "max", "largest sum_sq of one parameter")
TOTAL_COLUMNS: Final = (*GRADIENT_COLUMNS, MAX_SUM_SQ)
"""The columns of the totals row: those of a tensor, merged over all, and the largest ``sum_sq``."""

FORMATS: Final = ("bf16", "fp16", "e4m3")
"""The formats whose margins are counted: fp32 has the exponents of bf16, and fp8's e5m2 those of fp16."""

SMALLEST_NORMAL: Final = (2.0**-126, 2.0**-14, 2.0**-6)
TWO_HIGHEST_BINADES: Final = (2.0**126, 2.0**14, 2.0**7)
"""Of each format: the smallest normal number, and where its two highest binades begin (within 4 times of overflow)."""

EXTRA_COLUMNS: Final = (
    Column("l1", "gradient", 1, "sum", "sum of the moduli: the L1 norm"),
    *(
        Column(f"subnormal_{name}", "elements", 0, "sum", f"elements above 0 and below {low:g}, subnormal in {name}")
        for name, low in zip(FORMATS, SMALLEST_NORMAL, strict=True)
    ),
    *(
        Column(f"near_max_{name}", "elements", 0, "sum", f"elements of {high:g} or more, within 4 times of overflow")
        for name, high in zip(FORMATS, TWO_HIGHEST_BINADES, strict=True)
    ),
)
"""The columns that a tensor has on request, counted by the modulus of elements as they lie in memory."""

EXTRAS: Final = tuple(column.name for column in EXTRA_COLUMNS)
REQUESTS: Final = {"l1": EXTRAS[:1], "exponents": EXTRAS[1:]}
"""What can be asked for by ``Tracker(columns=...)``, and the columns that each stands for."""

COLUMNS: Final = tuple(column.name for column in GRADIENT_COLUMNS)
SUM, SUM_SQ, ABS_MAX, ZEROS, NANS, INFS = range(len(COLUMNS))
MAX_SUM_SQ_TOTAL: Final = len(COLUMNS)
TOTALS: Final = len(TOTAL_COLUMNS)
POWERS: Final = tuple(column.power for column in TOTAL_COLUMNS)
MAXIMA: Final = tuple(index for index, column in enumerate(TOTAL_COLUMNS) if column.merge == "max")

MAX_SCALARS: Final = 64
"""Different scalars that the rows of a log can hold."""

METER_COLUMNS: Final = ("val", "sum", "count", "nans")
"""The columns of a meter's state; a NaN value is counted, and left out of the sum and the count."""


def row_width(tensors: int, scalars: int = 0, *, extras: bool = False) -> int:
    """Return the float64 values of a step's row: [totals | tensor 0 | tensor 1 | ... | scalar 0 | ...].

    ``extras``: with the further columns of [tensor 0 | tensor 1 | ...] behind them.
    """
    return TOTALS + tensors * (len(COLUMNS) + (len(EXTRAS) if extras else 0)) + scalars


def selection(indices: NDArray[np.intp]) -> Any:
    """Return a slice in place of ascending indices without a gap: reading through it copies nothing.

    Example:
        >>> selection(np.array([3, 4, 5])), selection(np.array([3, 5]))
        (slice(3, 6, None), array([3, 5]))
    """
    first = int(indices[0]) if len(indices) else 0
    end = first + len(indices)
    return slice(first, end) if np.array_equal(indices, np.arange(first, end)) else indices
