"""Rules about the loss: does it fall, does it swing, does it jump, and does the validation loss follow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..findings import Finding
from ..registry import rule
from ..statistics import (
    MAD_TO_SIGMA,
    Float64Array,
    blocks_of,
    finite_median,
    finite_only,
    log10,
    median,
    medians,
    running_median,
    theil_sen,
    thin,
)
from ..view import Points, View
from .updates import typical_update

_OF_A_MEDIAN = 1.2533  # its standard error, by that of a mean, of normal values: the root of pi / 2
_NONE = Points(np.empty(0, np.int64), np.empty(0))


@rule
def loss_not_decreasing(
    view: View, steps: int = 150, decrease: float = 0.08, slowly: float = 0.08, unsure: float = 0.25, long: float = 0.1
) -> Iterator[Finding]:
    """The training loss never went down.

    Said when two tests agree. By level: no block of at least 20 losses, nor all after the first 20 together, has a
    median that is below that of the first 4, or of the first 16, by ``decrease`` of it and by 4 standard errors. By
    trend: Theil and Sen's slope over at most 64 medians of blocks has a 95 % interval whose steep end is a decrease of
    less than ``slowly`` of the initial loss, or that contains zero and whose steep end is less than ``unsure``. A
    validation loss that has fallen by ``decrease`` is less noisy, and believed. A loss that is NaN or Inf, has risen by
    half, or whose steps are too long, is another trouble: there a higher learning rate would do harm.

    Args:
        view: what to judge.
        steps: no judgement before so many steps, nor while the learning rate still rises.
        decrease: the share of the initial loss that a training must have gained by then.
        slowly: the same, for a loss that falls for sure, and will go on.
        unsure: the decrease that must be ruled out where the losses vary so much that none can be seen.
        long: nothing is said while a step changes the median weight matrix by more than this share of its size.
    """
    loss = view.loss
    if len(loss) < 40 or loss.steps[-1] - loss.steps[0] + 1 < steps or _warming_up(view):
        return
    centres, middles = thin(loss.steps, loss.values)
    head = loss.values[:16]
    if len(middles) < 10 or not np.isfinite(head).all() or not np.isfinite(loss.values[-10:]).all():
        return
    start, end = median(head), median(middles[-max(3, len(middles) // 4) :])
    slope = theil_sen(centres, middles)
    steepest = -slope.low * float(centres[-1] - centres[0]) / max(abs(start), 1e-300)
    if end > 1.5 * start or view.once(typical_update) > long or _has_fallen(loss.values, decrease):
        return
    if steepest >= (slowly if slope.high < 0 else unsure) or _validation_has_fallen(view.validation, decrease):
        return
    yield view.finding(
        "warning",
        f"the loss was {start:.4g} in the first {len(head)} steps and {end:.4g} in the last quarter of {len(loss)}; "
        f"its slope is {slope.estimate:.3g} a step (95 %: {slope.low:.3g} to {slope.high:.3g}), a decrease of at most "
        f"{100 * max(0.0, steepest):.1f} %",
        first_step=int(loss.steps[0]),
        last_step=int(loss.steps[-1]),
        cause="the learning rate is too low, or the loop has a bug: no optimizer step, detached loss, wrong labels",
        action="check that optimizer.step() runs and that labels match inputs; then raise the learning "
        f"rate{_lr_now(view)} "
        "10-fold; overfit one batch first",
        numbers=finite_only(start=start, end=end, slope=slope.estimate, low=slope.low, high=slope.high),
    )


def _has_fallen(values: Float64Array, decrease: float) -> bool:
    """Tell whether some block of losses is for sure below the first ones, by ``decrease`` of those."""
    blocks, deviation = blocks_of(values)
    rest = values[20:][np.isfinite(values[20:])]
    levels = np.append(blocks, median(rest))
    counts = np.append(np.full(len(blocks), 20), len(rest))
    for first in (values[:4], values[:16]):
        start = median(first)
        sure = 4.0 * _OF_A_MEDIAN * deviation * np.sqrt(1 / len(first) + 1 / counts)
        with np.errstate(invalid="ignore", over="ignore"):
            gained = start - levels
            if ((gained > sure) & (gained >= decrease * abs(start))).any():
                return True
    return False


def _validation_has_fallen(validation: Points, decrease: float) -> bool:
    """Tell whether the later half of at least 6 evaluations is below the first two, by ``decrease`` of those."""
    values = validation.values[np.isfinite(validation.values)]
    if len(values) < 6:
        return False
    start, later = median(values[:2]), median(values[len(values) // 2 :])
    return start - later >= decrease * abs(start)


@rule
def loss_oscillating(
    view: View, threshold: float = 0.7, sure: float = 0.12, long: float = 0.1, window: int = 50, blow_up: float = 3.0
) -> Iterator[Finding]:
    """The training loss swings wildly, or runs away.

    In windows of ``window`` steps: residuals from the running median over 15 steps; 1.4826 times their median absolute
    value, divided by the local level. The level is kept between 0.3 and 1 times the initial loss: noise of a loss that
    is nearly gone is no trouble, and one that has blown up is compared with where it started. Residuals alone can't
    tell small batches from long steps: where the update ratio is known, long steps have a lower threshold, and short
    ones are worth a piece of information only. A
    loss that rises ``blow_up``-fold within the first 20 steps, or within the 5 steps before it is NaN or Inf, counts as
    well.

    Args:
        view: what to judge.
        threshold: the relative scale of residuals from which on the loss oscillates.
        sure: the same, while a step changes the median weight matrix by more than ``long`` of its size.
        long: see ``sure``.
        window: steps that are judged together.
        blow_up: the rise above the initial loss that is one swing too many.
    """
    start = abs(view.initial_loss)
    if not start > 0:
        return
    ratio = view.once(typical_update)
    noisy = ratio <= long  # so short a step cannot make the loss swing
    yield from _blows_up(view, start, blow_up, noisy)
    recent = _since(view.loss, view.since, window)
    finite = np.isfinite(recent.values)
    values, steps = recent.values[finite], recent.steps[finite]
    if len(values) < window:
        return
    level = running_median(values, 15)
    with np.errstate(over="ignore", invalid="ignore"):
        residual = np.abs(values - level)
    last = len(values) - window
    starts = np.append(np.arange(0, last, window // 2), last)
    picked = starts[:, None] + np.arange(window)
    local = np.clip(np.abs(medians(level[picked])), 0.3 * start, start)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        relative = MAD_TO_SIGMA * medians(residual[picked]) / local
    wild = np.flatnonzero(relative >= (sure if ratio > long else threshold))
    if not len(wild):
        return
    worst = int(wild[np.argmax(relative[wild])])
    inside = values[picked[worst]]
    varies = 100 * float(relative[worst])
    share = f" by {varies:.0f} % of its level" if np.isfinite(varies) else ""
    yield view.finding(
        "info" if noisy else "warning",
        f"around its trend the loss varies{share} in steps {steps[starts[worst]]} to "
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
            if noisy
            else f"lower the learning rate{_lr_now(view)} 3- to 10-fold, warm it up, or use larger batches"
        ),
        numbers=finite_only(relative=relative[worst], start=start, update_ratio=ratio),
    )


def _blows_up(view: View, start: float, rise: float, noisy: bool) -> Iterator[Finding]:
    early, last = view.loss.head(20), view.loss.runaway(view.since)
    for points in (early if view.loss.index(view.since) < 20 and not noisy else _NONE, last):
        sizes = np.abs(points.values)
        sizes = np.where(np.isfinite(sizes), sizes, 0.0)
        if not len(sizes) or sizes.max() < rise * start:
            continue
        place = int(sizes.argmax())
        if points is early and sizes[place] < rise * float(sizes[: place + 1].min()):
            continue  # it was that high when the training began
        yield view.finding(
            "critical" if points is last else "warning",
            f"the loss rose from {start:.4g} to {sizes[place]:.4g} at step {points.steps[place]}"
            + (f", and was not finite after step {points.steps[-1]}" if points is last else ""),
            first_step=int(points.steps[0]),
            last_step=int(points.steps[-1]),
            cause="the learning rate is too high: a step overshoots more than the one before",
            action=f"lower the learning rate{_lr_now(view)} 10-fold, warm it up, clip gradients",
            numbers=finite_only(relative=float(sizes[place]) / start, start=start),
        )


@rule
def loss_spike(view: View, z: float = 5.5, window: int = 50, rise: float = 0.5) -> Iterator[Finding]:
    """Single losses far above those before them.

    The robust z-score of each loss against the median and the median absolute deviation of the ``window`` losses before
    it, of the loss and of its logarithm: the smaller one counts. A loss near zero varies by factors all the time, which
    the logarithm knows; a loss far from zero varies little, which the loss itself knows.

    Args:
        view: what to judge.
        z: the score from which on it is a spike.
        window: how many losses before it are looked at; none is a spike before there are 30.
        rise: the least rise above the median, as a share of it.
    """
    chunk = 25  # losses judged against the same context
    recent = _since(view.loss, view.since, window + chunk)
    values = recent.values
    begin = recent.index(view.since)
    spikes: list[tuple[float, int]] = []
    starts = np.arange(max(begin, 30), len(values), chunk)
    if not len(starts):
        return
    padded = np.concatenate([np.full(window, np.nan), values, np.full(chunk, np.nan)])
    before = padded[starts[:, None] + np.arange(window)]
    now = padded[window + starts[:, None] + np.arange(chunk)]
    level = finite_median(before)[:, None]
    score = _robust_z(before, now, 0.01 * abs(view.initial_loss))
    positive = np.nanmin(np.where(np.isfinite(before), before, np.inf), axis=1) > 0
    logarithmic = _robust_z(log10(before), log10(now))
    score = np.where(positive[:, None], np.minimum(score, logarithmic), score)
    with np.errstate(invalid="ignore", over="ignore"):
        hit = (score >= z) & (now - level >= rise * np.abs(level)) & np.isfinite(now)
    where = (starts[:, None] + np.arange(chunk))[hit]
    if not len(where):
        return
    spikes = sorted(zip(score[hit].tolist(), where.tolist(), strict=True))
    highest, place = spikes[-1]
    before_it = (
        float(level[hit.any(axis=1)][-1, 0])
        if len(spikes) == 1
        else float(finite_median(values[None, max(0, place - window) : place])[0])
    )
    old = view.previous.numbers if view.previous is not None else {}
    count = int(old.get("count", 0)) + len(spikes)
    if old.get("z", 0.0) > highest:
        highest, at, value, usual = old["z"], int(old["step"]), old["loss"], old["usual"]
    else:
        at, value, usual = int(recent.steps[place]), float(values[place]), before_it
    yield view.finding(
        "warning",
        f"{count} loss{'es' if count > 1 else ''} far above the {window} before: at step {at} it was {value:.4g} "
        "against "
        f"a median of {usual:.4g} (robust z = {highest:.1f})",
        first_step=int(recent.steps[where.min()]),
        last_step=int(recent.steps[where.max()]),
        cause="a corrupted or very hard batch, or a step that was too long",
        action=f"look at the batch of step {at}; skip batches like it, clip gradients, or go back to a checkpoint "
        "before it",
        numbers=finite_only(count=count, z=highest, step=at, loss=value, usual=usual),
    )


def _robust_z(before: Float64Array, now: Float64Array, floor: float = 0.0) -> Float64Array:
    """Return the robust scores of ``now``; ``floor`` is the least scale where the median before is exactly 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        level = finite_median(before)[:, None]
        deviation = MAD_TO_SIGMA * finite_median(np.abs(before - level))[:, None]
        scale = np.maximum(deviation, np.where(level == 0, np.fmax(floor, 0.0), 1e-3 * np.abs(level)))
        score = (now - level) / np.maximum(scale, 1e-12)
    return np.asarray(np.minimum(score, np.finfo(np.float64).max), np.float64)


