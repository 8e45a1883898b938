"""Rules about the gradient as a whole, and about its profile by depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..evidence import Finding, Float64Array, Points, View, finite_median, finite_only, median, rule, theil_sen, thin
from .updates import optimizer_kind


class Profile(NamedTuple):
    """The root mean square gradient element of each weight matrix, in the model's order."""

    places: np.ndarray  # int64 [n], which parameters
    level: Float64Array  # log10 of the rms, [n]
    decades: float  # how many powers of ten it falls from the last to the first; negative where it rises


def depth_profile(view: View) -> Profile | None:
    """Return the profile now, or None where fewer than 5 weight matrices have a gradient.

    ``decades`` is Theil and Sen's slope over the depth, times the depth, but no more than the last matrix differs from
    the first, nor than the last third of them from the first third, drawn out to the whole: no single layer can make
    it, nor a profile that goes up and comes down again.
    """
    known = np.isfinite(view.weight_levels)
    if known.sum() < 5:
        return None
    places, level = view.layout.weights[known], view.weight_levels[known]
    depth, medians = thin(np.arange(len(level)), level)
    span, third = len(level) - 1, len(level) // 3
    slope = theil_sen(depth, medians).estimate * span
    thirds = (median(level[-third:]) - median(level[:third])) * span / (len(level) - third)
    ends = float(level[-1] - level[0])
    agreed = min(slope, thirds, ends, key=abs) if slope * thirds > 0 and slope * ends > 0 else 0.0
    return Profile(places, level, agreed)


def _reference(norms: Points, count: int = 20) -> float:
    """Return the median of the first norms, up to the first that isn't finite; NaN where there is none."""
    head = norms.values[:count]
    bad = np.flatnonzero(~np.isfinite(head))
    head = head[: bad[0]] if len(bad) else head
    head = head[head > 0]
    return median(head) if len(head) else float("nan")


def _new_blocks(view: View, norms: Points, width: int) -> tuple[np.ndarray, Float64Array]:
    """Return the steps [B, width] and the medians of the full blocks of norms that reach into the new steps."""
    start = max(0, norms.index(view.since) - width)
    count = (len(norms) - start) // width
    tail = slice(len(norms) - count * width, None)
    blocks = norms.values[tail].reshape(count, width)
    return norms.steps[tail].reshape(count, width), finite_median(blocks)


@rule
def gradient_exploding(
    view: View,
    growth: float = 20.0,
    strain: float = 2.0,
    largest: float = 65504.0,
    decades: float = 3.0,
    width: int = 10,
) -> Iterator[Finding]:
    """The gradient norm explodes: over time, from the start, or with depth.

    Over time: the median of ``width`` norms, or a norm within the 5 steps before one that isn't finite, is ``growth``
    times the median of the first 20. From the start: the median over the first 3 or the first 20 steps of norm * weight
    norm / (loss * root of the number of weights) is above ``strain``. That is by how many per cent the loss changes
    when the weights change by one per cent in a random direction; neither the scale of the loss nor the size of the
    model matters. Or the norm is above ``largest`` there. With depth: the rms gradient grows by ``decades`` powers of
    ten from the last weight matrix to the first.

    Args:
        view: what to judge.
        growth: ratio to the first norms.
        strain: limit of the relative change of the loss by that of the weights, of all weight matrices.
        largest: limit of the norm itself; 65504 is the largest float16.
        decades: growth over the depth, in powers of ten.
        width: norms in a block.
    """
    norms = view["grad_norm"]
    reference = _reference(norms)
    if not np.isfinite(reference):
        if not len(norms):
            view.cannot_judge(view.lacks("gradient norm"))
        return
    if view.previous is not None and view.previous.rank and "ratio" in view.previous.numbers and view.learns:
        view.withdraw(f"the loss fell to {view.course.now:.4g} by {view.unit} {view.stop - 1} all the same")
    growth_found = _measure_growth(view, norms, reference, width)
    if growth_found is not None and growth_found.exceeds(growth):
        yield growth_found.finding(view, norms, growth)
    yield from _runs_away(view, norms, reference, growth)
    yield from _from_the_start(view, norms, reference, strain, largest)
    yield from _with_depth(view, decades)


