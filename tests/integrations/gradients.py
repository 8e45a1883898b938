"""The oracle of the trainers' tests: norms by numpy in float64, taken in the trainer's own hook."""

from __future__ import annotations

import numpy as np
import torch


def norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the norm of each parameter's gradient."""
    return {
        name: float(np.linalg.norm(parameter.grad.double().numpy()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def total(model: torch.nn.Module) -> float:
    """Return the norm of the whole gradient."""
    return float(np.sqrt(sum(norm**2 for norm in norms(model).values())))