@rule
def overfitting(
    view: View, rise: float = 0.1, noise: float = 4.0, lost: float = 0.05, evaluations: int = 4
) -> Iterator[Finding]:
    """The validation loss rises while the training loss falls.

    After its lowest point (of a running median over 3), the validation loss has a Theil-Sen slope whose 95 % interval
    is above zero, is above the lowest by ``rise`` of it (Prechelt's generalisation loss) and by ``noise`` times its
    usual change from one evaluation to the next, for at least ``evaluations`` evaluations (his UP criterion); and the
    training loss falls over the same steps, or is nearly gone. It is a warning when ``lost`` of what the validation
    loss had gained since the start (of its own, or of the training loss) is lost again, and information before.

    Args:
        view: what to judge.
        rise: relative rise above the lowest validation loss.
        noise: rise in standard deviations of an evaluation, as the median difference of successive ones tells.
        lost: share of the improvement that is lost again, for a warning.
        evaluations: how many must follow the lowest one.
    """
    validation = view.validation
    finite = np.isfinite(validation.values)
    if finite.sum() < evaluations + 2:
        return
    steps, values = thin(validation.steps[finite], validation.values[finite])
    if len(values) <= evaluations:
        return
    smooth = running_median(values, 3)
    smooth[0] = min(smooth[0], values[0])
    best = int(np.argmin(smooth))
    if len(values) - best <= evaluations:
        return
    lowest, now = float(smooth[best]), median(values[-3:])
    gained = max(float(values[0]), view.initial_loss) - lowest
    with np.errstate(over="ignore"):
        changes = np.abs(np.diff(values))
    usual = MAD_TO_SIGMA * median(changes) / 2.0**0.5  # two evaluations differ by the root of 2
    if lowest <= 0 or now < max((1 + rise) * lowest, lowest + noise * usual):
        return
    slope = theil_sen(steps[best:], values[best:])
    train_start, train_end, falling = _training_since(view, float(steps[best]))
    if slope.low <= 0 or not falling:
        return
    share = (now - lowest) / gained if gained > 0 else float("inf")
    risen = 100 * (now / lowest - 1)
    shares = [f"+{risen:.0f} %"] if np.isfinite(risen) else []
    shares += [f"{100 * share:.0f} % of what it had gained"] if np.isfinite(100 * share) else []
    yield view.finding(
        "warning" if share >= lost else "info",
        f"the validation loss rose from {lowest:.4g} at step {steps[best]:.0f} to {now:.4g}"
        + (f" ({', '.join(shares)})" if shares else "")
        + f" while the training loss went from {train_start:.4g} to {train_end:.4g}",
        first_step=int(steps[best]),
        cause="overfitting: the model learns the training set by heart",
        action=f"stop at step {steps[best]:.0f}, or add regularisation (weight decay, dropout, augmentation), get "
        "more data, "
        "reduce the model",
        numbers=finite_only(best=lowest, now=now, best_step=steps[best], lost=share, slope=slope.estimate),
    )


