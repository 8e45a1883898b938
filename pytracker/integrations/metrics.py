"""What a trainer reports, as metrics that a tracker takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from ..tracking import GRADIENT_SERIES

_EVERY_STEP = frozenset({*GRADIENT_SERIES, "loss", "lr", "epoch", "step"})
"""Names that a tracker gives to what it records itself."""


def loggable(metrics: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return the numbers among ``metrics``; names that a tracker uses itself get the prefix ``logged/``.

    Example:
        >>> loggable({"eval_loss": 0.5, "loss": 0.25, "note": "good", "epoch": 1.5}, leave_out=["epoch"])
        {'eval_loss': 0.5, 'logged/loss': 0.25}
    """
    skipped = set(leave_out)
    return {
        f"logged/{name}" if name in _EVERY_STEP or name.startswith("lr/") else name: value
        for name, value in metrics.items()
        if name not in skipped and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, Real) or (hasattr(value, "__float__") and not isinstance(value, (str, bytes)))