class Growth(NamedTuple):
    """The medians of blocks of gradient norms, beside that of the first norms."""

    reference: float
    steps: np.ndarray  # [B, width]
    blocks: Float64Array
    ratio: Float64Array

    def exceeds(self, growth: float) -> bool:
        """Tell whether a block is ``growth`` times the first norms."""
        return bool((self.ratio >= growth).any())

    def finding(self, view: View, norms: Points, growth: float) -> Finding:
        """Return it in words: information while the loss falls, or where it isn't meant to."""
        grown = np.flatnonzero(self.ratio >= growth)
        worst = int(grown[np.nanargmax(self.ratio[grown])])
        begin, ratio = int(self.steps[grown[0], 0]), float(self.ratio[worst])
        times = f", {ratio:.3g} times as large" if np.isfinite(ratio) else ""
        harmless = view.learns or bool(view.objective) or view.signed
        return view.finding(
            "info" if harmless else "critical" if ratio >= 100 * growth else "warning",
            f"the gradient norm was {self.reference:.3g} in the first 20 steps and is {self.blocks[worst]:.3g} at step "
            f"{self.steps[worst, -1]}{times} (medians of {self.steps.shape[1]})"
            + (", and the loss falls" if view.learns else ""),
            first_step=begin,
            last_step=int(self.steps[grown[-1], -1]),
            cause=(
                "a loss whose gradients grow as it gets better"
                if harmless
                else "unstable optimisation: the learning rate is too high, or a recurrence amplifies"
            ),
            action=("nothing while the loss falls" if harmless else _clip(view, norms, begin, growth * self.reference)),
            numbers=finite_only(reference=self.reference, norm=self.blocks[worst], ratio=ratio),
        )


def _measure_growth(view: View, norms: Points, reference: float, width: int) -> Growth | None:
    steps, blocks = _new_blocks(view, norms, width)
    if not len(blocks):
        return None
    return Growth(reference, steps, blocks, blocks / reference)


def _runs_away(view: View, norms: Points, reference: float, growth: float) -> Iterator[Finding]:
    last = norms.runaway(view.since)
    if not len(last) or last.values.max() < growth * reference:
        return
    yield view.finding(
        "critical",
        f"the gradient norm rose from {reference:.3g} to {last.values.max():.3g}, and was not finite after step "
        f"{last.steps[-1]}",
        first_step=int(last.steps[0]),
        last_step=int(last.steps[-1]),
        cause="unstable optimisation: each step makes the next gradient larger",
        action=_clip(view, norms, int(last.steps[0]), growth * reference),
        numbers={"reference": reference, "norm": float(last.values.max())},
    )


def _from_the_start(view: View, norms: Points, reference: float, strain: float, largest: float) -> Iterator[Finding]:
    end = int(norms.steps[min(len(norms), 20) - 1])
    if view.since > end or view.objective or view.signed:
        return
    size = 0.0
    if view.interval_stop:
        places = view.layout.weights
        sizes = view.parameters.field("weight_norm")[0][places].astype(np.float64)
        size = float(np.sqrt((sizes * sizes).sum() / max(1.0, view.layout.numel[places].sum())))
    losses = np.array([abs(view.loss.at(int(step))) for step in norms.steps[:20]])
    losses[losses == 0] = np.nan
    shares = norms.values[:20] / losses
    loss = float(finite_median(losses))
    strained = float(np.fmax(finite_median(shares[:3]), finite_median(shares))) * size
    if not np.isfinite(strained):
        strained = 0.0  # no loss, or no size of the weights, to compare with
    if strained < strain and reference < largest:
        return
    yield view.finding(
        "warning",
        f"in the first {min(len(norms), 20)} steps the gradient norm is {reference:.3g}"
        + (f" with a loss of {loss:.3g}" if np.isfinite(loss) else "")
        + (
            f" and weights of rms {size:.3g}: 1 % of them at random is {strained:.2g} % of the loss" if strained else ""
        ),
        first_step=int(norms.steps[0]),
        last_step=end,
        cause="the network amplifies: initialisation too large, a recurrence with gain above 1, inputs not normalised",
        action="clip at 1.0, scale the initialisation down (orthogonal for recurrences), normalise inputs and layers",
        numbers=finite_only(norm=reference, loss=loss, weights=size, strain=strained),
    )


