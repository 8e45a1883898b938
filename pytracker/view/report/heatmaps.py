"""The heat maps of a report: one cell for each parameter and interval of steps."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...history import Float64Array, Int64Array, ParameterHistory
from .lines import Subject, packed
from .thinning import groups

ROWS: Final = 200  # parameters; beyond it neighbours share a row, which shows the largest of them
COLUMNS: Final = 300  # intervals; likewise
MARKS: Final = 2000  # non-finite cells marked
_ROW_PIXELS: Final = 16
_HEIGHTS: Final = (240, 1100)
_SCALE: Final = (  # dark to light, in steps that the eye reads as equal, and as well without colour
    (0.0, "#1b1035"),
    (0.25, "#5a2a7a"),
    (0.5, "#b13f6e"),
    (0.75, "#ee7d4f"),
    (1.0, "#fbe3a0"),
)


def heatmaps(each: Subject) -> list[dict[str, Any]]:
    """Return the three heat maps of a run: norm, zero fraction and largest element; none where nothing was recorded."""
    parameters = each.history.parameters
    if not len(parameters) or not parameters.infos:
        return []
    rows = groups(len(parameters.infos), ROWS)
    columns = groups(len(parameters), COLUMNS)
    axes = _Axes(parameters, rows, columns)
    norm = axes.thinned(parameters.field("norm_max"))
    bad = axes.thinned(parameters.field("nans") + parameters.field("infs")) > 0
    maps = [
        _heatmap(each, axes, "Gradient norm by parameter", _log10(norm), bad, logarithmic=True),
        _heatmap(each, axes, "Share of zeros in the gradient", axes.thinned(parameters.field("zero_fraction")), bad),
        _heatmap(
            each, axes, "Largest element of the gradient", _log10(axes.thinned(parameters.field("abs_max"))), bad,
            logarithmic=True,
        ),
    ]  # fmt: skip
    for index, chart in enumerate(maps):
        chart["id"] = f"map-{index}"
    return maps


class _Axes:
    """Which parameters share a row and which intervals share a column."""

    def __init__(self, parameters: ParameterHistory, rows: Int64Array, columns: Int64Array) -> None:
        self.rows, self.columns = rows, columns
        names = parameters.names
        ends = [*rows[1:].tolist(), len(names)]
        self.labels = [
            names[start] if end - start == 1 else f"{names[start]} ... {names[end - 1]}"
            for start, end in zip(rows.tolist(), ends, strict=True)
        ]
        self.grouped = len(rows) < len(names)
        # A cell's edges: the first step of its first interval, and the step after the last one of all.
        self.edges = np.append(parameters.first_step[columns], parameters.last_step[-1] + 1)

    def thinned(self, values: NDArray[Any]) -> Float64Array:
        """Return [rows, columns]: the largest finite value of each cell, NaN where there is none."""
        filled = np.where(np.isfinite(values), values, -np.inf).astype(np.float64)
        table = np.maximum.reduceat(np.maximum.reduceat(filled, self.columns, axis=0), self.rows, axis=1).T
        return np.where(np.isneginf(table), np.nan, table)


def _log10(values: Float64Array) -> Float64Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values)  # of 0: minus infinity, drawn below the scale


def _heatmap(
    each: Subject, axes: _Axes, title: str, z: Float64Array, bad: NDArray[np.bool_], *, logarithmic: bool = False
) -> dict[str, Any]:
    finite = z[np.isfinite(z)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if logarithmic:
        low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
        z = np.where(np.isneginf(z), low, z)
        ticks = list(range(int(low), int(high) + 1, max(1, round((high - low) / 6))))
        bar = {"tickvals": ticks, "ticktext": [f"10<sup>{tick}</sup>" for tick in ticks]}
    else:
        low, high, bar = 0.0, 1.0, {"tickformat": ".0%"}
    value = "10^%{z:.2f}" if logarithmic else "%{z:.1%}"
    hover = f"%{{y}}<br>from step %{{x}}<br>{value}<extra></extra>"
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": packed(axes.edges),
            "y": axes.labels,
            "z": packed(z.astype(np.float32)),
            "zmin": low,
            "zmax": high,
            "colorscale": _SCALE,
            "colorbar": {"thickness": 10, "len": 1, "outlinewidth": 0, **bar},
            "hovertemplate": hover,
            "meta": {"run": each.index},
        }
    ]
    marks = np.argwhere(bad)
    if len(marks):
        shown = marks[np.linspace(0, len(marks) - 1, min(len(marks), MARKS)).astype(np.int64)]
        middle = (axes.edges[:-1] + axes.edges[1:]) / 2
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "not finite",
                "x": packed(middle[shown[:, 1]]),
                "y": [axes.labels[row] for row in shown[:, 0]],
                "marker": {"symbol": "x", "size": 7, "color": "#00d5ff", "line": {"color": "#00222b", "width": 1}},
                "hovertemplate": "%{y}<br>NaN or Inf near step %{x}<extra></extra>",
                "meta": {"run": each.index, "nonfinite": len(marks)},
            }
        )
    height = int(np.clip(len(axes.rows) * _ROW_PIXELS + 90, *_HEIGHTS))
    layout = {
        "height": height,
        "xaxis": {"title": {"text": "step", "standoff": 4}},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "tickfont": {"size": 10}},
    }
    note = "grey: no gradient; x: NaN or Inf" + ("; a row shows the largest of neighbours" if axes.grouped else "")
    return {"kind": "map", "title": title, "note": note, "data": data, "layout": layout, "run": each.index}
