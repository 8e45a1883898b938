"""Rules about single parameters: which one is not finite, dead, out of line, or moves too much or too little."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..columns import INFS, NANS
from ..evidence import Finding, Int64Array, View, finite_only, median, rule

_NAMED = 20  # parameters named in a finding at most


@rule
def gradient_nonfinite(view: View) -> Iterator[Finding]:
    """A gradient has a NaN or Inf element.

    The first step, and the first parameter: backward runs from the loss to the inputs, and what isn't finite spoils
    everything after it, so of the parameters that are not finite in that step the one nearest to the loss (the last of
    the model's order) is the origin. No threshold. Steps that were skipped, as a GradScaler does while it finds its
    scale, are information where they are few: those of which ``step_skipped`` says so, and those after which the
    gradients are finite.
    """
    known = view.previous
    found = _first_seen(view) if known is None else known
    if found is None:
        return
    grown = _grown(view, found, found.first_step if known is None else view.since - 1)
    spared = (known is None or known.severity != "critical") and _were_skipped(view, view.since)
    severity = _severity(view, grown, spared)
    news = _first_seen(view) if severity == "critical" and grown.severity != severity else None
    if news is not None:  # it was harmless up to here
        yield replace(news, numbers=grown.numbers)
        return
    if severity != grown.severity:
        view.withdraw("the steps were skipped: later gradients are finite")
        grown = replace(grown, severity=severity, action="look at the batches of these steps")
        if severity == "info":
            grown = replace(
                grown, cause=_SKIPPED, action="nothing, unless it happens more often than once in 100 steps"
            )
    yield grown


_SKIPPED: Final = "a GradScaler that finds its scale, or a clip with a fused optimizer: both skip such steps"
_STUCK: Final = 20  # steps in a row without a finite gradient; a GradScaler halves 65,536 to 1 in 16


def _were_skipped(view: View, since: int) -> bool:
    """Whether each step from ``since`` on whose norm isn't finite is recorded as one that the optimizer left out."""
    skipped = view["step_skipped"]
    if not len(skipped):
        return False
    start = skipped.index(since)
    left_out = skipped.steps[start:][skipped.values[start:] > 0]
    return bool(np.isin(_steps_not_finite(view, since), left_out).all())


def _severity(view: View, found: Finding, spared: bool) -> str:
    """Return "info" for a few steps that were skipped: had the optimizer taken them, no later gradient were finite.

    A "warning" where they were many, or the loss wasn't finite either. ``spared``: all are recorded as skipped.
    """
    norms = view["grad_norm"]
    after = norms.values[norms.index(found.last_step + 1) :]
    bad = found.numbers.get("later_steps", 0.0) + 1
    losses = view.loss.values[view.loss.index(found.last_step + 1) :]
    recovered = len(after) >= 3 and np.isfinite(after).all() and np.isfinite(losses).all()
    stuck = len(norms) >= _STUCK and not np.isfinite(norms.values[-_STUCK:]).any()
    if recovered or (spared and not stuck):
        usual = bad <= max(20.0, 0.02 * len(norms)) and np.isfinite(found.numbers.get("loss", np.nan))
        return "info" if usual else "warning"
    return "critical"


def _first_seen(view: View) -> Finding | None:
    """Return the first gradient that is not finite, or None."""
    if not len(view["grad_norm"]) and not view.interval_stop:
        view.cannot_judge(view.lacks("gradient norm"))
    start, stop = view.interval_since, view.interval_stop
    if start < stop:
        first = view.parameters.field("first_nonfinite")[start:stop]
        seen = first[first >= max(0, view.since)]
        if len(seen):
            return _located(view, int(seen.min()), first)
    total = view["grad_norm"]
    bad = _steps_not_finite(view, view.since)
    if not len(bad):
        return None
    step = int(bad[0])
    return view.finding(
        "critical",
        f"the gradient norm is {total.at(step)} at step {step}; {_loss_at(view, step)}",
        first_step=step,
        last_step=step,
        cause="a division by zero, a logarithm or root of a negative number, or an overflow",
        action="record the parameters to find the layer; torch.autograd.set_detect_anomaly(True) finds the operation",
        numbers=finite_only(step=step, loss=view.loss.at(step)),
    )


def _steps_not_finite(view: View, since: int) -> np.ndarray:
    """Return the steps from ``since`` on whose norm isn't finite. One without any gradient has a count of NaN, too."""
    total, counts = view["grad_norm"], view["grad_nonfinite"]
    start = total.index(since)
    bad = total.steps[start:][~np.isfinite(total.values[start:])]
    return bad[~np.isin(bad, counts.steps[np.isnan(counts.values)])] if len(bad) else bad


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
    bad = _steps_not_finite(view, after + 1)
    if not len(bad):
        return known
    count = known.numbers.get("later_steps", 0.0) + len(bad)
    numbers = {**known.numbers, "later_steps": float(count)}
    return replace(known, last_step=int(bad[-1]), numbers=numbers)


def _loss_at(view: View, step: int) -> str:
    loss = view.loss.at(step)
    if np.isnan(loss) and step not in view.loss.steps[-1:] and view.loss.index(step) >= len(view.loss):
        return "the loss of that step isn't known"
    if loss == 0.0:
        return "the loss was exactly 0, as an overflow of float16 leaves it"
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
        if not view.interval_stop:
            view.cannot_judge("the gradients of the parameters are not recorded")
        return
    zero, missing = _without_gradient(view, window)
    dead = np.flatnonzero(zero | missing)
    if not len(dead):
        return
    found = _Dead(
        dead=dead,
        missing=missing[dead],
        total=len(view.layout.infos),
        since=_dead_since(view, window, dead, steps),
        last=int(last[window.stop - 1]),
    )
    yield found.finding(view, window)


@dataclass(frozen=True)
class _Dead:
    """The parameters without a gradient other than zero, [n]; of which some have none at all."""

    dead: Int64Array
    missing: NDArray[np.bool_]
    total: int
    since: int
    last: int

    def finding(self, view: View, window: slice) -> Finding:
        """Return it in words."""
        names = tuple(view.layout.infos[place].name for place in self.dead[:_NAMED])
        unused = int(self.missing.sum())
        kind = "a zero" if not unused else "no" if unused == len(self.dead) else "a zero or no"
        severity, cause, action = self._verdict(view, window)
        steps = self.last - self.since + 1
        return view.finding(
            severity,
            f"{len(self.dead)} of {self.total} parameters ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) "
            f"have had {kind} gradient for {steps} steps",
            first_step=self.since,
            last_step=self.last,
            parameters=names,
            cause=cause,
            action=action,
            numbers={
                "dead": float(len(self.dead)),
                "missing": float(unused),
                "since": float(self.since),
                "steps": float(steps),
            },
        )

    def _verdict(self, view: View, window: slice) -> tuple[str, str, str]:
        """Return the severity, the likely cause and what to do."""
        if len(self.dead) == self.total:
            if view.learns:
                return (
                    "critical",
                    "tracker.step() runs after optimizer.zero_grad(): the loss falls, so there are gradients",
                    "call tracker.step() after loss.backward() and before optimizer.zero_grad()",
                )
            return (
                "critical",
                "tracker.step() runs after optimizer.zero_grad(), or the loss doesn't depend on the model: a detached "
                "loss, zeroed targets, or no backward(); or float16 gradients underflow",
                "call tracker.step() after loss.backward() and before optimizer.zero_grad(); then check that the loss "
                "is computed from the model's output, without detach() or item()",
            )
        if self.missing.all():
            return self._unused(view)
        if _underflows(view, window):
            return (
                "warning",
                "gradients underflow in float16: what is left of the others are multiples of its smallest number",
                "scale the loss with a GradScaler, or use bfloat16",
            )
        return (
            "warning",
            "dead ReLUs, a mask or a detach before them: nothing comes back through",
            "check biases and masks of the layer after the last one named; use LeakyReLU or GELU",
        )

    def _unused(self, view: View) -> tuple[str, str, str]:
        trained = np.array([bool(view.layout.infos[place].group) for place in self.dead])
        if "frozen" in view.meta and (trained & ~view.frozen[self.dead]).any():
            return (
                "warning",
                "they are in the optimizer and require a gradient, and get none: a branch that is detached, or not "
                "used in the forward pass",
                "use them, freeze them (requires_grad_(False)), or remove them",
            )
        return (
            "info",
            "frozen (requires_grad=False), or not used in the forward pass",
            "nothing if they are meant to be frozen; use or remove them otherwise",
        )


_SMALLEST_HALF: Final = 2.0**-24  # the smallest float16 above zero; below 2**-14 all are multiples of it


def _underflows(view: View, window: slice) -> bool:
    """Tell whether gradients that are small are all multiples of the smallest float16."""
    largest = view.parameters.field("abs_max")[window.stop - 1].astype(np.float64)
    small = largest[(largest > 0) & (largest < 2.0**-14)]
    return len(small) > 0 and bool((small / _SMALLEST_HALF == np.round(small / _SMALLEST_HALF)).all())


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
    gradient_vanishing and gradient_exploding. It is information where it is not ten times as far.

    Args:
        view: what to judge.
        decades: distance from the median layer in powers of ten.
        share: at most so many of the layers are out of line.
    """
    weights, level = view.layout.weights, view.weight_levels
    known = np.isfinite(level)
    if not view.interval_stop:
        view.cannot_judge("the gradients of the parameters are not recorded")
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
        "info" if abs(far) < decades + 1 else "warning",
        f"the rms gradient of {names[0]!r} is 10^{abs(far):.1f} times {'above' if far > 0 else 'below'} that of the "
        f"median of {int(known.sum())} weight matrices (1e{level[out[0]]:.1f} against 1e{middle:.1f})",
        first_step=int(view.parameters.first_step[view.interval_stop - 3]),
        parameters=names,
        cause="a layer on another scale: its inputs, its initialisation, or a multiplier on its gradient",
        action="normalise what goes into it, check its initialisation and scaling; Adam hides it, SGD doesn't",
        numbers={"decades": far, "layers": float(len(out))},
    )