def _with_depth(view: View, decades: float) -> Iterator[Finding]:
    profile = view.once(depth_profile)
    if profile is None or profile.decades > -decades:
        return
    infos = view.layout.infos
    first, last = infos[profile.places[0]].name, infos[profile.places[-1]].name
    yield view.finding(
        "info" if view.learns else "warning",
        f"the rms gradient grows by {-profile.decades:.1f} powers of ten from {last!r} (1e{profile.level[-1]:.1f}) "
        f"to {first!r} (1e{profile.level[0]:.1f})",
        parameters=(first,),
        cause="each layer amplifies what comes back: initialisation too large for the depth",
        action="scale the initialisation down, add normalisation or residual connections, clip gradients",
        numbers={"decades": -profile.decades},
    )


@rule
def gradients_add_up(view: View, steps: int = 30, growth: float = 4.0) -> Iterator[Finding]:
    """Nothing zeroes the gradients: the first norms grow from step to step, as sums of gradients do.

    At least 85 % of the first ``steps`` norms are above the one before, none falls to half of the largest so far, and
    the last are ``growth`` times the first. A
    sum of k gradients is at least about the root of k times as long as one, so it more than doubles within 5 steps:
    growth by training alone does not begin like that.

    Args:
        view: what to judge.
        steps: how many norms are looked at.
        growth: of the norm within them.
    """
    norms = view["grad_norm"]
    head = norms.values[:steps]
    if not len(norms):
        view.cannot_judge(view.lacks("gradient norm"))
    if len(head) < steps or norms.steps[steps - 1] < view.since or not (np.isfinite(head).all() and head[0] > 0):
        return
    first = median(head[:2])
    if (head < 0.5 * np.maximum.accumulate(head)).any():
        return  # something does zero them: gradients are accumulated over a few steps, and that is meant
    if (np.diff(head) > 0).mean() < 0.85 or median(head[4:7]) < 2.2 * first or median(head[-5:]) < growth * first:
        return
    yield view.finding(
        "warning",
        f"the gradient norm grows from step to step, from {head[0]:.3g} to {head[-1]:.3g} within {steps} steps",
        first_step=int(norms.steps[0]),
        last_step=int(norms.steps[steps - 1]),
        cause="gradients add up because nothing zeroes them",
        action="call optimizer.zero_grad() before each backward(), or model.zero_grad() where it hasn't all parameters",
        numbers=finite_only(first=head[0], norm=head[-1]),
    )


@rule
def gradient_vanishing(
    view: View, decades: float = 4.0, absolute: float = 1e-7, relative: float = 1e-4, steps: int = 50
) -> Iterator[Finding]:
    """The gradient is near zero, in the first layers or everywhere, while there is still loss to reduce.

    With depth: the rms gradient falls by ``decades`` powers of ten from the last weight matrix to the first. As a
    whole: the norms of the last ``steps`` steps have a median below ``absolute``, or below ``relative`` of the first
    ones, and the loss is still above half of the initial one, so it isn't that the training has converged. Exact zeros
    are dead, not vanishing.

    Args:
        view: what to judge.
        decades: fall over the depth, in powers of ten.
        absolute: norm that is near zero on any scale.
        relative: the same, relative to the first 20 norms.
        steps: how long.
    """
    profile = view.once(depth_profile)
    infos = view.layout.infos
    if not len(view["grad_norm"]) and profile is None:
        view.cannot_judge(view.lacks("gradient norm"))
    if profile is not None and profile.decades >= decades:
        middle = median(profile.level)
        low = profile.places[profile.level < max(middle, profile.level[-1] - decades / 2)]
        first, last = infos[profile.places[0]].name, infos[profile.places[-1]].name
        yield view.finding(
            "info" if view.learns else "warning",
            f"the rms gradient falls by {profile.decades:.1f} powers of ten from {last!r} (1e{profile.level[-1]:.1f}) "
            f"to {first!r} (1e{profile.level[0]:.1f})",
            first_step=int(view.parameters.first_step[max(0, view.interval_stop - 3)]),
            parameters=tuple(infos[place].name for place in low[:20]),
            cause="saturating activations or a small initialisation: each layer passes on a fraction of the gradient",
            action="use ReLU-like activations with He initialisation, normalisation, or residual connections",
            numbers={"decades": profile.decades},
        )
    norms = view["grad_norm"].tail(steps)
    reference = _reference(view["grad_norm"])
    recent = view.loss.tail(steps).values
    if len(norms) < steps or not np.isfinite(norms.values).all() or not len(recent):
        return
    norm, loss = median(norms.values), median(recent)
    limit = max(absolute, relative * reference if np.isfinite(reference) else 0.0)
    if 0.0 < norm <= limit and loss > 0.5 * view.initial_loss and not (view.signed or view.objective):
        share = 100 * loss / view.initial_loss if view.initial_loss else float("nan")
        yield view.finding(
            "warning",
            f"the median gradient norm of the last {steps} steps is {norm:.3g}"
            + (f" (it was {reference:.3g} at first)" if np.isfinite(reference) else "")
            + (f", and the loss is {loss:.4g}" if np.isfinite(loss) else "")
            + (f", which is {share:.0f} % of the initial one" if np.isfinite(share) else ""),
            first_step=int(norms.steps[0]),
            cause="saturated activations, or a loss that hardly depends on the parameters",
            action="check activations, initialisation and the scale of the loss",
            numbers=finite_only(norm=norm, reference=reference, loss=loss),
        )


