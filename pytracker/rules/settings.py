"""Rules about what was set up: values that never change and should, learning rates that change and shouldn't."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..evidence import Finding, Points, View, finite_only, rule


@rule
def constant(view: View, steps: int = 50) -> Iterator[Finding]:
    """The loss, the gradient norm, or a weight matrix's gradient is exactly the same for ``steps`` steps or more.

    Bit for bit: noise of any size makes values differ. A norm that equals the clipping threshold doesn't count, nor
    values of a log that was rounded to 6 decimals or fewer.

    Args:
        view: what to judge.
        steps: how many equal values in a row.
    """
    for name, points in (("loss", view.loss), ("gradient norm", view["grad_norm"])):
        tail = points.tail(steps).values
        if len(tail) < steps or not np.isfinite(tail[0]) or (tail != tail[0]).any() or _is_rounded(points):
            continue
        value = float(tail[0])
        clip = view.meta.get("clip_threshold")
        if name != "loss" and (value == 0 or (clip and abs(value - clip) < 1e-3 * clip)):
            continue  # of a norm of zero dead_parameter has more to say
        since = _constant_since(view, name, points, steps)
        always = since <= int(points.steps[0])
        cause, action = _of_a_constant(name, always)
        yield view.finding(
            "critical" if always and name == "loss" else "warning",
            f"the {name} is exactly {value:g} at every step from {since} to {int(points.steps[-1])}",
            first_step=since,
            last_step=int(points.steps[-1]),
            cause=cause,
            action=action,
            numbers={"value": value, "since": float(since), "steps": float(int(points.steps[-1]) - since + 1)},
        )
        return
    yield from _same_gradients(view, steps)


def _is_rounded(points: Points, most: int = 6) -> bool:
    """Tell whether a log was cut off to a few decimals: then equal values are no surprise.

    It takes three different values to tell: one value alone may have few decimals by itself.
    """
    values = points.values[:: max(1, len(points) // 256)]
    values = values[np.isfinite(values)]
    if len(np.unique(values)) < 3:
        return False
    scaled = values * 10.0**most
    return bool((np.abs(scaled - np.round(scaled)) <= 1e-9 * np.abs(scaled)).all())


def _same_gradients(view: View, steps: int) -> Iterator[Finding]:
    """Say which weight matrices have had the very same gradient for so long: nobody computes a new one."""
    stop = view.interval_stop
    last, begin = view.parameters.last_step, view.parameters.first_step
    if stop < 2 or int(last[stop - 1]) - int(begin[0]) + 1 < steps:
        return
    covering = int(np.searchsorted(begin[:stop], int(last[stop - 1]) - steps + 1, "right")) - 1
    start = max(0, stop - 64, min(stop - 2, covering))  # two at least: norms of one interval may agree by chance
    if int(last[stop - 1]) - int(begin[start]) + 1 < steps:
        return
    places = view.layout.weights
    last_norms, largest_norms = (view.parameters.field(name)[stop - 1] for name in ("norm_last", "norm_max"))
    places = places[(last_norms == largest_norms)[places]]  # of most matrices that is all that need be asked
    if not len(places):
        return
    window = slice(start, stop)
    low, high, largest, mean = (
        view.parameters.field(name)[window, places] for name in ("norm_last", "norm_max", "abs_max", "norm_mean")
    )
    same = (low == high).all(axis=0) & (high == high[0]).all(axis=0) & (largest == largest[0]).all(axis=0)
    same &= (np.abs(mean - high) <= 1e-6 * high).all(axis=0) & (high[0] > 0) & ~view.frozen[places]
    found = np.flatnonzero(same)
    if not len(found):
        return
    names = tuple(view.layout.infos[place].name for place in places[found][:20])
    yield view.finding(
        "warning",
        f"the gradient of {len(found)} of {len(view.layout.weights)} weight matrices ({', '.join(names[:3])}) has been "
        f"the same, to the last bit, for {int(last[stop - 1]) - int(begin[start]) + 1} steps",
        first_step=int(begin[start]),
        last_step=int(last[stop - 1]),
        parameters=names,
        cause="no backward pass writes it any more and nothing zeroes it, or every batch is the same and no step is "
        "taken",
        action="call optimizer.zero_grad() before each backward(); check that these parameters are used in the forward "
        "pass",
        numbers={
            "same": float(len(found)),
            "since": float(begin[start]),
            "steps": float(last[stop - 1] - begin[start] + 1),
        },
    )


def _constant_since(view: View, name: str, points: Points, steps: int) -> int:
    """Return the first step of the values equal to the last one.

    Where that was told before, only what is new is looked at. Where anything else was, equal values that began more
    than ``steps`` before the new ones would have been told. All of a series is looked at once in a training.
    """
    value, new, known = points.values[-1], points.index(view.since), view.previous
    start = 0
    if known is not None:
        told = known.numbers
        current = new > 0 and told["since"] + told["steps"] > points.steps[new - 1]
        same = known.evidence.startswith(f"the {name} is") and told["value"] == value
        if current and same and (points.values[new:] == value).all():
            return int(told["since"])
        start = max(0, new - steps)
    other = np.flatnonzero(points.values[start:] != value)
    return int(points.steps[start + (other[-1] + 1 if len(other) else 0)])


def _of_a_constant(name: str, always: bool) -> tuple[str, str]:
    """Return the likely cause, and what to do."""
    if name != "loss":
        return (
            "every batch gives the same gradient: the same batch without an optimizer step, a loss that is linear in "
            "the weights, or gradients that were normalised before they were recorded",
            "check that optimizer.step() runs and that batches differ; call tracker.step() before gradients are "
            "clipped or normalised",
        )
    return (
        "the loss doesn't depend on the model or the batch: a detached loss, zeroed targets, one batch without an "
        "optimizer step"
        if always
        else "the model has saturated or died, or the loss has underflowed",
        "print the loss of two different batches; check that it has a grad_fn and that targets aren't all the same",
    )


@rule
def learning_rate(view: View, jump: float = 3.0, steps: int = 200, warmup: int = 10) -> Iterator[Finding]:
    """The learning rate never changes although there is a scheduler, or it jumps up.

    Never: exactly the same for all of at least ``steps`` steps while ``meta["scheduler"]`` names one that changes it by
    steps ("ReduceLROnPlateau" may rightly never fire; True, of which nobody knows, is information). It is taken back
    where it changes after all. A jump: at least
    ``jump`` times the one before and above every one before it, after ``warmup`` steps; decays in steps are usual and
    don't count.

    Args:
        view: what to judge.
        jump: ratio of one learning rate to the one before.
        steps: how long before a constant one is said.
        warmup: jumps are expected in so many first steps.
    """
    if not view.learning_rates:
        view.cannot_judge(view.lacks("learning rate"))
    if view.previous is not None and "before" not in view.previous.numbers:
        moved = [name for name, rates in view.learning_rates.items() if (rates.values != rates.values[0]).any()]
        if len(moved) == len(view.learning_rates):
            view.withdraw(f"{moved[0]} has changed by step {view.stop - 1}")
    for name, rates in view.learning_rates.items():
        if not len(rates):
            continue
        yield from _never_changes(view, name, rates, steps)
        yield from _jumps(view, name, rates, jump, warmup)


def _never_changes(view: View, name: str, rates: Points, steps: int) -> Iterator[Finding]:
    first = float(rates.values[0])
    scheduler = view.meta.get("scheduler")
    if not scheduler or rates.steps[-1] - rates.steps[0] + 1 < steps or "plateau" in str(scheduler).lower():
        return
    if rates.values[-1] != first or (rates.values[:: max(1, len(rates) // 256)] != first).any():
        return
    yield view.finding(
        "warning" if isinstance(scheduler, str) else "info",  # True may stand for one that waits for a plateau
        f"{name} has been {first:g} for all {len(rates)} steps so far although a scheduler was given",
        first_step=int(rates.steps[0]),
        cause="scheduler.step() is never called, or the schedule is counted in epochs and stepped rarely",
        action="call scheduler.step() after optimizer.step(), as often as the schedule counts",
        numbers=finite_only(lr=first),
    )


def _jumps(view: View, name: str, rates: Points, jump: float, warmup: int) -> Iterator[Finding]:
    start = max(warmup, rates.index(view.since), 1)
    if start >= len(rates):
        return
    before, now = rates.values[start - 1 : -1], rates.values[start:]
    up = (now >= jump * before) & (before > 0)
    if not up.any():
        return
    highest = np.fmax.accumulate(np.concatenate([[np.fmax.reduce(rates.values[:start])], now[:-1]]))
    places = np.flatnonzero(up & (now > highest))  # a warm restart returns to where it has been
    if not len(places):
        return
    place = int(places[0])
    step = int(rates.steps[start + place])
    yield view.finding(
        "warning",
        f"{name} jumped from {before[place]:.3g} to {now[place]:.3g} at step {step}",
        first_step=step,
        last_step=step,
        cause="a schedule out of step, a resumed run with another learning rate, or a unit error",
        action="check the schedule around that step, and whether the optimizer's state was restored with it",
        numbers=finite_only(before=before[place], after=now[place]),
    )