def _training_since(view: View, step: float) -> tuple[float, float, bool]:
    """Return the training loss around ``step`` and now, and whether it fell between the two or is nearly gone."""
    loss = view.loss
    after = Points(loss.steps[loss.index(int(step)) :], loss.values[loss.index(int(step)) :])
    centres, middles = thin(after.steps, after.values, bins=32)
    if len(middles) < 4:
        return float("nan"), float("nan"), False
    quarter = max(1, len(middles) // 4)
    start, end = median(middles[:quarter]), median(middles[-quarter:])
    falling = theil_sen(centres, middles).estimate < 0 and end < start
    return start, end, bool(falling or end < 0.05 * abs(view.initial_loss))


def _since(points: Points, since: int, context: int) -> Points:
    """Return the points from the step ``since`` on, and ``context`` before them."""
    start = max(0, points.index(since) - context)
    return Points(points.steps[start:], points.values[start:])


def _warming_up(view: View) -> bool:
    """Tell whether the learning rate is still rising: it is at its highest, and was lower 10 steps ago."""
    for rates in view.learning_rates.values():
        recent = rates.tail(10).values
        if len(recent) == 10 and recent[-1] > recent[0] and recent[-1] > rates.values[0]:
            return True
    return False


def _lr_now(view: View) -> str:
    rates = next(iter(view.learning_rates.values()), None)
    known = rates is not None and len(rates) > 0 and np.isfinite(rates.values[-1])
    return f" (now {rates.values[-1]:.3g})" if rates is not None and known else ""
