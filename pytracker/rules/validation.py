"""The validation loss beside the training loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..evidence import (
    MAD_TO_SIGMA,
    Finding,
    Float64Array,
    Points,
    Slope,
    View,
    finite_only,
    median,
    rule,
    running_median,
    theil_sen,
    thin,
)

_OF_A_MEDIAN = 1.2533  # its standard error, by that of a mean, of normal values: the root of pi / 2
_VERY_SURE = 3.3  # standard deviations: one in a thousand


@dataclass(frozen=True)
class _Training:
    """The training loss since some step."""

    start: float
    end: float
    falls: bool  # or is nearly gone


@dataclass(frozen=True)
class _Evaluations:
    """The validation loss since its lowest point, and the training loss over the same steps."""

    steps: Float64Array
    values: Float64Array
    best: int
    lowest: float
    now: float
    error: float  # standard error of now - lowest
    slope: Slope
    gained: float  # by the validation loss or the training loss until the lowest point, whichever is more
    training: _Training

    def certain(self, noise: float) -> bool:
        """Tell whether the rise is more than chance: by its level, which stays, or by the trend of many."""
        after = slice(self.best + 2, None)  # the lowest was chosen, so it and its neighbour are low by chance
        if len(self.values[after]) >= 12 and theil_sen(self.steps[after], self.values[after], _VERY_SURE).low > 0:
            return True
        later = self.values[self.best :][-max(3, (len(self.values) - self.best) // 2) :]
        stays = (later > self.lowest + 0.5 * (self.now - self.lowest)).mean() >= 0.75
        return bool(stays and self.now >= self.lowest + noise * self.error)

    @property
    def lost(self) -> float:
        """The share of what had been gained that is lost again."""
        return (self.now - self.lowest) / self.gained if self.gained > 0 else float("inf")

    def finding(self, view: View, severity: str) -> Finding:
        """Return the rise in words."""
        risen = 100 * (self.now / self.lowest - 1)
        shares = [f"+{risen:.0f} %"] if np.isfinite(risen) else []
        shares += [f"{100 * self.lost:.0f} % of what it had gained"] if self.lost < 10 else []
        best = f"{self.steps[self.best]:.0f}"
        return view.finding(
            severity,
            f"the validation loss rose from {self.lowest:.4g} at {view.unit} {best} to {self.now:.4g}"
            + (f" ({', '.join(shares)})" if shares else "")
            + f" while the training loss went from {self.training.start:.4g} to {self.training.end:.4g}",
            first_step=int(self.steps[self.best]),
            cause="overfitting: the model learns the training set by heart",
            action=f"stop at {view.unit} {best}, or add regularisation (weight decay, dropout, augmentation), get more "
            "data, reduce the model",
            numbers=finite_only(
                best=self.lowest,
                now=self.now,
                best_step=self.steps[self.best],
                lost=self.lost,
                slope=self.slope.estimate,
            ),
        )


@rule
def overfitting(
    view: View,
    rise: float = 0.03,
    large: float = 0.1,
    noise: float = 4.0,
    lost: float = 0.05,
    evaluations: int = 4,
    flat: float = 0.25,
) -> Iterator[Finding]:
    """The validation loss rises while the training loss falls.

    The last quarter of the validation losses since their lowest point (of a running median over 3) is above it by
    ``rise`` of it (Prechelt's generalisation loss), and by ``noise`` standard errors, and most of the later half is, or
    12 evaluations have a Theil-Sen slope that is above zero for very sure; that for at least ``evaluations`` of them
    (his UP criterion); and the training loss falls over the same steps, or is nearly gone. It
    is a warning where the rise is ``large`` and ``lost`` of what the validation loss had gained since the start (of its
    own, or of the training loss) is lost again, unless the validation accuracy is as good as ever, and information
    before. A validation loss that stays where it is while the training loss falls by ``flat`` is information. It is
    taken back where the validation loss falls below its lowest point.

    Args:
        view: what to judge.
        rise: relative rise above the lowest validation loss, to be worth knowing.
        large: the same, for a warning.
        noise: rise in standard errors, as the median difference of successive evaluations tells.
        lost: share of the improvement that is lost again, for a warning.
        evaluations: how many must follow the lowest one.
        flat: fall of the training loss while the validation loss stays.
    """
    if not len(view.validation):
        view.cannot_judge(view.lacks("validation loss"))
        return
    if not len(view.loss):
        view.cannot_judge(view.lacks("training loss"))
        return
    found = _measure(view, evaluations)
    if found is None:
        view.cannot_judge(f"{len(view.validation)} validation losses are too few, or none is a number")
        return
    if found.lowest <= 0:
        view.cannot_judge("the validation loss is zero or negative, so a rise has no scale")
        return
    if view.previous is not None and found.steps[found.best] > view.previous.last_step:
        view.withdraw(f"the validation loss fell to {found.lowest:.4g} at {view.unit} {found.steps[found.best]:.0f}")
    follow = len(found.values) - found.best > evaluations
    if follow and found.now >= (1 + rise) * found.lowest and found.training.falls and found.certain(noise):
        big = found.now >= (1 + large) * found.lowest and found.lost >= lost and not _accuracy_holds(view)
        yield found.finding(view, "warning" if big else "info")
    else:
        yield from _stays(view, found, flat)


def _measure(view: View, evaluations: int) -> _Evaluations | None:
    finite = np.isfinite(view.validation.values)
    if finite.sum() <= evaluations:
        return None
    steps, values = thin(view.validation.steps[finite], view.validation.values[finite])
    if len(values) <= evaluations:
        return None
    smooth = running_median(values, 3) if len(values) >= 6 else values.copy()
    smooth[0] = min(smooth[0], values[0])
    best = int(np.argmin(smooth))
    after = values[best:]
    changes = np.diff(values[max(0, best - 1) :])
    usual = MAD_TO_SIGMA * median(np.abs(changes - median(changes))) / 2.0**0.5 if len(changes) else 0.0
    last = max(3, len(after) // 4)
    return _Evaluations(
        steps,
        values,
        best,
        lowest=float(smooth[best]),
        now=median(values[-last:]),
        error=usual * _OF_A_MEDIAN * (1 / last + 1 / 3) ** 0.5,
        slope=theil_sen(steps[best:], after) if len(after) > 1 else Slope(0.0, 0.0, 0.0),
        gained=max(float(values[0]), view.initial_loss) - float(smooth[best]),
        training=_training_since(view, float(steps[best])),
    )


def _training_since(view: View, step: float) -> _Training:
    """Return the training loss around ``step`` and now, and whether it fell between the two or is nearly gone."""
    loss = view.loss
    after = Points(loss.steps[loss.index(int(step)) :], loss.values[loss.index(int(step)) :])
    centres, middles = thin(after.steps, after.values, bins=32)
    if len(middles) < 4:
        return _Training(float("nan"), float("nan"), False)
    quarter = max(1, len(middles) // 4)
    start, end = median(middles[:quarter]), median(middles[-quarter:])
    falls = theil_sen(centres, middles).estimate < 0 and end < start
    return _Training(start, end, bool(falls or end < 0.05 * abs(view.initial_loss)))


def _accuracy_holds(view: View) -> bool:
    """Tell whether the validation accuracy is as good as it ever was: then the loss shows overconfidence alone."""
    values = view.accuracy.values[np.isfinite(view.accuracy.values)]
    if len(values) < 5:
        return False
    smooth = running_median(values, 3)
    highest, now = float(smooth.max()), median(values[-3:])
    scale = 1.0 if highest <= 1.0 else 100.0
    return now >= highest - 0.005 * scale


def _stays(view: View, found: _Evaluations, flat: float) -> Iterator[Finding]:
    """Say that the validation loss no longer follows: it stays within 2 % of its lowest while the other falls."""
    smooth = running_median(found.values, 3)
    begin = int(np.argmax(smooth <= 1.02 * found.lowest))
    count = len(smooth) - begin
    if count < 8 or count < 0.5 * len(smooth) or (found.now < 0.99 * float(smooth[begin]) and count < 16):
        return
    training = _training_since(view, float(found.steps[begin]))
    if not training.falls or not training.end <= (1 - flat) * training.start or _accuracy_rises(view, begin):
        return
    if training.start < 0.05 * abs(view.initial_loss):
        return  # both are nearly gone
    yield view.finding(
        "info",
        f"the validation loss has stayed near {found.lowest:.4g} since {view.unit} {found.steps[begin]:.0f} while the "
        f"training loss fell from {training.start:.4g} to {training.end:.4g}",
        first_step=int(found.steps[begin]),
        cause="the model learns what doesn't help on the validation data",
        action="more training will hardly help; regularisation, or more data, may",
        numbers=finite_only(now=found.now, train_start=training.start, train_end=training.end),
    )


def _accuracy_rises(view: View, begin: int) -> bool:
    values = view.accuracy.values[np.isfinite(view.accuracy.values)][begin:]
    if len(values) < 8:
        return False
    third = len(values) // 3
    scale = 1.0 if median(values) <= 1.0 else 100.0
    return median(values[-third:]) > median(values[:third]) + 0.02 * scale
