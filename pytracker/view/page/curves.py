"""The curves of one run as the page reads them: thinned to what a screen shows, packed, with their findings."""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...diagnostics import title_of
from ...history import Float64Array, History, Int64Array, Series
from ...store import jsonable
from .parameters import parameter_maps
from .thinning import means, thin

POINTS: Final = 2000  # of one line: more than a chart has pixels
_LEAST_POINTS: Final = 300
_ALL_POINTS: Final = 24_000  # of one metric, over all runs of a page
_CLOCK_POINTS: Final = 500
_MARKS: Final = 200  # non-finite values marked in one line
_ROBUST: Final = (1.0, 99.0)  # percentiles between which a curve spends its life


def curves(history: History, clock: tuple[Int64Array, Float64Array], runs: int = 1) -> dict[str, Any]:
    """Return a run's series, clock, findings and parameter maps as JSON-able data.

    Args:
        history: the run's history.
        clock: steps and the training seconds at which they were logged.
        runs: how many are drawn together; each then has fewer points.
    """
    points = int(np.clip(_ALL_POINTS // max(runs, 1), _LEAST_POINTS, POINTS))
    drawn = {name: series for name, series in history.items() if len(series)}
    epochs = drawn.get("epoch")
    document = {
        "series": {name: _line(series, points) for name, series in drawn.items()},
        "clock": _pair(*thin(clock[0], clock[1], _CLOCK_POINTS)),
        "epochs": None if epochs is None else _pair(*thin(epochs.steps, epochs.values, _CLOCK_POINTS)),
        "clip": history.meta.get("clip_threshold"),
        "findings": [_finding(each, list(drawn)) for each in history.findings],
        "parameters": parameter_maps(history.parameters, packed),
    }
    plain: dict[str, Any] = jsonable(document)
    return plain


def _line(series: Series, points: int) -> dict[str, Any]:
    """Return a series as ``x``, ``y``; of a long one also the means by which it is smoothed; and what is not finite."""
    steps, values = series.steps, series.values
    kept_steps, kept = thin(steps, values, points)
    finite = values[np.isfinite(values)]
    bad = np.flatnonzero(~np.isfinite(values))
    marked = bad[np.linspace(0, len(bad) - 1, min(len(bad), _MARKS)).astype(np.int64)]
    line: dict[str, Any] = {"count": len(values), **_pair(kept_steps, np.where(np.isfinite(kept), kept, np.nan))}
    if len(finite):
        low, high = np.percentile(finite, _ROBUST)
        line |= {"low": float(finite.min()), "high": float(finite.max()), "usual": [float(low), float(high)]}
    if len(kept) < len(values):
        line["means"] = _pair(*means(steps, values, points // 4))
    if len(bad):
        line["bad"] = {"count": len(bad), "x": packed(steps[marked])}
    return line


def _finding(finding: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {**finding, "title": title_of(finding), "series": concerned(finding, names)}


def concerned(finding: dict[str, Any], names: list[str]) -> list[str]:
    """Return the series that a finding speaks of: its own list, else those that its rule judges.

    >>> concerned({"rule": "gradient_exploding"}, ["loss", "grad_norm", "lr"])
    ['grad_norm']
    >>> concerned({"rule": "constant", "player": "D"}, ["loss", "G/loss", "D/loss", "D/grad_norm"])
    ['D/loss']
    """
    given = finding.get("series")
    if isinstance(given, (list, tuple)):
        return [name for name in names if name in given]
    rule, player = str(finding.get("rule")), finding.get("player")
    if player:
        prefix = f"{player}/"
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return [prefix + name for name in concerned({"rule": rule}, own)]
    if "gradient" in rule or rule.startswith(("layer", "dead", "always_clipped", "not_in_optimizer")):
        return [name for name in names if name == "grad_norm"]
    if rule.startswith(("learning_rate", "update_ratio")):
        return [name for name in names if name == "lr" or name.startswith("lr/")]
    if rule.startswith("overfitting"):
        return [name for name in names if "loss" in name.lower()]
    if rule.startswith(("loss", "constant")):
        return [name for name in names if name in ("loss", "train_loss", "train/loss")]
    return []


def _pair(steps: Int64Array, values: Float64Array) -> dict[str, Any]:
    return {"x": packed(steps), "y": packed(values)}


def packed(values: NDArray[Any]) -> dict[str, str]:
    """Return an array in base64: a third of the size of digits, and exact. Integers past 32 bits become float64."""
    if values.dtype.kind == "i":
        fits = not len(values) or int(np.abs(values).max()) < 2**31
        array, kind = (values.astype("<i4"), "i4") if fits else (values.astype("<f8"), "f8")
    else:
        array, kind = np.ascontiguousarray(values, values.dtype.newbyteorder("<")), f"f{values.dtype.itemsize}"
    return {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
