"""How numbers, times, texts and short curves are written for people. One way for each, everywhere."""

from __future__ import annotations

import math
import re
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_BARS: Final = "▁▂▃▄▅▆▇█"
# What a terminal obeys instead of showing it: control characters, those that turn the direction of writing or end a
# line, and the half characters of a file name that is no UTF-8.
_UNSHOWABLE: Final = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Write as escapes the characters that a terminal obeys; a line's end stays.

    >>> print(visible("a\x1b[31m\tb\u202ec"))
    a\x1b[31m\tb\u202ec
    """
    return _UNSHOWABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def number(value: float | None) -> str:
    """Write a number in at most ten characters; a dash for None.

    >>> number(0.00012345), number(1234567.0), number(3.0), number(None)
    ('0.0001234', '1.235e+06', '3', '-')
    """
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Write a time span in its two largest units.

    >>> duration(3.25), duration(75), duration(3 * 3600 + 61), duration(None)
    ('3.2 s', '1 m 15 s', '3 h 1 m', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def age(moment: float) -> str:
    """Write how long ago a moment (Unix seconds) was, in one unit."""
    passed = time.time() - moment
    if not math.isfinite(passed):
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if passed >= length:
            return f"{passed / length:.0f} {unit}"
    return f"{max(passed, 0):.0f} s"


def sparkline(values: NDArray[Any], width: int = 24) -> str:
    """Draw a series as a row of bars; each bar is the part's value furthest from the whole's middle. Blank: no number.

    >>> sparkline(np.array([1.0, 2.0, 8.0, 1.0]), width=4)
    '▁▂█▁'
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return " " * min(width, len(values))
    low, high = float(finite.min()), float(finite.max())
    middle = float(np.median(finite))
    bars = []
    for part in np.array_split(values, min(width, len(values))):
        part = part[np.isfinite(part)]
        if not len(part):
            bars.append(" ")
            continue
        value = float(part[np.argmax(np.abs(part - middle))])
        bars.append(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0])
    return "".join(bars)


def steps_per_second(steps: NDArray[Any], seconds: NDArray[Any], latest: float | None = None) -> float | None:
    """Return the speed over a run's clock, or over its ``latest`` seconds; None where it cannot be known.

    >>> steps_per_second(np.array([0, 10, 100]), np.array([0.0, 10.0, 20.0]), latest=10.0)
    9.0
    """
    if len(steps) < 2:
        return None
    start = 0 if latest is None else min(int(np.searchsorted(seconds, seconds[-1] - latest)), len(steps) - 2)
    elapsed = float(seconds[-1] - seconds[start])
    return float(steps[-1] - steps[start]) / elapsed if elapsed > 0 else None
