"""Clipping: the gradients scaled so that their norm is at most a limit, from one read and without a wait."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._checks import real_number, wrong_value
from ..core import Target, plan_for
from ..errors import LayoutError


def clip_grad_norm_(
    parameters: Tensor | Target,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their total norm is at most ``max_norm``, without waiting for the device.

    The drop-in for ``torch.nn.utils.clip_grad_norm_``: the same factor, min(1, max_norm / (norm + 1e-6)), from a norm
    that is exact. Where no clip is due the gradients are not touched, so their memory is read once and never written.

    Args:
        parameters: a tensor, an iterable of tensors, a module, or (name, parameter) pairs.
        max_norm: the largest total norm, in the unit of the gradients.
        norm_type: 2.0, or any other that torch's function takes, which then does the work.
        error_if_nonfinite: raise where the total norm is NaN or Inf. This waits for the device.
        foreach: accepted for torch's sake, and passed on where torch's function does the work.

    Returns:
        The total norm before clipping: 0-d, on the device of the gradients, in the dtype that theirs are promoted to.

    Raises:
        InvalidValueError: ``max_norm`` is negative or NaN.
        LayoutError: the parameters are of a FullyShardedDataParallel (FSDP1).
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite; the gradients are left as they are.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> round(weight.grad.norm().item(), 4)
        1.0
    """
    max_norm = real_number("max_norm", max_norm)
    if not max_norm >= 0:
        raise wrong_value("max_norm", max_norm, "the largest norm allowed, zero or more")
    tracked = plan_for(parameters)
    plan = tracked.plan
    if any(each.groups and not hasattr(each.parameter, "device_mesh") for each in tracked.parameters):
        raise LayoutError(
            "a FullyShardedDataParallel is clipped by its own method, model.clip_grad_norm_(max_norm, norm_type); "
            "gradient_stats(model) and a Tracker measure it"
        )
    gradients = [parameter.grad for parameter in plan.parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    if float(norm_type) != 2.0 or max_norm == 0 or len(plan.devices) != 1 or tracked.sharded:
        return torch.nn.utils.clip_grad_norm_(plan.parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm_and_factor = plan.reduce_and_clip(max_norm)
    norm: Tensor = norm_and_factor[0]
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"the total norm of the gradients of {len(gradients)} parameters is {norm.item()}, so they cannot be "
            "clipped; gradient_stats(...).nonfinite_names() says which are not finite"
        )
    plan.scale(norm_and_factor[1])
    return norm.to(functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients}).to_real())
