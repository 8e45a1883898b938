"""What is true of a training, from measurements that no rule sees, beside a healthy twin.

Planting a trouble doesn't make it happen: 40 samples may be enough, and an Adam that is told to run 100 times too
slowly may still arrive. So the benchmark watches each training by other means: the loss of the same 128 training
samples, without dropout, before every step (the *probe*), and gradient norms by torch in float64. Each training has a
*twin*: the same model, data, optimizer and seed with nothing planted. ``facts`` says of the five rules of the table,
and of ``loss_spike``, whether they hold: True, False, or None where it is a matter of taste.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Facts = Mapping[str, bool | None]
HURT = "hurt"  # not a rule: whether the training ended worse than its twin


@dataclass
class Observed:
    """Measurements of one training."""

    probe: list[float] = field(default_factory=list)  # by step, before it
    losses: list[float] = field(default_factory=list)  # of the batches, by step
    norms: list[float] = field(default_factory=list)  # of all gradients, by step
    first_norms: list[float] = field(default_factory=list)  # of the first weight matrix, by step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    corrupted: list[int] = field(default_factory=list)  # steps whose batch was


def between(value: float, no: float, yes: float) -> bool | None:
    """Return True from ``yes`` on, False up to ``no``, None between the two and for NaN."""
    return None if math.isnan(value) else True if value >= yes else False if value <= no else None


def facts(seen: Observed, twin: Observed) -> dict[str, bool | None]:
    """Return what holds of a training."""
    probe = _until_not_finite(seen.probe)
    return {
        "loss_not_decreasing": _not_decreasing(probe, _until_not_finite(twin.probe)),
        "loss_oscillating": between(_rises(probe), 0.2, 1.5),
        "overfitting": _overfitting(seen, probe),
        "gradient_exploding": _exploding(seen, twin),
        "gradient_vanishing": _vanishing(seen, twin),
        "loss_spike": _spike(seen, probe),
        "loss_diverged": _diverged(seen, probe),
        HURT: _worse(seen, twin),
    }


def _until_not_finite(values: list[float]) -> NDArray[np.float64]:
    array = np.array(values)
    bad = np.flatnonzero(~np.isfinite(array))
    return array[: bad[0]] if len(bad) else array


def _largest(norms: list[float]) -> float:
    return float(_until_not_finite(norms).max(initial=0.0))


def _not_decreasing(probe: NDArray[np.float64], twin: NDArray[np.float64]) -> bool | None:
    """The probe falls by at most 7 % of its first value, in any 20 steps, and by half of what the twin does.

    False: it falls by 20 %. None where it rose by a fifth instead.
    """
    if len(probe) < 20 or not probe[0] > 0:
        return None
    levels, usual = (_levels(each) for each in (probe, twin))
    if levels[-1] > 1.2 and levels.min() > 0.8:
        return None
    fallen = 1.0 - float(levels.min())
    holds = between(-fallen, -0.2, -0.07)
    return None if holds and fallen > 0.5 * (1.0 - float(usual.min())) else holds


def _levels(probe: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return running medians over 20 steps, by the first value."""
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(probe, 20), axis=1) / probe[0])


def _rises(probe: NDArray[np.float64], width: int = 50) -> float:
    """Return the sum of the probe's rises within ``width`` steps, the largest there is, by its first value."""
    if len(probe) < 2 or not probe[0] > 0:
        return math.nan
    with np.errstate(over="ignore"):
        risen = np.append(0.0, np.cumsum(np.maximum(np.diff(probe), 0.0) / probe[0]))
    width = min(width, len(risen) - 1)
    return float(np.max(risen[width:] - risen[:-width]))


def _overfitting(seen: Observed, probe: NDArray[np.float64]) -> bool | None:
    """The last three validation losses are above the lowest three in a row, and the probe has fallen since.

    Above: by 20 %, and by 5 % of the first one.
    """
    steps, losses = (np.array(column) for column in zip(*seen.validation, strict=True))
    if not np.isfinite(losses).all() or len(probe) < len(seen.probe) or not losses.any():
        return None
    means = np.convolve(losses, np.ones(3) / 3, "valid")
    best = int(means.argmin())
    if best + 3 >= len(means):
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        risen = between(float(means[-1] / means[best]), 1.05, 1.2)
    if risen and means[-1] - means[best] < 0.05 * losses[0]:
        risen = None  # of a loss that is nearly gone
    fallen = probe[-10:].mean() < 0.98 * probe[steps[best + 1] :][:10].mean()
    return risen if fallen or risen is False else None


def _exploding(seen: Observed, twin: Observed) -> bool | None:
    """The largest norm is 100 times that of the twin; False: at most 10 times, and 5 times its own of 20 steps."""
    holds = between(_largest(seen.norms) / _largest(twin.norms), 10.0, 100.0)
    return None if holds is False and _largest(seen.norms) > 5.0 * _largest(seen.norms[:20]) else holds


def _vanishing(seen: Observed, twin: Observed) -> bool | None:
    """The gradient of the first weight matrix, in the first 100 steps, is a thousandth of the twin's."""
    ratio = float(np.median(seen.first_norms[:100]) / np.median(twin.first_norms[:100]))
    return between(-math.log10(ratio), 1.0, 3.0) if 0 < ratio < math.inf else None


def _diverged(seen: Observed, probe: NDArray[np.float64]) -> bool | None:
    """The last fifth of the probe is above its lowest level by half of what had been gained, or not finite."""
    if len(probe) < len(seen.probe):
        return True
    if len(probe) < 50 or not probe[0] > 0:
        return None
    levels = np.median(np.lib.stride_tricks.sliding_window_view(probe, 20), axis=1)
    lost = float(np.median(probe[-len(probe) // 5 :]) - levels.min()) / max(
        float(probe[0] - levels.min()), 0.3 * probe[0]
    )
    return between(lost, 0.1, 0.5)


def _worse(seen: Observed, twin: Observed) -> bool | None:
    """The probe ends at twice the twin's level, and 5 % of the first one above it; False: at most at 1.1 times."""
    ours, theirs = (_until_not_finite(each.probe[-20:]) for each in (seen, twin))
    if len(ours) < 20:
        return True
    ratio = float(np.median(ours) / max(np.median(theirs), 1e-12))
    if np.median(ours) < np.median(theirs) + 0.05 * seen.probe[0]:
        return False if ratio < 1.1 else None
    return between(ratio, 1.1, 2.0)


def _spike(seen: Observed, probe: NDArray[np.float64]) -> bool | None:
    """A corrupted batch has twice the largest loss of the 50 before.

    False: no batch has 3 times their median, and the probe doesn't swing.
    """
    losses = np.array(seen.losses)
    if any(losses[step] >= 2.0 * losses[step - 50 : step].max() for step in seen.corrupted):
        return True
    usual = np.array([np.median(losses[step - 50 : step]) for step in range(50, len(losses))])
    calm = np.isfinite(losses).all() and (losses[50:] <= 3.0 * usual).all() and not _rises(probe) > 0.2
    return False if calm else None