@rule
def always_clipped(view: View, share: float = 0.9, aggressive: float = 0.5, steps: int = 100) -> Iterator[Finding]:
    """The gradient is clipped at nearly every step, so clipping is a learning rate in disguise.

    The share of the last ``steps`` steps whose norm reached the clipping threshold. The threshold is
    ``meta["clip_threshold"]``; it doesn't matter whether norms were recorded before or after clipping. Many recipes
    clip at every step, and Adam and its kin don't mind: a warning needs another optimizer, and a loss that doesn't
    fall.

    Args:
        view: what to judge.
        share: share of clipped steps for a warning.
        aggressive: share of clipped steps worth knowing; half, which the Deep Learning Tuning Playbook calls extremely
        aggressive.
        steps: how many of the last steps are looked at.
    """
    threshold = view.meta.get("clip_threshold")
    norms = view["grad_norm"].tail(steps)
    if not isinstance(threshold, (int, float)) or not threshold > 0:
        view.cannot_judge("no clip_threshold in the training's meta")
        return
    if len(norms) < steps:
        return
    if view.previous is not None and view.previous.rank and view.learns:
        view.withdraw(f"the loss fell to {view.course.now:.4g} by {view.unit} {view.stop - 1} all the same")
    values = norms.values[np.isfinite(norms.values)]
    clipped = float((values >= 0.999 * threshold).mean()) if len(values) else 0.0
    if clipped <= aggressive:
        return
    middle, high = (float(np.percentile(values, q)) for q in (50, 90))
    hurts = clipped >= share and not view.learns and optimizer_kind(view) != "adaptive" and not view.objective
    before = high > 1.01 * threshold
    yield view.finding(
        "warning" if hurts else "info",
        f"{100 * clipped:.0f} % of the last {steps} steps reached the clipping threshold {threshold:g}; the median "
        f"norm is {middle:.3g}, the 90th percentile {high:.3g}",
        first_step=int(norms.steps[0]),
        cause="the threshold is below the usual norm: every step has the same length, whatever the gradient says",
        action=(
            "nothing while the loss falls: many recipes clip at every step"
            if not hurts
            else "raise the threshold 3- to 10-fold, one try at a time"
            if before
            else "raise the threshold, and record the norm before clipping: clip_grad_norm_ returns it"
        ),
        numbers={"share": clipped, "threshold": float(threshold), "median": middle, "p90": high},
    )


def _clip(view: View, norms: Points, begin: int, limit: float) -> str:
    """Return what to do: at which of the norms below ``limit``, from before the growth began, to clip."""
    known = view.previous.first_step if view.previous is not None else begin
    stop = norms.index(min(begin, known)) or norms.index(begin)  # 0: what is known is told from the first step on
    head = norms.values[: min(200, stop)]
    head = head[(head > 0) & (head < limit)]
    at = f" at {np.percentile(head, 90):.2g}: the 90th percentile of the usual norms" if len(head) else " the gradient"
    return f"clip{at}; lower the learning rate 3- to 10-fold"
