"""How far a step moves the weights, relative to their size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..evidence import Finding, Float64Array, View, finite_median, median, rule
from ..history import update_ratios as relative

ADAPTIVE: Final = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Lion")
"""Optimizers whose elements move by about the learning rate, whatever the gradient."""

PLAIN: Final = ("SGD",)
"""Optimizers that move by the learning rate times the gradient."""


def optimizer_kind(view: View) -> str:
    """Return "adaptive", "plain", or "" where the optimizer isn't known or is neither.

    ``meta["optimizer_kind"]`` says what a subclass or a wrapper is in the end; else the class's name does.
    """
    known = view.meta.get("optimizer_kind")
    name = view.meta.get("optimizer")
    kind = known if isinstance(known, str) and known else name if isinstance(name, str) else ""
    return "adaptive" if kind in ADAPTIVE or kind == "adaptive" else "plain" if kind in PLAIN or kind == "plain" else ""


def update_ratios(view: View) -> Float64Array:
    """Return |update| / |weight| of each weight matrix at the last drain, [W]; NaN where it can't be told.

    As it was measured (``Tracker(weights_every=...)``) in one of the last 64 intervals. Otherwise an estimate:
    lr * |gradient| / |weight| for SGD, 1 / (1 - momentum) times that with ``meta["momentum"]`` (as far as it gets where
    gradients agree) and with the gradient that clipping at ``meta["clip_threshold"]`` leaves; lr * sqrt(elements) /
    |weight| for Adam and its kin. Weights that began at zero (the second matrix of a LoRA pair) are left out, and so
    are those without a gradient. Weights that were measured long ago are taken to have grown since as those of a random
    walk do: by the root of the steps.
    """
    weights = view.layout.weights
    measured_ratios = _measured(view)
    if measured_ratios is not None:
        return measured_ratios
    kind = optimizer_kind(view)
    if not kind or view.interval_stop == 0 or not len(weights):
        return np.full(len(weights), np.nan)
    measured = view.parameters.field("weight_norm")
    size = view.field("weight_norm")[0, weights].astype(np.float64)
    momentum = float(view.meta.get("momentum") or 0.0)
    norms = view.weight_norms
    moved = norms * _clipping(view) / max(1.0 - momentum, 1e-3) if kind == "plain" else view.layout.root[weights]
    step = _rates(view)[weights] * moved
    grown = np.sqrt(size * size + _steps_since_measured(view) * step * step)
    known = (size > 0) & (measured[0, weights] > 0) & np.isfinite(norms)
    return np.where(known, step / grown, np.nan)


def typical_update(view: View) -> float:
    """Return the median of ``update_ratios``, NaN where it can't be told."""
    return float(finite_median(view.once(update_ratios)))


def _measured(view: View) -> Float64Array | None:
    """Return the ratios of the latest step that was measured, [W]; None where none was in the last 64 intervals."""
    updates = view.field("update_norm", 64)[:, view.layout.weights]
    where = np.flatnonzero(np.isfinite(updates).any(axis=1))
    if not len(where):
        return None
    ratios = relative(updates[where[-1]], view.field("weight_norm", 64)[where[-1], view.layout.weights])
    began_at_zero = view.parameters.field("weight_norm")[0, view.layout.weights] == 0
    return np.where(began_at_zero, np.nan, ratios)


def _clipping(view: View) -> float:
    """Return what clipping leaves of a gradient of the usual norm, as a share."""
    threshold = view.meta.get("clip_threshold")
    norms = view["grad_norm"].tail(20).values
    norms = norms[np.isfinite(norms)]
    if not isinstance(threshold, (int, float)) or not threshold > 0 or not len(norms):
        return 1.0
    return float(min(1.0, threshold / max(median(norms), 1e-300)))


