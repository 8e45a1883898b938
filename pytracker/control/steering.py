"""Acts on the gradients that a tracker has just read: scales them, or has the optimizer do it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..columns import COLUMNS, SUM_SQ, TOTALS
from ..core import DeviceLog, LocalParameter, make_plan, native
from ..errors import InvalidValueError, LayoutError
from ..reference import root
from .clipping import norm_by_torch
from .loss_scale import LossScale
from .optimizers import FusedOptimizer, reason_against
from .rules import AGC, ClipRule, MaxNorm, clip_rule
from .sources import GradientSource
from .totals import TotalNorm

logger = logging.getLogger("pytracker")

CLIP_SERIES = ("clip_factor", "step_skipped")
"""What is recorded of a clip: by what the gradients were multiplied, and whether the step was skipped."""

Append = Callable[..., None]


class _Overflow(MaxNorm):
    """No clip: only whether the step is finite."""


@dataclass
class _Asked:
    """A rule, and what is kept for it from step to step."""

    rule: ClipRule
    clip: Any  # what the native core is asked; see csrc/clip.h
    limit: Tensor | None  # float64 [1], where the rule's limit is no constant


class Steering:
    """Clips by the norm that a step's own launch has left on the device.

    Args:
        log: has the rows.
        plan: reads and scales the gradients.
        parameters: those of the plan.
        optimizer: may take the factor; None for none.
        process_group: the ranks over which plain parameters are spread.
        scale: what the gradients are multiplied by where a GradScaler is given.
        source: where the gradients are.
    """

    def __init__(
        self,
        log: DeviceLog,
        plan: Any,
        parameters: Sequence[LocalParameter],
        optimizer: Any,
        process_group: Any,
        scale: LossScale,
        source: GradientSource,
    ) -> None:
        self._log, self._plan, self._parameters = log, plan, parameters
        self._optimizer, self._process_group = optimizer, process_group
        self._scale_of_loss, self._source = scale, source
        self._elsewhere = False  # the gradients of the latest step are not in .grad
        self._were_given = False  # they came with the step
        self._overflow: _Asked | None = None  # what is asked of a step without a clip, which a GradScaler may skip
        self._found_inf: Tensor | None = None  # where it is no fused optimizer that has the flag
        self._total: TotalNorm | None = None
        self._fused: FusedOptimizer | None = None
        self._is_prepared = False
        self._asked: _Asked | None = None
        self._given: Any = None  # what that was asked as
        self._weights: Any = None  # a plan that reads the parameters themselves
        self._outcome = torch.empty(0, device="cpu")
        self._divisor: Any = None  # of the latest step's statistics
        self._saved: dict[str, Any] | None = None

    def step(self, append: Append, step: int, scalars: dict[str, Any], asked: Any, gradients: Any = None) -> None:
        """Append a row, and clip by it; without a clip, only append."""
        self._were_given = gradients is not None
        if not self._were_given and self._source.is_grad:
            self._elsewhere = False
            self._step(append, step, scalars, asked)
            return
        with self._source.given(gradients) as self._elsewhere:
            self._step(append, step, scalars, asked)

    def _step(self, append: Append, step: int, scalars: dict[str, Any], asked: Any) -> None:
        if self._scale_of_loss.is_on:
            asked = asked or self._ask_for_overflow()
            if scalars.get("grad_scale") is None:
                scalars = {**scalars, "grad_scale": self._scale_of_loss.of_gradients()}
        self._divisor = scalars.get("grad_scale")
        if asked is None:
            append(step, scalars)
            return
        if self._is_within_the_launch(asked):
            append(step, scalars, asked.clip)
            self._apply(asked.rule)
            return
        append(step, scalars, hold=True)
        self._decide(asked)

    def clip(self, asked: Any, record: Callable[[dict[str, float]], None], gradients: Any = None) -> Tensor:
        """Clip by the row of the latest step, and return the norm before, as torch's function does.

        ``record`` is given the results where the row has left already: finding them out waits. Gradients are those that
        the step was given, where they are now.
        """
        if self._were_given and gradients is None:
            raise InvalidValueError("the latest step was given its gradients; give them to clip() too, as gradients=")
        with self._source.given(gradients) as self._elsewhere:
            return self._clip(asked, record)

    def _clip(self, asked: Any, record: Callable[[dict[str, float]], None]) -> Tensor:
        if not self._decide(asked, late=True):
            factor, skipped = float(self._outcome[1]), not math.isfinite(self._outcome[0])
            results = {"clip_factor": factor, "step_skipped": float(skipped)}
            record(results if self._takes_factor(asked.rule) else {"clip_factor": factor})
        return self._outcome[0].to(torch.float64 if self._plan.any_is_double() else torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule in use remembers. Waits for the device."""
        return {} if self._asked is None else self._asked.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it to the rule in use, or the first that will be."""
        self._saved = state or None
        if self._asked is not None and state:
            self._asked.rule.load_state_dict(state)
            self._saved = None

    def close(self) -> None:
        """Leave the optimizer alone from now on."""
        if self._fused is not None:
            self._fused.remove()

    def ask(self, clip: Any, norm_type: Any = 2.0, name: str = "clip") -> Any:
        """Return the rule for what a step is given, prepared; what is given twice is one rule, whose state goes on.

        Raises:
            InvalidTypeError, InvalidValueError: it is nothing that can be clipped by.
            LayoutError: the gradients cannot be scaled.
        """
        if self._asked is not None:
            given = (type(clip), clip, norm_type) if isinstance(clip, (int, float, str)) else (clip,)
            if clip is self._asked.rule or given == self._given:
                return self._asked
        rule = clip_rule(clip, norm_type, name)
        self._prepare(rule)
        tensor = None if isinstance(rule, MaxNorm) else torch.empty(1, dtype=torch.float64, device=self._outcome.device)
        limit: Any = rule.max_norm if isinstance(rule, MaxNorm) else tensor
        by_row = 2.0 if rule.norm_type == 2 else math.inf
        asked = native.make_clip(self._plan, by_row, limit, self._outcome, **self._attributes(rule))
        self._asked = _Asked(rule, asked, tensor)
        self._given = (type(clip), clip, norm_type) if isinstance(clip, (int, float, str)) else (clip,)
        if self._saved is not None:
            rule.load_state_dict(self._saved)
            self._saved = None
        return self._asked

    def _ask_for_overflow(self) -> _Asked:
        """Return what only tells whether the norm is finite: a GradScaler skips the step where it is not."""
        if self._overflow is None:
            rule = _Overflow(math.inf)
            self._prepare(rule)
            asked = native.make_clip(self._plan, 2.0, math.inf, self._outcome, **self._attributes(rule))
            self._overflow = _Asked(rule, asked, None)
        return self._overflow

    def _attributes(self, rule: ClipRule) -> dict[str, Tensor]:
        """Return where a decision leaves what a fused optimizer takes; a GradScaler's skips are recorded as well."""
        if self._fused is not None and self._takes_factor(rule):
            return self._fused.attributes
        if not self._scale_of_loss.is_on:
            return {}
        if self._found_inf is None:
            self._found_inf = torch.zeros((), dtype=torch.float32, device="cpu").to(self._outcome.device)
        return {"found_inf": self._found_inf}

    def _prepare(self, rule: ClipRule) -> None:
        """Find out once how the gradients lie on devices and ranks, and whether the optimizer takes a factor."""
        if self._is_prepared:
            return
        if any(each.window[1] >= 0 for each in self._parameters):
            raise LayoutError(
                "a FullyShardedDataParallel is clipped by its own method, model.clip_grad_norm_(max_norm, norm_type)"
            )
        self._total = TotalNorm(self._parameters, self._plan.members, self._process_group)
        device = self._plan.devices[0]
        self._outcome = torch.ones(2, dtype=torch.float64, device="cpu").to(device)
        reason = reason_against(self._optimizer, [p for p in self._source.parameters if p.requires_grad])
        if not reason:
            self._fused = FusedOptimizer(self._optimizer, device)
        elif self._optimizer is not None:
            logger.info("a clip scales the gradients, since the optimizer cannot take the factor: %s", reason)
        self._is_prepared = True

    def _takes_factor(self, rule: ClipRule) -> bool:
        return self._fused is not None and not isinstance(rule, (AGC, _Overflow))

    def _is_within_the_launch(self, asked: _Asked) -> bool:
        """Whether the row's own launch can decide."""
        by_row = asked.rule.norm_type == 2 or math.isinf(asked.rule.norm_type)
        return asked.limit is None and by_row and self._total is not None and self._total.is_local

    def _decide(self, asked: _Asked, *, late: bool = False) -> bool:
        """Decide by a row that is written, and act; return whether the row has what was decided.

        ``late``: the gradients may not be where they were when they were read.
        """
        rule = asked.rule
        if self._is_within_the_launch(asked):
            recorded = self._log.decide(asked.clip)
        else:
            norm = self._norm(rule)
            if isinstance(rule, AGC):
                return self._clip_each(rule, asked, norm, late)
            if asked.limit is not None:
                limit = rule.limit(norm)
                asked.limit.copy_(limit.reshape(1)) if isinstance(limit, Tensor) else asked.limit.fill_(limit)
            recorded = self._log.decide(asked.clip, norm)
        self._apply(rule, late)
        return recorded

    def _apply(self, rule: ClipRule, late: bool = False) -> None:
        if isinstance(rule, _Overflow):
            return
        if self._takes_factor(rule) and self._fused is not None and not self._elsewhere:
            self._fused.attach()
        else:
            self._scale(self._outcome[1:], late)

    def _scale(self, factors: Tensor, late: bool) -> None:
        if late:
            self._plan.gather()
        self._plan.scale(factors)

    def _norm(self, rule: ClipRule) -> Tensor:
        """Return the norm of all gradients of all ranks, float64 [1]."""
        assert self._total is not None
        if rule.norm_type == 2 or math.isinf(rule.norm_type):
            return self._total.norm(self._log.latest(), rule.norm_type)
        if self._process_group is not None:
            raise InvalidValueError(
                f"norm_type is {rule.norm_type}; over the ranks of a process_group only the norms of order 2 and inf "
                "are known"
            )
        norm = norm_by_torch(self._source.present(), rule.norm_type)
        norm = norm.to(self._outcome.device, torch.float64).reshape(1)
        return norm if self._divisor is None else norm / self._divisor

    def _clip_each(self, rule: AGC, asked: _Asked, norm: Tensor, late: bool) -> bool:
        """Scale each gradient by a factor of its own; the smallest is what is recorded."""
        if self._total is None or not self._total.is_local:
            raise LayoutError("AGC needs whole parameters on one device: these are spread over devices or ranks")
        if self._weights is None:
            self._weights = make_plan(list(self._parameters), "value")
        norms = _norms(self._log.latest()[0], len(self._parameters))
        factors = rule.factors(norms, _norms(self._weights.reduce()[0], len(self._parameters)))
        assert asked.limit is not None
        asked.limit.copy_(factors.nan_to_num(nan=1.0).amin() * (norm + 1e-6))
        recorded = self._log.decide(asked.clip, norm)
        self._scale(factors, late)
        return recorded


def _norms(row: Tensor, parameters: int) -> Tensor:
    return root(row[TOTALS : TOTALS + parameters * len(COLUMNS)].reshape(-1, len(COLUMNS))[:, SUM_SQ])
