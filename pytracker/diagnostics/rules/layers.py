"""Rules about single parameters: which one is not finite, dead, out of line, or moves too much or too little."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ...columns import INFS, NANS
from ..findings import Finding
from ..registry import rule
from ..statistics import finite_only, median
from ..view import Int64Array, View
from .updates import typical_update, update_ratios

_NAMED = 20  # parameters named in a finding at most


@rule
def gradient_nonfinite(view: View) -> Iterator[Finding]:
    """A gradient has a NaN or Inf element.

    The first step, and the first parameter: backward runs from the loss to the inputs, and what isn't finite spoils
    everything after it, so of the parameters that are not finite in that step the one nearest to the loss (the last of
    the model's order) is the origin. No threshold.
    """
    if view.previous is not None:
        yield _grown(view, view.previous, view.since - 1)
        return
    start, stop = view.interval_since, view.interval_stop
    if start < stop:
        first = view.parameters.field("first_nonfinite")[start:stop]
        seen = first[first >= max(0, view.since)]
        if len(seen):
            yield _grown(view, _located(view, int(seen.min()), first), int(seen.min()))
            return
    total = view["grad_norm"]
    fresh = total.values[total.index(view.since) :]
    if len(fresh) and not np.isfinite(fresh).all():
        step = int(total.steps[total.index(view.since) + int(np.argmin(np.isfinite(fresh)))])
        found = view.finding(
            "critical",
            f"the gradient norm is {total.at(step)} at step {step}; {_loss_at(view, step)}",
            first_step=step,
            last_step=step,
            cause="a division by zero, a logarithm or root of a negative number, or an overflow",
            action="record the parameters to find the layer; torch.autograd.set_detect_anomaly(True) finds the "
            "operation",
            numbers={"step": float(step)},
        )
        yield _grown(view, found, step)


def _located(view: View, step: int, first: np.ndarray) -> Finding:
    places = np.flatnonzero((first == step).any(axis=0))[::-1]  # nearest to the loss first
    names = tuple(view.layout.infos[place].name for place in places[:_NAMED])
    what = _what_at(view, step, int(places[0]))
    everywhere = len(places) == len(view.layout.infos)
    loss = view.loss.at(step)
    others = f" and {len(places) - 1} other{'s' if len(places) > 2 else ''}" if len(places) > 1 else ""
    return view.finding(
        "critical",
        f"{what} in the gradient of {names[0]!r}{others} at step {step}; {_loss_at(view, step)}",
        first_step=step,
        last_step=step,
        parameters=names,
        cause=(
            "the loss itself is not finite: a bad batch, an overflow in the forward pass, or weights already spoilt"
            if not np.isfinite(loss) and everywhere
            else f"the backward pass of {names[0].rpartition('.')[0] or names[0]!r} divides by zero or overflows"
        ),
        action=f"go back to a checkpoint before step {step}, look at its batch, and run it under "
        "torch.autograd.set_detect_anomaly(True); skip steps whose gradient isn't finite",
        numbers=finite_only(step=step, parameters=len(places), loss=loss),
    )


def _what_at(view: View, step: int, place: int) -> str:
    """Return how many NaN and Inf, from the exact row of the step, or else which of them its interval has."""
    steps, rows = view.parameters.rows(since=step)
    exact = len(steps) > 0 and steps[0] == step
    if exact:
        nans, infs = rows[0, place, NANS], rows[0, place, INFS]
    else:
        interval = int(np.searchsorted(view.parameters.last_step, step))
        nans, infs = (view.parameters.field(name)[interval, place] for name in ("nans", "infs"))
    if exact:
        return " and ".join(f"{count:.0f} {kind}" for count, kind in ((nans, "NaN"), (infs, "Inf")) if count > 0)
    return "a NaN or Inf" if nans > 0 and infs > 0 else "a NaN" if nans > 0 else "an Inf"


def _grown(view: View, known: Finding, after: int) -> Finding:
    """Return the finding with the steps after ``after`` whose norm isn't finite either."""
    total = view["grad_norm"]
    start = total.index(after + 1)
    bad = np.flatnonzero(~np.isfinite(total.values[start:]))
    if not len(bad):
        return known
    count = known.numbers.get("later_steps", 0.0) + len(bad)
    numbers = {**known.numbers, "later_steps": float(count)}
    return replace(known, last_step=int(total.steps[start + bad[-1]]), numbers=numbers)


def _loss_at(view: View, step: int) -> str:
    loss = view.loss.at(step)
    if np.isnan(loss) and step not in view.loss.steps[-1:] and view.loss.index(step) >= len(view.loss):
        return "the loss of that step isn't known"
    return f"the loss was {'finite' if np.isfinite(loss) else 'not finite'} ({loss:.4g})"


@rule
def dead_parameter(view: View, steps: int = 50) -> Iterator[Finding]:
    """Parameters whose gradient has been exactly zero, or missing, for ``steps`` steps or more.

    Args:
        view: what to judge.
        steps: how long without a single element other than zero.
    """
    last = view.parameters.last_step
    window = _window(view, view.interval_stop, steps)
    if window is None:
        return
    zero, missing = _without_gradient(view, window)
    dead = np.flatnonzero(zero | missing)
    if not len(dead):
        return
    stop = window.stop
    total, infos = len(view.layout.infos), view.layout.infos
    names = tuple(infos[place].name for place in dead[:_NAMED])
    since = _dead_since(view, window, dead, steps)
    long = int(last[stop - 1]) - since + 1
    unused = int(missing.sum())
    everything = len(dead) == total
    yield view.finding(
        "critical" if everything else "warning" if unused < len(dead) else "info",
        f"{len(dead)} of {total} parameters ({', '.join(names[:3])}{', ...' if len(dead) > 3 else ''}) have had "
        f"{'a zero' if not unused else 'no' if unused == len(dead) else 'a zero or no'} gradient for {long} steps",
        first_step=since,
        last_step=int(last[stop - 1]),
        parameters=names,
        cause=(
            "the loss doesn't depend on the model: a detached loss, zeroed targets, or no backward()"
            if everything
            else "frozen (requires_grad=False), or not used in the forward pass"
            if unused == len(dead)
            else "dead ReLUs, a mask or a detach before them: nothing comes back through"
        ),
        action=(
            "check that the loss is computed from the model's output, without detach() or item()"
            if everything
            else "nothing if they are meant to be frozen; else use them, or remove them"
            if unused == len(dead)
            else "lower the learning rate, use LeakyReLU or GELU, check biases and masks of the layer after the last "
            "one named"
        ),
        numbers={"dead": float(len(dead)), "missing": float(unused), "since": float(since), "steps": float(long)},
    )


def _window(view: View, stop: int, steps: int) -> slice | None:
    """Return the intervals before ``stop`` that cover ``steps`` steps, at most 64; None where there aren't so many."""
    last, begin = view.parameters.last_step, view.parameters.first_step
    if stop == 0 or int(last[stop - 1]) - int(begin[0]) + 1 < steps:
        return None
    start = max(0, int(np.searchsorted(last[:stop], int(last[stop - 1]) - steps + 1)), stop - 64)
    if int(last[stop - 1]) - int(begin[start]) + 1 < steps and stop - start < 64:
        start = max(0, start - 1)
    return slice(start, stop)


def _without_gradient(
    view: View, window: slice, places: Int64Array | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Tell of each parameter whether its gradient is exactly zero in all intervals, and whether it is missing."""
    with np.errstate(invalid="ignore"):
        missing = np.isnan(view.parameters.field("zero_fraction")[window, places]).all(axis=0)
        largest = view.parameters.field("abs_max")[window, places]
        zero = ((largest == 0) | np.isnan(largest)).all(axis=0) & ~missing
        zero &= view.parameters.field("nans")[window, places].sum(axis=0) == 0
    return zero, missing


def _dead_since(view: View, window: slice, dead: Int64Array, steps: int) -> int:
    """Return since when all of ``dead`` are: as told at the last look if all of them were dead then and ever since."""
    seen, known = view.interval_since, view.previous
    before = _window(view, seen, steps)
    if known is not None and before is not None:
        told = known.numbers
        if told["since"] + told["steps"] == view.parameters.last_step[seen - 1] + 1:
            zero, missing = _without_gradient(view, slice(min(before.start, window.start), window.stop), dead)
            if (zero | missing).all():
                return int(told["since"])
    return int(view.parameters.first_step[window.start])


@rule
def layer_imbalance(view: View, decades: float = 2.0, share: float = 0.2) -> Iterator[Finding]:
    """One weight matrix has a gradient far above or below the others.

    log10 of the rms gradient element of each weight matrix (median of 3 intervals) less the median of all: beyond
    ``decades`` in either direction, for at most ``share`` of them. More of them are a profile by depth, which is for
    gradient_vanishing and gradient_exploding.

    Args:
        view: what to judge.
        decades: distance from the median layer in powers of ten.
        share: at most so many of the layers are out of line.
    """
    weights, level = view.layout.weights, view.weight_levels
    known = np.isfinite(level)
    if view.interval_stop < 3 or known.sum() < 4:
        return
    middle = median(level[known])
    distance = np.where(known, level - middle, 0.0)
    out = np.flatnonzero(np.abs(distance) >= decades)
    if not len(out) or len(out) > max(1, share * len(weights)):
        return
    out = out[np.argsort(-np.abs(distance[out]))]
    names = tuple(view.layout.infos[place].name for place in weights[out][:_NAMED])
    far = float(distance[out[0]])
    yield view.finding(
        "warning",
        f"the rms gradient of {names[0]!r} is 10^{abs(far):.1f} times {'above' if far > 0 else 'below'} that of the "
        f"median of {int(known.sum())} weight matrices (1e{level[out[0]]:.1f} against 1e{middle:.1f})",
        first_step=int(view.parameters.first_step[view.interval_stop - 3]),
        parameters=names,
        cause="a layer on another scale: its inputs, its initialisation, or a multiplier on its gradient",
        action="normalise what goes into it, check its initialisation and scaling; Adam hides it, SGD doesn't",
        numbers={"decades": far, "layers": float(len(out))},
    )


@rule
def update_ratio(view: View, high: float = 0.1, low: float = 1e-6) -> Iterator[Finding]:
    """A step changes the weights by far more or far less than a thousandth of their size.

    The median over weight matrices of |update| / |weight|: lr * |gradient| / |weight| for SGD, and lr * sqrt(elements)
    / |weight| for Adam and its kin, whose elements move by about lr. About 1e-3 is usual (Karpathy, CS231n). Too low is
    only said while the loss is above half of the initial one and no schedule has taken the learning rate down.

    Args:
        view: what to judge.
        high: ratio that is too high.
        low: ratio that is too low.
    """
    ratios, ratio = view.once(update_ratios), view.once(typical_update)
    recent = view.loss.tail(20).values
    unsolved = len(recent) > 0 and not median(recent) <= 0.5 * abs(view.initial_loss)
    too_high, too_low = ratio > high, 0.0 < ratio < low and unsolved and not _decayed(view)
    if not (too_high or too_low):
        return
    weights = view.layout.weights
    fold = max(ratio / 1e-3, 1e-3 / ratio)
    order = np.argsort(-ratios if too_high else ratios)  # NaN comes last
    yield view.finding(
        "warning" if too_high else "info",
        f"a step changes the median weight matrix by {ratio:.2g} of its size; about 1e-3 is usual",
        first_step=int(view.parameters.first_step[view.interval_stop - 1]),
        parameters=tuple(view.layout.infos[place].name for place in weights[order[:3]]),
        cause=f"the learning rate is too {'high' if too_high else 'low'} for these weights",
        action=f"{'lower' if too_high else 'raise'} the learning rate"
        + (f" about {fold:.0f}-fold" if np.isfinite(fold) else ""),
        numbers={"ratio": ratio},
    )


def _decayed(view: View) -> bool:
    """Tell whether a schedule has brought the learning rate below a tenth of where it was."""
    return any(
        len(points) and points.values[-1] < 0.1 * points.values[:: max(1, len(points) // 64)].max()
        for points in view.learning_rates.values()
    )