def _steps_since_measured(view: View) -> int:
    """Return how many steps ago the weights were measured, as far as the last 64 intervals tell."""
    if not len(view.layout.weights):
        return 0
    norms = view.field("weight_norm", 64)[:, view.layout.weights[:8]]
    same = (norms == norms[-1]).all(axis=1)
    first = len(norms) - int(np.argmin(same[::-1])) if not same.all() else 0
    place = view.interval_stop - len(norms) + min(first, len(norms) - 1)
    return int(view.parameters.last_step[view.interval_stop - 1] - view.parameters.first_step[place])


def _rates(view: View) -> NDArray[Any]:
    """Return the learning rate of each parameter, [T]; NaN where it isn't known."""
    latest = {name: float(points.values[-1]) for name, points in view.learning_rates.items() if len(points)}
    groups = np.array([latest.get(f"lr/{info.group}", np.nan) for info in view.layout.infos])
    return groups if np.isfinite(groups).any() else np.full(len(groups), latest.get("lr", np.nan))


@rule
def update_ratio(view: View, high: float = 0.1, low: float = 1e-6, patience: int = 50) -> Iterator[Finding]:
    """A step changes the weights by far more or far less than a thousandth of their size, and the loss doesn't fall.

    The median over weight matrices of |update| / |weight|, as ``Tracker(weights_every=...)`` has measured it; otherwise
    lr * |gradient| / |weight| for SGD, and lr * sqrt(elements) / |weight| for Adam and its kin, whose elements move by
    about lr. About 1e-3 is usual (Karpathy, CS231n), but what counts is the loss: while it falls long steps are
    information, and a warning is taken back. Too low is only said while the loss is above half of the initial one and
    no schedule has taken the learning rate down.

    Args:
        view: what to judge.
        high: ratio that is too high.
        low: ratio that is too low.
        patience: losses that a training has to begin to fall, unless they rise, before it is a warning.
    """
    ratios, ratio = view.once(update_ratios), view.once(typical_update)
    if not np.isfinite(ratio):
        view.cannot_judge("nothing was measured (weights_every), nor are optimizer, learning rate and weights known")
        return
    if view.previous is not None and view.previous.rank and view.learns:
        view.withdraw(f"the loss fell to {view.course.now:.4g} by {view.unit} {view.stop - 1} all the same")
    recent = view.loss.tail(20).values
    unsolved = len(recent) > 0 and not median(recent) <= 0.5 * abs(view.initial_loss)
    too_high, too_low = ratio > high, 0.0 < ratio < low and unsolved and not _decayed(view)
    if not (too_high or too_low):
        return
    weights = view.layout.weights
    order = np.argsort(-ratios if too_high else ratios)  # NaN comes last
    early = len(view.loss) < patience and not view.course.now > 1.2 * abs(view.course.start)
    harmless = too_low or view.learns or early or not len(view.loss) or bool(view.objective)
    yield view.finding(
        "info" if harmless else "warning",
        f"a step changes the median weight matrix by {ratio:.2g} of its size; about 1e-3 is usual"
        + (", and the loss falls" if view.learns else ""),
        first_step=int(view.parameters.first_step[view.interval_stop - 1]),
        parameters=tuple(view.layout.infos[place].name for place in weights[order[:3]]),
        cause=f"the learning rate is too {'high' if too_high else 'low'} for these weights",
        action=_advice(too_high, view),
        numbers={"ratio": ratio},
    )


def _advice(too_high: bool, view: View) -> str:
    if view.learns:
        return "nothing while the loss falls; if it stops or swings, try a learning rate 3 times lower"
    if too_high:
        return "lower the learning rate 3- to 10-fold, one try at a time; the loss says which is best"
    return "raise the learning rate 3- to 10-fold, one try at a time; the loss says which is best"


def _decayed(view: View) -> bool:
    """Tell whether a schedule has brought the learning rate below a tenth of where it was."""
    return any(
        len(points) and points.values[-1] < 0.1 * points.values[:: max(1, len(points) // 64)].max()
        for points in view.learning_rates.values()
    )
