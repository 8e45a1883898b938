"""Finds a GradScaler's scale on the device, if the gradients still contain it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import wrong_type
from .optimizers import unwrapped


class LossScale:
    """What a GradScaler has multiplied the loss by. Never waits.

    Args:
        scaler: a GradScaler, or one derived from it; None for none.
        optimizer: the one whose gradients it unscales.

    Raises:
        InvalidTypeError: ``scaler`` is no GradScaler.
    """

    def __init__(self, scaler: Any, optimizer: Any) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise wrong_type("grad_scaler", scaler, "a torch.amp.GradScaler")
        self._scaler: Any = scaler
        self._optimizer = optimizer

    @property
    def is_on(self) -> bool:
        """Whether steps may be skipped for what overflows."""
        return self._scaler is not None and bool(self._scaler.is_enabled())

    def of_gradients(self) -> Tensor | None:
        """Return what the gradients are multiplied by now; None for nothing, and where ``unscale_`` has undone it."""
        if not self.is_on or self._scaler._scale is None:
            return None
        for optimizer in (self._optimizer, unwrapped(self._optimizer)):
            state = self._scaler._per_optimizer_states.get(id(optimizer))
            if state is not None and state["stage"].name == "UNSCALED":
                return None
        scale: Tensor = self._scaler._scale
        return scale
