"""Single losses far above those before them, and levels that step up and stay."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..evidence import (
    MAD_TO_SIGMA,
    Finding,
    Float64Array,
    View,
    finite_median,
    finite_only,
    log10,
    median,
    rule,
    running_median,
)

_CHUNK = 25  # losses judged against the same context
_MEMORY = 200  # losses before it of which none is half as far above the others
_EDGE = 12  # losses on each side that tell the level of one among them
_FOLLOW = 5  # losses after it that say whether it was a single one
_MOST = float(np.finfo(np.float64).max)


@rule
def loss_spike(
    view: View, z: float = 7.0, window: int = 50, rise: float = 0.5, share: float = 0.15
) -> Iterator[Finding]:
    """Single losses far above those before them.

    The robust z-score of each loss against the median and the spread of the ``window`` losses before it, of the loss
    and of its logarithm: the smaller one counts. A loss near zero varies by factors all the time, which the logarithm
    knows; a loss far from zero varies little, which the loss itself knows. The spread is no less than what the digits
    of a rounded log can tell apart. It must rise by ``rise`` of the median, and by ``share`` of the initial loss, and
    three times as far above the median as 95 % of those before it, and twice as far as any of the 200 before it was
    above its own level, other spikes left out. One that stands alone (the loss before it is low, and the next 5 come
    down) is a spike; a level that stays is a step up, which is information, as is a spike of a signed loss: a
    log-likelihood has no bound, and one sample that was told with confidence and is not so can be any height.

    Args:
        view: what to judge.
        z: the score from which on it is a spike.
        window: how many losses before it are looked at; none is a spike before there are 30.
        rise: the least rise above the median, as a share of it.
        share: the least rise, as a share of the initial loss.
    """
    if not len(view.loss):
        view.cannot_judge(view.lacks("training loss"))
        return
    if len(view.loss) <= 30 + _FOLLOW:
        view.cannot_judge(f"{len(view.loss)} losses are too few: one is compared with 30 at least before it")
        return
    # What was too fresh to be told from a step up at the last look is judged now.
    done = max(30, view.loss.index(view.since) - _FOLLOW)
    first = max(0, done - 2 * _MEMORY)
    values, steps = view.loss.values[first:], view.loss.steps[first:]
    again = max(30, done - _MEMORY)  # from here on: what was told already is no noise that another one must exceed
    hits, scores, levels = _far_above(view, values, np.arange(again - first, len(values) - _FOLLOW, _CHUNK), z, window)
    rises = values[hits] - levels
    high = (rises >= rise * np.abs(levels)) & (rises >= share * _scale(view))
    spikes: list[tuple[float, int]] = []
    told: list[int] = []
    shift = None
    for place, score, level in zip(hits[high].tolist(), scores[high].tolist(), levels[high].tolist(), strict=True):
        rise_here = float(values[place]) - level
        if not _above_the_tail(values[max(0, place - window) : place], level, rise_here):
            continue
        if not _is_new(values, place, rise_here, [*told, *(index for _, index in spikes)]):
            continue
        near = level + 0.3 * (float(values[place]) - level)
        if place < done - first:
            told.append(place)
        elif median(values[place + 1 : place + 1 + _FOLLOW]) > near:
            shift = shift or (place, level)
        elif not values[place - 1] > near:
            spikes.append((score, place))
    if spikes:
        yield _spiked(view, values, steps, sorted(spikes), window)
    elif shift is not None and not view.objective and (view.previous is None or view.previous.severity == "info"):
        place, level = shift
        now = median(values[place : place + _FOLLOW])
        yield view.finding(
            "info",
            f"the loss stepped up from {level:.4g} to {now:.4g} at {view.unit} {steps[place]} and did not come down at "
            "once",
            first_step=int(steps[place]),
            last_step=int(steps[place]),
            cause="another task, data set, target or learning rate from there on",
            action="compare with what changed at that step",
            numbers=finite_only(before=level, after=now, step=steps[place]),
        )


def _scale(view: View) -> float:
    """Return what a rise is compared with: the initial loss, or for a signed loss how far its values are apart."""
    start = abs(view.initial_loss)
    if not view.signed:
        return start if np.isfinite(start) else 0.0
    levels = view.course.levels
    return float(np.ptp(levels)) if len(levels) else 0.0


def _far_above(
    view: View, values: Float64Array, starts: NDArray[np.int64], z: float, window: int
) -> tuple[NDArray[np.int64], Float64Array, Float64Array]:
    """Return which values score at least ``z``, their scores, and the medians that they were compared with."""
    if not len(starts):
        return np.empty(0, np.int64), np.empty(0), np.empty(0)
    padded = np.concatenate([np.full(window, np.nan), values, np.full(_CHUNK, np.nan)])
    before = padded[starts[:, None] + np.arange(window)]
    now = padded[window + starts[:, None] + np.arange(_CHUNK)]
    level = finite_median(before)[:, None]
    positive = np.nanmin(np.where(np.isfinite(before), before, np.inf), axis=1) > 0
    score = _robust_z(before, now, 0.01 * _scale(view))
    score = np.where(positive[:, None], np.minimum(score, _robust_z(log10(before), log10(now))), score)
    places = starts[:, None] + np.arange(_CHUNK)
    hit = (score >= z) & np.isfinite(now) & (places < len(values) - _FOLLOW)
    return places[hit], score[hit], np.broadcast_to(level, now.shape)[hit]


def _robust_z(before: Float64Array, now: Float64Array, floor: float = 0.0) -> Float64Array:
    """Return the robust scores of ``now``.

    The scale is the deviation that the median absolute one tells, but at least that of the middle 80 %, a thousandth
    of the level, and half of the smallest difference of two values: digits that were cut off. ``floor`` is the least
    where the median before is exactly 0.
    """
    level = finite_median(before)[:, None]
    deviation = MAD_TO_SIGMA * finite_median(np.abs(before - level))[:, None]
    least = np.where(level == 0, np.fmax(floor, 0.0), 1e-3 * np.abs(level))
    scale = np.maximum(deviation, np.fmax(least, _resolution(before)[:, None]))
    score = (now - level) / np.maximum(scale, 1e-300)
    return np.asarray(np.minimum(score, _MOST), np.float64)


def _resolution(before: Float64Array) -> Float64Array:
    """Return the larger of the spread of the middle 80 % as a deviation, and the smallest difference of two values."""
    ordered = np.sort(before, axis=1)  # NaN last
    count = np.isfinite(before).sum(axis=1)
    rows = np.arange(len(before))
    low, high = (ordered[rows, np.maximum((share * (count - 1)).astype(int), 0)] for share in (0.1, 0.9))
    gaps = np.diff(ordered, axis=1)
    smallest = np.min(np.where(gaps > 0, gaps, np.inf), axis=1, initial=np.inf)
    equal = (gaps == 0).sum(axis=1) >= 0.2 * np.maximum(count, 1)  # so many only where digits were cut off
    return np.asarray(np.fmax((high - low) / 2.56, np.where(equal & np.isfinite(smallest), smallest, 0.0)))


def _is_new(values: Float64Array, place: int, height: float, spikes: list[int]) -> bool:
    """Tell whether none of the ``_MEMORY`` losses before it, other spikes left out, was half as far above its level.

    Noise of a heavy tail, as of dropout of most units, passes for a spike every so often.
    """
    begin = max(0, place - _MEMORY)
    before = values[begin:place]
    above = before - running_median(before, 2 * _EDGE + 1)
    above[:_EDGE] = np.nan  # which are compared with later ones only, and may fall steeply
    above[[index - begin for index in spikes if index >= begin]] = np.nan
    finite = above[np.isfinite(above)]
    return not len(finite) or bool(height >= 2.0 * finite.max())


def _above_the_tail(before: Float64Array, level: float, height: float) -> bool:
    """Tell whether a value is three times as far above the level as 95 % of those before it."""
    finite = before[np.isfinite(before)]
    if not len(finite):
        return False
    place = int(0.95 * (len(finite) - 1))
    tail = float(np.partition(finite, place)[place])
    return height >= 3.0 * (tail - level)


def _spiked(
    view: View, values: Float64Array, steps: NDArray[np.int64], spikes: list[tuple[float, int]], window: int
) -> Finding:
    highest, place = spikes[-1]
    usual = float(finite_median(values[None, max(0, place - window) : place])[0])
    at, value = int(steps[place]), float(values[place])
    old = view.previous.numbers if view.previous is not None and view.previous.severity != "info" else {}
    count = int(old.get("count", 0)) + len(spikes)
    if old.get("z", 0.0) > highest:
        highest, at, value, usual = old["z"], int(old["step"]), old["loss"], old["usual"]
    where = [index for _, index in spikes]
    return view.finding(
        "info" if view.signed else "warning",  # of a likelihood no value is out of the ordinary by its height
        f"{count} loss{'es' if count > 1 else ''} far above the {window} before: at {view.unit} {at} it was "
        f"{value:.4g} against a median of {usual:.4g} (robust z = {min(highest, 9999.0):.1f})",
        first_step=int(steps[min(where)]),
        last_step=int(steps[max(where)]),
        cause="a corrupted or very hard batch, or a step that was too long",
        action=f"look at the batch of {view.unit} {at}; skip batches like it, or clip gradients",
        numbers=finite_only(count=count, z=highest, step=at, loss=value, usual=usual),
    )
