"""Rules about the level of the loss: does it fall, does it stay high, does it swing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..evidence import (
    MAD_TO_SIGMA,
    Course,
    Finding,
    Float64Array,
    Points,
    Slope,
    View,
    blocks_of,
    finite_only,
    median,
    medians,
    rule,
    running_median,
    theil_sen,
    thin,
)
from .updates import typical_update

_OF_A_MEDIAN = 1.2533  # its standard error, by that of a mean, of normal values: the root of pi / 2
_NONE = Points(np.empty(0, np.int64), np.empty(0))
_NOT_MEANT_TO_FALL = {
    "adversarial": "the loss of one of two players is not meant to fall",
    "reinforcement": "the loss of a policy or of a value target that moves doesn't say how good it is",
}


def judgeable(view: View, *, signed: bool) -> bool:
    """Tell whether the loss can be judged by its level; where it can't, the view notes why.

    ``signed``: whether a loss that is negative somewhere can.
    """
    if not len(view.loss):
        view.cannot_judge(view.lacks("training loss"))
    elif view.objective:
        view.cannot_judge(_NOT_MEANT_TO_FALL.get(view.objective, f"the objective is {view.objective}"))
    elif view.signed and not signed:
        view.cannot_judge("the loss is negative somewhere, so its level is no scale")
    else:
        return True
    return False


@dataclass(frozen=True)
class _Fall:
    """How a loss went from its first values to its last quarter, and the slope of its medians."""

    start: float
    end: float
    slope: Slope
    span: float
    count: int
    head: int
    first: int
    last: int

    @property
    def most(self) -> float:
        """The most that it can have fallen, as a share of where it began."""
        return -self.slope.low * self.span / max(abs(self.start), 1e-300)

    @property
    def sure(self) -> bool:
        """Whether it falls for sure."""
        return self.slope.high < 0

    def finding(self, view: View, severity: str) -> Finding:
        """Return it in words."""
        estimate, low, high = self.slope
        return view.finding(
            severity,
            f"the loss was {self.start:.4g} in the first {self.head} of {self.count} values and {self.end:.4g} in the "
            f"last quarter; its slope is {estimate:.3g} for each {view.unit} (95 %: {low:.3g} to {high:.3g}), "
            f"a decrease of at most {100 * max(0.0, self.most):.1f} %",
            first_step=self.first,
            last_step=self.last,
            cause="the learning rate is too low, or the loop has a bug: no optimizer step, detached loss, wrong labels",
            action="check that optimizer.step() runs and that labels match inputs; overfit one batch; then raise the "
            f"learning rate{lr_now(view)} 3-fold",
            numbers=finite_only(start=self.start, end=self.end, slope=estimate, low=low, high=high),
        )


@rule
def loss_not_decreasing(
    view: View,
    steps: int = 150,
    points: int = 8,
    decrease: float = 0.08,
    slowly: float = 0.08,
    unsure: float = 0.25,
    long: float = 0.1,
) -> Iterator[Finding]:
    """The training loss never went down.

    Said when two tests agree. By level: no block of at least 20 losses, nor all after the first 20 together, has a
    median that is below that of the first 4, or of the first 16, by ``decrease`` of it and by 4 standard errors. By
    trend: Theil and Sen's slope over at most 64 medians of blocks has a 95 % interval whose steep end is a decrease of
    less than ``slowly`` of the initial loss, or that contains zero and whose steep end is less than ``unsure``. A
    validation loss that has fallen by ``decrease``, or an accuracy that has risen, is less noisy, and believed. A loss
    that is NaN or Inf, has risen by half, or whose steps are too long, is another trouble: there a higher learning rate
    would do harm. It is taken back where the loss falls after all.

    Args:
        view: what to judge.
        steps: no judgement before so many steps, nor while the learning rate still rises; ``points`` epochs will do,
            and a validation loss that has been flat for ``points`` evaluations.
        points: no judgement of fewer losses.
        decrease: the share of the initial loss that a training must have gained by then.
        slowly: the same, for a loss that falls for sure, and will go on.
        unsure: the decrease that must be ruled out where the losses vary so much that none can be seen.
        long: nothing is said while a step changes the median weight matrix by more than this share of its size.
    """
    if not judgeable(view, signed=True):
        return
    if view.signed:
        if not view.learns:
            view.cannot_judge("the loss is negative somewhere: how far it should fall has no scale")
        return
    if view.previous is not None and view.learns:
        view.withdraw(f"the loss fell to {view.course.now:.4g} by {view.unit} {view.loss.steps[-1]}")
        return
    loss = view.loss
    if len(loss) < points or not (_is_long(loss, steps, points, view.unit) or _is_flat(view.validation, points)):
        view.cannot_judge(f"{len(loss)} losses within {_span(loss)} {view.unit}s are too few")
        return
    fall = None if _warming_up(view) else _measure_fall(loss)
    if fall is None or fall.end > 1.5 * fall.start or view.once(typical_update) > long:
        return
    if _has_fallen(loss.values, decrease, averaged=len(loss) < 0.5 * _span(loss) or view.unit == "epoch"):
        return
    if fall.most >= (slowly if fall.sure else unsure) or _validation_has_improved(view, decrease):
        return
    known = np.isfinite(view.once(typical_update))
    yield fall.finding(view, "info" if fall.sure and not known else "warning")


def _is_long(loss: Points, steps: int, points: int, unit: str) -> bool:
    return _span(loss) >= (points if unit == "epoch" else steps)


def _span(points: Points) -> int:
    return int(points.steps[-1] - points.steps[0] + 1) if len(points) else 0


def _is_flat(validation: Points, points: int, share: float = 0.02) -> bool:
    """Tell whether so many evaluations differ by no more than ``share`` and show no trend downwards."""
    values = validation.values[np.isfinite(validation.values)]
    if len(values) < points:
        return False
    centres, middles = thin(np.arange(len(values)), values)
    slope, level = theil_sen(centres, middles), abs(median(values))
    return bool(np.ptp(middles) <= share * level and slope.high >= 0)


def _measure_fall(loss: Points) -> _Fall | None:
    """Return how the loss went, or None where too few of its values are finite."""
    centres, middles = thin(loss.steps, loss.values)
    head = loss.values[: min(16, max(4, len(loss) // 8))]
    if len(middles) < 8 or not np.isfinite(head).all() or not np.isfinite(loss.values[-min(10, len(head)) :]).all():
        return None
    start, end = median(head), median(middles[-max(3, len(middles) // 4) :])
    span = float(centres[-1] - centres[0])
    steps = loss.steps
    return _Fall(start, end, theil_sen(centres, middles), span, len(loss), len(head), int(steps[0]), int(steps[-1]))


def _has_fallen(values: Float64Array, decrease: float, *, averaged: bool) -> bool:
    """Tell whether some block of losses is for sure below the first ones, by ``decrease`` of those.

    ``averaged``: each value is a mean over several steps, so that the very first one may be compared with.
    """
    if averaged and len(values) >= 6 and np.isfinite(values[0]):
        rest = values[len(values) // 2 :][np.isfinite(values[len(values) // 2 :])]
        gained = values[0] - median(rest)
        if gained >= max(decrease * abs(values[0]), 3.0 * float(np.std(rest))):
            return True
    if len(values) < 40:
        return False
    blocks, deviation = blocks_of(values)
    rest = values[20:][np.isfinite(values[20:])]
    levels = np.append(blocks, median(rest))
    counts = np.append(np.full(len(blocks), 20), len(rest))
    for first in (values[:4], values[:16]):
        start = median(first)
        sure = 4.0 * _OF_A_MEDIAN * deviation * np.sqrt(1 / len(first) + 1 / counts)
        gains = start - levels
        if ((gains > sure) & (gains >= decrease * abs(start))).any():
            return True
    return False


def _validation_has_improved(view: View, decrease: float) -> bool:
    """Tell whether the later half of at least 6 evaluations is better than the first two.

    The loss by ``decrease`` of them, the accuracy by that much of what was wrong.
    """
    for points, sign in ((view.validation, 1.0), (view.accuracy, -1.0), (view["accuracy"], -1.0)):
        values = points.values[np.isfinite(points.values)]
        if len(values) < 6:
            continue
        start, later = median(values[:2]), median(values[len(values) // 2 :])
        room = abs(start) if sign > 0 else (1.0 if abs(start) <= 1.0 else 100.0) - start
        if sign * (start - later) >= max(decrease * room, 1e-300):
            return True
    return False


@dataclass(frozen=True)
class _Rise:
    """A loss that rose from its lowest level and stayed there."""

    begin: int  # among the stretches
    first: int  # step at which it had risen
    lowest: float
    at: int  # step of the lowest level
    now: float
    lost: float  # share of what had been gained since the start; Inf where nothing had
    start: float


@rule
def loss_diverged(
    view: View, lost: float = 0.3, above: float = 1.5, stays: float = 0.1, points: int = 20, short: float = 0.03
) -> Iterator[Finding]:
    """The training loss rose far above its lowest level, or above where it began, and stays there.

    Levels are medians of at most 64 stretches. Said where the last third of them since the lowest is above the lowest
    by ``lost`` of what had been gained, and by 6 deviations of a level, has been for ``stays`` of the training and
    ``points`` losses, and does not fall again; or is ``above`` times the initial loss. Or no level but the first is
    less than twice ``above`` times the initial loss, and they do not fall. Or the last losses are all NaN or Inf. It
    is taken back where the loss comes down again. A loss that is not meant to fall is not judged; one that rises from
    the beginning although steps are short may have targets that move, and is information.

    Args:
        view: what to judge.
        lost: share of the gain that is lost again.
        above: times the initial loss, where nothing had been gained.
        stays: share of the training for which it must have been there.
        points: so many losses must be there; a quarter as many epochs.
        short: steps that change the median weight matrix by less than this don't make a loss diverge that has never
            fallen.
    """
    if not judgeable(view, signed=True):
        return
    gone = _not_finite_since(view.loss)
    if gone is not None:
        yield _lost_for_good(view, gone)
        return
    enough = points if view.unit != "epoch" else max(3, points // 4)
    rise = _measure_rise(view, lost, above, stays, enough) or _jump(view, 2.0 * above, enough)
    if rise is None:
        if view.previous is not None and view.learns:
            view.withdraw(f"the loss came down to {view.course.now:.4g} by {view.unit} {view.loss.steps[-1]}")
        return
    calm = view.once(typical_update) < short and rise.lost == float("inf")
    worse = rise.now >= rise.start or rise.lost >= 0.5
    share = f", {100 * rise.lost:.0f} % of what it had gained" if np.isfinite(rise.lost) else ""
    yield view.finding(
        "info" if calm else "critical" if worse else "warning",
        f"the loss rose from {rise.lowest:.4g} at {view.unit} {rise.at} to {rise.now:.4g} and stays there{share}; "
        f"it began at {rise.start:.4g}",
        first_step=rise.first,
        last_step=int(view.loss.steps[-1]),
        cause=(
            "the task got harder, the targets moved, or the training diverged"
            if calm
            else "the training diverged: the learning rate is too high, or one step went too far"
        ),
        action=(
            ("begin again" if rise.begin < 2 else f"go back to a checkpoint before {view.unit} {rise.first}")
            + f", lower the learning rate{lr_now(view)} 3- to 10-fold, warm it up, clip gradients"
        ),
        numbers=finite_only(lowest=rise.lowest, now=rise.now, start=rise.start, lost=rise.lost),
    )


def _not_finite_since(loss: Points) -> int | None:
    """Return the step since which no loss is finite, where that are 3 at least and one was before; else None."""
    if np.isfinite(loss.values[-3:]).any() or len(loss) < 4:
        return None
    finite = np.flatnonzero(np.isfinite(loss.values))
    return int(loss.steps[finite[-1] + 1]) if len(finite) else None


def _lost_for_good(view: View, since: int) -> Finding:
    loss = view.loss
    before = loss.values[: loss.index(since)]
    return view.finding(
        "critical",
        f"the loss is not finite at any {view.unit} since {since}; before it was {before[-1]:.4g}",
        first_step=since,
        last_step=int(loss.steps[-1]),
        cause="weights that are NaN or Inf: an overflow, a division by zero, or a step that went too far",
        action=f"go back to a checkpoint before {view.unit} {since}; lower the learning rate{lr_now(view)} 3- to "
        "10-fold, clip gradients",
        numbers=finite_only(last=before[-1], since=since),
    )


def _measure_rise(view: View, lost: float, above: float, stays: float, points: int) -> _Rise | None:
    """Return how the loss rose for good, or None where it did not."""
    course = view.course
    levels, steps = course.levels, course.steps
    if len(levels) < 6 or len(view.loss) < points or not np.isfinite(course.deviation):
        return None
    place = course.place
    after = levels[place:]
    now, start = median(after[-max(3, len(after) // 3) :]), course.start
    gained, risen = start - course.lowest, now - course.lowest
    share = risen / gained if gained > 0.1 * abs(start) else float("inf")
    high = np.flatnonzero(levels[place:] < course.lowest + 0.5 * risen)
    begin = place + (int(high[-1]) + 1 if len(high) else 0)
    width = max(1.0, len(view.loss) / len(levels))
    enough = max(3.0, points / width, stays * len(levels))
    if (
        not risen > 6.0 * course.error
        or len(levels) - begin < enough
        or not _is_worse(view, course, now, share, lost, above)
    ):
        return None
    slope = theil_sen(steps[begin:], levels[begin:])
    if slope.high < 0:  # it comes down again
        return None
    return _Rise(begin, int(steps[begin]), course.lowest, int(steps[place]), now, share, start)


def _jump(view: View, above: float, points: int) -> _Rise | None:
    """Return how the loss left where it began in its first steps, never to come back; None where it did not.

    However it swings up there: a level that is nowhere near the first losses needs no standard error.
    """
    course = view.course
    levels, start = course.levels, course.start
    if view.signed or len(levels) < 6 or len(view.loss) < points or not levels[1:].min() >= above * start > 0:
        return None
    if theil_sen(course.steps[1:], levels[1:]).high < 0:  # it comes down again
        return None
    steps, values = view.loss.steps, view.loss.values
    first = int(steps[np.argmax(values >= above * start)])
    return _Rise(1, first, start, int(steps[0]), course.now, float("inf"), start)


def _is_worse(view: View, course: Course, now: float, share: float, lost: float, above: float) -> bool:
    if view.signed:  # no level is a scale: it must be above where it began, by more than it had ever gained
        return bool(now - course.start > max(course.start - course.lowest, 10.0 * course.deviation))
    if share == float("inf"):
        return bool(now >= above * course.start > 0)
    return bool(share >= lost and now >= 1.3 * course.lowest)


@rule
def loss_oscillating(
    view: View, threshold: float = 0.7, sure: float = 0.12, long: float = 0.1, window: int = 50, blow_up: float = 3.0
) -> Iterator[Finding]:
    """The training loss swings wildly, or runs away.

    In windows of ``window`` losses: residuals from the running median over 15 of them; 1.4826 times their median
    absolute value, divided by the local level. The level is at least 0.3 times the initial loss: noise of a loss that
    is nearly gone is no trouble. Residuals alone can't tell small batches from long steps: where the update ratio is
    known, long steps have a lower threshold and the level is at most the initial loss, and short ones are worth a
    piece of information only, as are swings below where the loss began where it isn't known, or while the loss falls.
    A loss that rises ``blow_up``-fold within the first 20, or within the 5 before it is NaN or Inf, counts as well. It
    is taken back where the loss has come to rest at less than half of the level that it swung around.

    Args:
        view: what to judge.
        threshold: the relative scale of residuals from which on the loss oscillates.
        sure: the same, while a step changes the median weight matrix by more than ``long`` of its size.
        long: see ``sure``.
        window: losses that are judged together.
        blow_up: the rise above the initial loss that is one swing too many.
    """
    if not judgeable(view, signed=False):
        return
    start = abs(view.initial_loss)
    if not start > 0:
        view.cannot_judge("the loss begins at zero, so it has no scale to swing by")
        return
    ratio = view.once(typical_update)
    noisy = ratio <= long  # so short a step cannot make the loss swing
    yield from _blows_up(view, start, blow_up, noisy)
    recent = view.loss.since(view.since, window)
    finite = np.isfinite(recent.values)
    values, steps = recent.values[finite], recent.steps[finite]
    if len(values) < window:
        return
    level = running_median(values, 15)
    residual = np.abs(values - level)
    last = len(values) - window
    starts = np.append(np.arange(0, last, window // 2), last)
    picked = starts[:, None] + np.arange(window)
    local = np.clip(medians(level[picked]), 0.3 * start, start if ratio > long else None)
    relative = MAD_TO_SIGMA * medians(residual[picked]) / local
    wild = np.flatnonzero(relative >= (sure if ratio > long else threshold))
    if not len(wild):
        if view.previous is not None and _is_over(view, view.previous.numbers.get("level", 0.0)):
            view.withdraw(f"the loss fell to {view.course.now:.4g} by {view.unit} {view.loss.steps[-1]} all the same")
        return
    worst = int(wild[np.argmax(relative[wild])])
    inside = values[picked[worst]]
    level_then = median(inside)
    if wild[-1] < len(starts) - 2 and _is_over(view, level_then):
        return
    high = bool((inside > start).mean() >= 0.1)
    learning = view.learns and relative[worst] < threshold and (_falls_still(view) or _is_scheduled(view))
    calm = noisy or (not high and (learning or np.isnan(ratio)))
    varies = 100 * float(relative[worst])
    share = f" by {varies:.0f} % of its level" if np.isfinite(varies) else ""
    yield view.finding(
        "info" if calm else "warning",
        f"around its trend the loss varies{share} in {view.unit}s {steps[starts[worst]]} to "
        f"{steps[starts[worst] + window - 1]} (between {inside.min():.4g} and {inside.max():.4g}; it started at "
        f"{start:.4g})",
        first_step=int(steps[starts[wild[0]]]),
        last_step=int(steps[starts[wild[-1]] + window - 1]),
        cause=(
            "the batches are so small that their losses differ by themselves"
            if noisy
            else "the learning rate is too high" + ("" if ratio > long else ", or the batches are very small")
        ),
        action=(
            "judge the training by a smoothed loss; larger batches, or accumulated gradients, make it calmer"
            if calm
            else f"lower the learning rate{lr_now(view)} 3- to 10-fold, warm it up, or use larger batches"
        ),
        numbers=finite_only(relative=relative[worst], start=start, update_ratio=ratio, level=level_then),
    )


def _falls_still(view: View) -> bool:
    """Tell whether the later half of the levels falls for sure."""
    half = len(view.course.levels) // 2
    return bool(theil_sen(view.course.steps[half:], view.course.levels[half:]).high < 0)


def _is_scheduled(view: View) -> bool:
    """Tell whether a schedule has moved a learning rate by a tenth within the last 50 losses, and may yet lower it."""
    recent = [rates.tail(50).values for rates in view.learning_rates.values()]
    return any(values.max(initial=0.0) > 1.1 * values.min(initial=np.inf) for values in recent)


def _is_over(view: View, level: float) -> bool:
    """Tell whether a loss that swung around a level has fallen to less than half of it since, and rests there."""
    return bool(view.course.now < 0.5 * level and view.course.deviation < 0.5 * level)


def _blows_up(view: View, start: float, rise: float, noisy: bool) -> Iterator[Finding]:
    early, last = view.loss.head(20), view.loss.runaway(view.since)
    for points in (early if view.loss.index(view.since) < 20 and not noisy else _NONE, last):
        values = np.where(np.isfinite(points.values), points.values, -np.inf)
        lowest = np.minimum.accumulate(np.where(np.isfinite(points.values), points.values, np.inf))
        before = np.append(np.inf, lowest[:-1]) if points is early else np.zeros(len(values))
        risen = (values >= rise * start) & (values >= rise * before)  # and not merely from a high first value
        if not risen.any() or (points is early and len(view.loss) < 8):
            continue
        place = int(np.argmax(np.where(risen, values, -np.inf)))
        yield view.finding(
            "critical" if points is last or values[place] >= 100.0 * rise * start else "warning",
            f"the loss rose from {start:.4g} to {values[place]:.4g} at {view.unit} {points.steps[place]}"
            + (f", and was not finite after {view.unit} {points.steps[-1]}" if points is last else ""),
            first_step=int(points.steps[0]),
            last_step=int(points.steps[-1]),
            cause="the learning rate is too high: a step overshoots more than the one before",
            action=f"lower the learning rate{lr_now(view)} 3- to 10-fold, warm it up, clip gradients",
            numbers=finite_only(relative=float(values[place]) / start, start=start),
        )


def _warming_up(view: View) -> bool:
    """Tell whether the learning rate is still rising: it is at its highest, and was lower 10 steps ago."""
    for rates in view.learning_rates.values():
        recent = rates.tail(10).values
        if len(recent) == 10 and recent[-1] > recent[0] and recent[-1] > rates.values[0]:
            return True
    return False


def lr_now(view: View) -> str:
    """Return the learning rate of the first group in brackets, "" where it isn't known."""
    rates = next(iter(view.learning_rates.values()), None)
    known = rates is not None and len(rates) > 0 and np.isfinite(rates.values[-1])
    return f" (now {rates.values[-1]:.3g})" if rates is not None and known else ""
