"""The oracle of the trainers' tests: norms by numpy in float64, taken in the trainer's own hook."""

from __future__ import annotations

import numpy as np
import torch


def norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the norm of each parameter's gradient; of a sharded one, the whole."""
    there = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in there.items()}
    return {name: float(np.linalg.norm(grad.double().numpy())) for name, grad in whole.items()}


def total(model: torch.nn.Module) -> float:
    """Return the norm of the whole gradient."""
    return float(np.sqrt(sum(norm**2 for norm in norms(model).values())))
