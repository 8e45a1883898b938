"""Clip rules: the largest norm allowed, a constant or computed from the norms so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import finite_number, real_number, whole_number, wrong_type, wrong_value
from ..errors import InvalidTypeError


def checked_order(norm_type: Any) -> float:
    """Return the order of a norm; torch takes ``"inf"`` for it, too.

    Raises:
        InvalidTypeError: it is no number.
        InvalidValueError: it is NaN.
    """
    if isinstance(norm_type, str):
        try:
            norm_type = float(norm_type)
        except ValueError:
            raise wrong_type("norm_type", norm_type, "the order of a norm: a number, or 'inf'") from None
    order = real_number("norm_type", norm_type)
    if math.isnan(order):
        raise wrong_value("norm_type", norm_type, "the order of a norm: a number, or 'inf'")
    return order


def checked_max_norm(max_norm: Any, name: str = "max_norm") -> float:
    """Return the largest norm allowed, infinity for any.

    Raises:
        InvalidTypeError: it is no number.
        InvalidValueError: it is negative or NaN.
    """
    known = real_number(name, max_norm)
    if not known >= 0:
        raise wrong_value(name, max_norm, "the largest norm allowed, zero or more")
    return known


class ClipRule:
    """What a step's clip goes by. A rule belongs to one tracker, whose ``state_dict`` has its state.

    A rule of your own derives from this and has ``limit``; what it remembers from step to step is in tensors that are
    made by ``remember``, so that it costs no wait and survives a checkpoint.
    """

    norm_type = 2.0
    """The order of the norm that is limited: 2 or inf."""

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._saved: list[float] | None = None

    def limit(self, norm: Tensor) -> Tensor | float:
        """Return the largest norm allowed on this step.

        Args:
            norm: the total norm of this step's gradients, float64 [1], on their device; it may be NaN or Inf.

        Returns:
            The limit: a number, or float64 [1] on the same device. inf: no clip.
        """
        raise NotImplementedError

    def remember(self, device: torch.device, *initial: float) -> Tensor:
        """Return the state, float64 [number of ``initial``] on a device: these values at first, then as it was left."""
        if self._state is None:
            values = self._saved if self._saved is not None else list(initial)
            self._state = torch.tensor(values, dtype=torch.float64, device=device)
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers, as numbers. Waits for the device."""
        state = self._saved if self._state is None else self._state.tolist()
        return {"rule": type(self).__name__, "state": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            InvalidTypeError: it is of another rule.
        """
        if not isinstance(state, dict) or state.get("rule") != type(self).__name__:
            raise wrong_type("state", state, f"what {type(self).__name__}.state_dict() returned")
        self._state, self._saved = None, state.get("state")


class MaxNorm(ClipRule):
    """A constant limit, as ``torch.nn.utils.clip_grad_norm_`` has it: what ``clip=1.0`` stands for.

    The gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``.

    Args:
        max_norm: the largest total norm, in the unit of the gradients.
        norm_type: 2.0 or inf, which the step's own read knows; any other order that torch takes costs a read more.

    Example:
        >>> MaxNorm(1.0).limit(torch.ones(1))
        1.0
    """

    def __init__(self, max_norm: float, norm_type: float | str = 2.0) -> None:
        """Check the numbers."""
        super().__init__()
        self.max_norm, self.norm_type = checked_max_norm(max_norm), checked_order(norm_type)

    def limit(self, norm: Tensor) -> float:
        """Return the constant."""
        return self.max_norm


class ZClip(ClipRule):
    """Clips what lies far above the norms so far: by their running z-score (Kumar et al. 2025, arXiv 2504.02507).

    Mean m and variance v of the norm are exponential means. With ``s = sqrt(v)`` and ``k = (norm - m) / s``, a norm
    with ``k > z`` is brought down to ``m + z**2 / k * s``, the lower the further it was out, and enters the means so.
    In the first ``warmup`` steps nothing is clipped, and the means are plain. A norm that isn't finite leaves them be.

    Args:
        alpha: the weight of the means so far, 0 to 1.
        z: how many standard deviations above the mean a norm is clipped.
        warmup: steps without a clip, at least 2.

    Example:
        >>> rule = ZClip(warmup=2)
        >>> for norm in (1.0, 3.0):
        ...     _ = rule.limit(torch.tensor([norm], dtype=torch.float64))
        >>> round(rule.limit(torch.tensor([12.0], dtype=torch.float64)).item(), 4)  # mean 2, deviation 1, k = 10
        2.625
    """

    def __init__(self, alpha: float = 0.97, z: float = 2.5, warmup: int = 25) -> None:
        """Check the numbers."""
        super().__init__()
        self.alpha = finite_number("alpha", alpha, low=0.0, high=1.0)
        self.z = finite_number("z", z, above=0.0)
        self.warmup = whole_number("warmup", warmup, low=2)

    def limit(self, norm: Tensor) -> Tensor:
        """Return the limit, and take the norm into the means."""
        state = self.remember(norm.device, 0.0, 0.0, 0.0)
        count, mean, variance = state[:1], state[1:2], state[2:]
        deviation = variance.sqrt()
        score = (norm - mean) / (deviation + 1e-6)
        warm = count < self.warmup
        far = ~warm & (score > self.z)
        limit = torch.where(far, mean + self.z**2 / score * deviation, math.inf)
        taken = torch.where(far, limit, norm)
        weight = torch.where(warm, 1 / (count + 1), 1 - self.alpha)
        new_mean = mean + weight * (taken - mean)
        before = torch.where(warm, mean, new_mean)  # Welford's update has both means; the exponential one the new
        new_variance = variance + weight * ((taken - before) * (taken - new_mean) - variance)
        new = torch.cat([count + 1, new_mean, new_variance])
        state.copy_(torch.where(norm.isfinite(), new, state))
        return limit


class AutoClip(ClipRule):
    """Clips to a percentile of the norms so far (Seetharaman et al. 2020, arXiv 2007.14469).

    The limit is ``numpy.percentile(norms, percentile)``, this step's among them. A norm that isn't finite is left out.

    Args:
        percentile: 0 to 100; the paper has 10.
        window: how many of the latest norms count; the paper takes all.

    Example:
        >>> rule = AutoClip(percentile=50)
        >>> [rule.limit(torch.tensor([norm], dtype=torch.float64)).item() for norm in (1.0, 3.0, 8.0)]
        [1.0, 2.0, 3.0]
    """

    def __init__(self, percentile: float = 10.0, window: int = 10_000) -> None:
        """Check the numbers."""
        super().__init__()
        self.percentile = finite_number("percentile", percentile, low=0.0, high=100.0)
        self.window = whole_number("window", window, low=1)

    def limit(self, norm: Tensor) -> Tensor:
        """Return the percentile, and remember the norm."""
        state = self.remember(norm.device, 0.0, *[math.inf] * self.window)
        count, norms = state[:1], state[1:]
        place = (count % self.window).long()
        norms.scatter_(0, place, torch.where(norm.isfinite(), norm, norms[place]))
        count += norm.isfinite()
        known = count.clamp(min=1, max=self.window)
        ascending = norms.sort().values  # what is not there yet is inf, and so the last
        at = (known - 1) * (self.percentile / 100)
        low, high = ascending[at.floor().long()], ascending[at.ceil().long()]
        between = low + (high - low) * (at - at.floor())
        return torch.where(at == at.floor(), low, between)


class AGC(ClipRule):
    """Clips each parameter's gradient relative to its weight (Brock et al. 2021, arXiv 2102.06171).

    The gradient g of a parameter w is multiplied by ``min(1, clipping * max(||w||, eps) / ||g||)``. The paper takes the
    norms of rows; here they are those of whole parameters, which the step has measured already. ``clip_factor`` is the
    smallest of all factors.

    Args:
        clipping: how large a gradient's norm may be, in units of its weight's norm; the paper has 0.01.
        eps: the least norm that a weight is taken for, so that one of zeros can leave zero.
    """

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        """Check the numbers."""
        super().__init__()
        self.clipping = finite_number("clipping", clipping, above=0.0)
        self.eps = finite_number("eps", eps, above=0.0)

    def factors(self, norms: Tensor, weights: Tensor) -> Tensor:
        """Return the factor of each gradient, [T], from the norms of gradients and weights, [T]; NaN: it has none."""
        allowed = self.clipping * weights.clamp(min=self.eps)
        return torch.where(norms > allowed, allowed / norms, torch.where(norms.isnan(), norms, 1.0))

    def limit(self, norm: Tensor) -> float:
        """Say that the total norm has no limit of its own."""
        return math.inf


NAMED = {"zclip": ZClip, "autoclip": AutoClip, "agc": AGC}


def clip_rule(clip: Any, norm_type: Any = 2.0, name: str = "clip") -> ClipRule:
    """Return the rule that a ``clip=`` stands for: itself, one by name with its usual settings, or a constant limit.

    ``norm_type`` is that of a constant; ``name`` is what the argument is called.

    Raises:
        InvalidTypeError: it is none of these.
        InvalidValueError: it is a negative number, or NaN.

    >>> type(clip_rule("zclip")).__name__, clip_rule(1.0).max_norm
    ('ZClip', 1.0)
    """
    if isinstance(clip, ClipRule):
        return clip
    if isinstance(clip, str):
        if clip in NAMED:
            named: ClipRule = NAMED[clip]()
            return named
        raise wrong_type(name, clip, f"a number, a rule, or one of {', '.join(map(repr, NAMED))}")
    order = checked_order(norm_type)
    try:
        return MaxNorm(checked_max_norm(clip, name), order)
    except InvalidTypeError:
        raise wrong_type(name, clip, "the largest norm allowed, a rule as ZClip(), or its name") from None
