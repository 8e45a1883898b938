"""Optimizers that evaluate a closure several times in one step, as L-BFGS does in its line search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..control import unwrapped
from ..errors import InvalidValueError


class Closures:
    """Tells which calls are of a step that is recorded already: of its closures only the first is.

    That is where the step begins: its loss is the one that ``optimizer.step`` returns.

    Args:
        optimizers: those whose steps are recorded.
        each: every closure is recorded as a step of its own.
    """

    def __init__(self, optimizers: Sequence[Any], each: bool) -> None:
        self._is_within = self._has_row = False
        several = [] if each else [unwrapped(optimizer) for optimizer in optimizers]
        several = [optimizer for optimizer in several if isinstance(optimizer, torch.optim.LBFGS)]
        self._hooks = [optimizer.register_step_pre_hook(self._begin) for optimizer in several]
        self._hooks += [optimizer.register_step_post_hook(self._end) for optimizer in several]

    def _begin(self, *_: Any) -> None:
        self._is_within, self._has_row = True, False

    def _end(self, *_: Any) -> None:
        self._is_within = False

    @property
    def are_recorded(self) -> bool:
        """Whether the optimizer's step that this is called in has its row."""
        return self._is_within and self._has_row

    def record(self) -> None:
        """Take note that it has."""
        self._has_row = True

    def check_clip(self) -> None:
        """Make sure that a clip has a row of its own to go by.

        Raises:
            InvalidValueError: it is within a closure, of which only the first is recorded.
        """
        if self._is_within:
            raise InvalidValueError(
                "a clip goes by the row of its step, and of the closures of an LBFGS step only the first is recorded; "
                "give Tracker(each_closure=True), or clip by pytracker.clip_grad_norm_"
            )

    def close(self) -> None:
        """Leave the optimizers alone."""
        for hook in self._hooks:
            hook.remove()
