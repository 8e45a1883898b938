"""The line charts of a report, as plain dicts for plotly.js: one trace for each run and series."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...history import Float64Array, History, Int64Array, Series
from ..metric_names import goal, is_learning_rate, split, subject
from .thinning import thin, trend

POINTS: Final = 2000  # of one line: more than a chart has pixels
TREND_POINTS: Final = 120
MARKS: Final = 200  # non-finite values marked in one line
COLORS: Final = ("#2f6fde", "#d9541e", "#139a6b", "#9b51c9", "#c98a00", "#0c97b5", "#c7417b", "#7a7f87")
_SEVERITY_COLORS: Final = {"critical": "#d33", "warning": "#e69500", "info": "#3a87c8"}
_NORMS: Final = ("grad_norm", "grad_max")
_TITLES: Final = {
    "grad_abs_max": "Largest gradient element",
    "grad_nonfinite": "Gradient elements that are NaN or Inf",
    "grad_zero_fraction": "Share of gradient elements that are zero",
}
_OTHER_CHARTS: Final = 24


@dataclass(frozen=True)
class Subject:
    """One run to draw: its place decides its colour."""

    index: int
    name: str
    history: History
    meta: dict[str, Any]
    findings: list[dict[str, Any]]

    @property
    def color(self) -> str:
        """The run's colour, the same in every chart."""
        return COLORS[self.index % len(COLORS)]


def line_charts(subjects: list[Subject]) -> list[dict[str, Any]]:
    """Return the charts of all series: losses, accuracies, learning rate, gradient norms, then what else there is."""
    names = list(dict.fromkeys(name for each in subjects for name, series in each.history.items() if len(series)))
    judged = [name for name in names if goal(name)]
    topics = sorted(dict.fromkeys(map(subject, judged)), key=lambda topic: "loss" not in topic)
    charts = [_chart(subjects, topic.capitalize(), [n for n in judged if subject(n) == topic]) for topic in topics]
    rates = [name for name in names if is_learning_rate(name)]
    if rates:
        charts.append(_chart(subjects, "Learning rate", rates))
    norms = [name for name in names if name in _NORMS]
    if norms:
        charts.append(_gradient_chart(subjects, norms))
    charted = {*judged, *rates, *norms, "epoch"}
    others = [name for name in names if name not in charted and _moves(subjects, name)]
    charts += [_chart(subjects, _TITLES.get(name, name), [name]) for name in others[:_OTHER_CHARTS]]
    for index, chart in enumerate(charts):
        chart["id"] = f"chart-{index}"
        chart["kind"] = "line"
    return charts


def _moves(subjects: list[Subject], name: str) -> bool:
    """Tell whether a series is more than zeros (as the count of non-finite elements is in a sound training)."""
    return any((each.history[name].values != 0).any() for each in subjects if name in each.history)


def _gradient_chart(subjects: list[Subject], names: list[str]) -> dict[str, Any]:
    chart = _chart(subjects, "Gradient norm", names, log=True)
    chart["note"] = "solid: all parameters together; dotted: the largest of a single parameter"
    thresholds = sorted({float(each.meta["clip_threshold"]) for each in subjects if each.meta.get("clip_threshold")})
    for threshold in thresholds:
        chart["layout"]["shapes"].append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": threshold,
                "y1": threshold,
                "line": {"color": "#888", "width": 1.5, "dash": "dash"},
                "label": {
                    "text": f"clip {threshold:g}",
                    "textposition": "end",
                    "yanchor": "bottom",
                    "font": {"color": "#888", "size": 11},
                },
            }
        )
    return chart


def _chart(subjects: list[Subject], title: str, names: list[str], *, log: bool = False) -> dict[str, Any]:
    drawn = [(each, name) for each in subjects for name in names if name in each.history]
    traces = [trace for each, name in drawn for trace in _traces(each, name, names)]
    marks = [_nonfinite(each, name) for each, name in drawn]
    shapes = [_band(finding) for each in subjects for finding in each.findings]
    parts = {split(name) for name in names}
    note = "dots: validation" if len(parts) == 2 else ""
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step", "standoff": 4}, "rangemode": "nonnegative"},
        "yaxis": {"type": "log" if log else "linear", "exponentformat": "power"},
        "shapes": shapes,
    }
    if log and 1.5 < _decades(drawn) < 8:
        layout["yaxis"]["dtick"] = 1  # a label for each power of ten, and none in between
    return {"title": title, "note": note, "data": traces + [mark for mark in marks if mark], "layout": layout}


