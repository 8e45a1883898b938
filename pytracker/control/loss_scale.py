"""Finds a GradScaler's scale on the device, if the gradients still contain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import InvalidValueError
from .optimizers import unwrapped


class LossScale:
    """What a GradScaler has multiplied the loss by. Never waits.

    Args:
        scaler: a GradScaler, or one derived from it; None for none.
        optimizers: those whose gradients it unscales.
    """

    def __init__(self, scaler: Any, optimizers: Sequence[Any]) -> None:
        self._scaler: Any = scaler
        self._optimizers = optimizers

    @property
    def is_on(self) -> bool:
        """Whether steps may be skipped for what overflows."""
        return self._scaler is not None and bool(self._scaler.is_enabled())

    def of_gradients(self) -> Tensor | None:
        """Return what the gradients are multiplied by now; None for nothing, and where ``unscale_`` has undone it.

        Raises:
            InvalidValueError: it has for some of the optimizers.
        """
        if not self.is_on or self._scaler._scale is None:
            return None
        unscaled = [self._is_unscaled(optimizer) for optimizer in self._optimizers]
        if any(unscaled):
            if not all(unscaled):
                raise InvalidValueError(
                    "the gradients of some optimizers still contain the scale of the loss; call unscale_ for all of "
                    "them before step(), or for none, or record the steps of each player by step(only=...)"
                )
            return None
        scale: Tensor = self._scaler._scale
        return scale

    def _is_unscaled(self, optimizer: Any) -> bool:
        states = [self._scaler._per_optimizer_states.get(id(each)) for each in (optimizer, unwrapped(optimizer))]
        return any(state is not None and state["stage"].name == "UNSCALED" for state in states)
