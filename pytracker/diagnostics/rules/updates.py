"""How far a step moves the weights, relative to their size."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..statistics import Float64Array, finite_median
from ..view import View

ADAPTIVE: Final = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Lion")
"""Optimizers whose elements move by about the learning rate, whatever the gradient."""

PLAIN: Final = ("SGD",)
"""Optimizers that move by the learning rate times the gradient."""


def update_ratios(view: View) -> Float64Array:
    """Return |update| / |weight| of each weight matrix at the last drain, [W]; NaN where it can't be told.

    lr * |gradient| / |weight| for SGD, 1 / (1 - momentum) times that with ``meta["momentum"]`` (as far as it gets where
    gradients agree), and lr * sqrt(elements) / |weight| for Adam and its kin.
    """
    weights = view.layout.weights
    optimizer = view.meta.get("optimizer")
    if optimizer not in ADAPTIVE + PLAIN or view.interval_stop == 0 or not len(weights):
        return np.full(len(weights), np.nan)
    size = view.field("weight_norm")[0, weights].astype(np.float64)
    momentum = float(view.meta.get("momentum") or 0.0)
    moved = view.weight_norms / max(1.0 - momentum, 1e-3) if optimizer in PLAIN else view.layout.root[weights]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where(size > 0, _rates(view)[weights] * moved / size, np.nan)


def typical_update(view: View) -> float:
    """Return the median of ``update_ratios``, NaN where it can't be told."""
    return float(finite_median(view.once(update_ratios)))


def _rates(view: View) -> NDArray[Any]:
    """Return the learning rate of each parameter, [T]; NaN where it isn't known."""
    latest = {name: float(points.values[-1]) for name, points in view.learning_rates.items() if len(points)}
    if "lr" in latest:
        return np.full(len(view.layout.infos), latest["lr"])
    if not latest:
        return np.full(len(view.layout.infos), np.nan)
    return np.array([latest.get(f"lr/{info.group}", np.nan) for info in view.layout.infos])