def _decades(drawn: list[tuple[Subject, str]]) -> float:
    """Return how many powers of ten the positive values of some series span."""
    values = np.concatenate([each.history[name].values for each, name in drawn])
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def _traces(each: Subject, name: str, names: list[str]) -> list[dict[str, Any]]:
    """Return the line of a series; where that is noisy, faint and with its trend over it."""
    series = each.history[name]
    steps, values = thin(series.steps, series.values, POINTS)
    validation = split(name) == "val"
    dotted = name == "grad_max" or (is_learning_rate(name) and name != names[0])
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if validation and len(steps) <= 100 else "lines",
        "name": name,
        "x": packed(steps),
        "y": packed(np.where(np.isfinite(values), values, np.nan)),
        "line": {"color": each.color, "width": 2 if validation else 1.2, "dash": "dot" if dotted else "solid"},
        "marker": {"size": 5},
        "hovertemplate": f"{_escaped(each.name)}<br>{_escaped(name)} %{{y:.5g}} at step %{{x}}<extra></extra>",
        "meta": {"run": each.index, "series": name, "recorded": len(series)},
    }
    medians = trend(series.steps, series.values, TREND_POINTS)
    if medians is None:
        return [line]
    over: dict[str, Any] = {"x": packed(medians[0]), "y": packed(medians[1]), "hoverinfo": "skip"}
    over |= {"line": {**line["line"], "width": 2}, "meta": {"run": each.index, "series": name, "trend": True}}
    return [{**line, "opacity": 0.35}, {"type": "scatter", "mode": "lines", "name": f"{name}, trend", **over}]


def _nonfinite(each: Subject, name: str) -> dict[str, Any] | None:
    """Mark where a series is NaN or infinite: crosses at the foot of the chart, whatever its scale."""
    series: Series = each.history[name]
    bad = np.flatnonzero(~np.isfinite(series.values))
    if not len(bad):
        return None
    chosen = bad[np.linspace(0, len(bad) - 1, min(len(bad), MARKS)).astype(np.int64)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{name} is not finite",
        "x": packed(series.steps[chosen]),
        "y": [0.03] * len(chosen),
        "yaxis": "y2",
        "marker": {"symbol": "x", "size": 7, "color": each.color, "line": {"color": "#d33", "width": 1}},
        "hovertemplate": f"{_escaped(each.name)}<br>{_escaped(name)} is not finite at step %{{x}}<extra></extra>",
        "meta": {"run": each.index, "series": name, "nonfinite": len(bad)},
    }


def _band(finding: dict[str, Any]) -> dict[str, Any]:
    color = _SEVERITY_COLORS.get(str(finding.get("severity")), "#888")
    first, last = finding.get("first_step") or 0, finding.get("last_step") or 0
    return {
        "type": "rect",
        "yref": "paper",
        "x0": first,
        "x1": max(first, last),
        "y0": 0,
        "y1": 1,
        "fillcolor": color,
        "opacity": 0.12,
        "line": {"color": color, "width": 1},
        "layer": "below",
    }


def packed(values: Int64Array | Float64Array | NDArray[np.float32]) -> dict[str, str]:
    """Return an array as plotly.js reads it from base64: a third of the size of decimal digits, and exact."""
    if values.dtype.kind == "i":
        fits = not len(values) or int(np.abs(values).max()) < 2**31
        array, kind = (values.astype("<i4"), "i4") if fits else (values.astype("<f8"), "f8")
    else:
        array, kind = np.ascontiguousarray(values, values.dtype.newbyteorder("<")), f"f{values.dtype.itemsize}"
    spec = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
    return spec if array.ndim == 1 else {**spec, "shape": ", ".join(map(str, array.shape))}


def _escaped(text: str) -> str:
    """Plotly reads a little HTML and its own %{} in hover texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
