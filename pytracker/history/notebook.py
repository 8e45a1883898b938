"""Notebook views: small tables with curves, from a template that escapes every cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import jinja2
import numpy as np
from numpy.typing import NDArray

MOST_ROWS: Final = 60
_TEMPLATE: Final = """
<div style="overflow-x:auto">
{% if title %}<b>{{ title }}</b>{% endif %}
{% if rows %}<table style="font-variant-numeric:tabular-nums">
{% if columns %}<tr>{% for column in columns %}<th style="text-align:left">{{ column }}</th>{% endfor %}</tr>{% endif %}
{% for row in rows %}<tr>
{% for cell in row %}<td style="text-align:left">{% if cell.points is defined %}
<svg width="120" height="24" viewBox="-1 -1 122 26" role="img"><polyline points="{{ cell.points }}" fill="none"
stroke="currentColor" stroke-width="1.3" stroke-linejoin="round"/></svg>
{% else %}{{ cell }}{% endif %}</td>{% endfor %}
</tr>{% endfor %}
</table>{% endif %}
{% if note %}<small>{{ note }}</small>{% endif %}
</div>
"""


class Curve:
    """A cell that draws values [n] as a small curve; of many, the lowest and the highest of each of 60 stretches."""

    def __init__(self, values: NDArray[Any]) -> None:
        """Scale the values into a box of 120 by 24."""
        finite = np.asarray(values, np.float64)
        finite = finite[np.isfinite(finite)]
        if len(finite) > 120:
            finite = np.array([end for part in np.array_split(finite, 60) for end in (part.min(), part.max())])
        low, span = (float(finite.min()), float(np.ptp(finite))) if len(finite) else (0.0, 0.0)
        heights = 24 - 24 * (finite - low) / span if span > 0 else np.full(len(finite), 12.0)
        across = np.linspace(0, 120, max(len(finite), 1))
        self.points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, heights, strict=False))


COURSE: Final = ("course", "last", "lowest", "highest", "values")


def course(values: NDArray[Any]) -> list[Any]:
    """Return the cells under the heads ``COURSE`` of values [n]."""
    finite = values[np.isfinite(values)]
    ends = (float(finite.min()), float(finite.max())) if len(finite) else ("", "")
    return [Curve(values), float(values[-1]) if len(values) else "", *ends, len(values)]


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """Return a table as HTML; a cell is a text, a number, or a ``Curve``.

    Args:
        title: a line in bold above it.
        columns: heads.
        rows: as many cells each.
        note: small print below it.

    Rows beyond ``MOST_ROWS`` are only counted.

    >>> "&lt;b&gt;" in html_table("<b>", ["a"], [["1"]])
    True
    """
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    more = f"and {len(cells) - MOST_ROWS} more" if len(cells) > MOST_ROWS else ""
    notes = "; ".join(filter(None, (more, note)))
    return _template().render(title=title, columns=columns, rows=cells[:MOST_ROWS], note=notes).strip()


@cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
