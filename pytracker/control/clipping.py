"""Scales gradients so that their norm is at most a limit, with one read and no wait."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Taken now: a program may put clip_grad_norm_ in the place of torch's, which must not be called from here then.
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .._checks import flag
from .._warn import warn_user
from ..columns import SUM_SQ
from ..core import PlannedParameters, Target, planned
from ..errors import InvalidValueError, LayoutError
from .rules import checked_max_norm, checked_order
from .totals import TotalNorm


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
    It may be put in the place of torch's, and works inside ``torch.compile(fullgraph=True)``.

    Args:
        parameters: a tensor, an iterable of tensors, a module, or (name, parameter) pairs. A parameter that occurs
            twice counts once.
        max_norm: the largest total norm, in the unit of the gradients.
        norm_type: 2.0 or inf, or any other that torch's function takes, which then does the work.
        error_if_nonfinite: raise where the norm that would be returned is NaN or Inf. This waits for the device.
        foreach: accepted for torch's sake, and passed on where torch's functions do the work.

    Returns:
        The total norm before clipping: 0-d, on the device of the gradients, in the dtype that theirs are promoted to,
        and in float32 at least, so that the norm of float16 gradients fits. 0 where there are no gradients.

    Raises:
        InvalidTypeError: ``parameters`` or a number is nothing of the kind.
        InvalidValueError: ``max_norm`` is negative or NaN, or ``norm_type`` is no number.
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
    flag("error_if_nonfinite", error_if_nonfinite)
    if foreach is not None:
        flag("foreach", foreach)
    if torch.compiler.is_compiling():
        return _clip_in_graph(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    max_norm, norm_type = checked_max_norm(max_norm), checked_order(norm_type)
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn("parameters is an empty generator, so no gradient is clipped", stacklevel=2)
    with planned(parameters) as known:
        return _clip(known, max_norm, norm_type, error_if_nonfinite, foreach)


def _clip(
    known: PlannedParameters, max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    plan = known.plan
    if any(each.is_flat for each in known.parameters):
        raise LayoutError(
            "a FullyShardedDataParallel is clipped by its own method, model.clip_grad_norm_(max_norm, norm_type); "
            "gradient_stats(model) and a Tracker measure it"
        )
    if all(parameter.grad is None for parameter in plan.parameters):
        if any(not isinstance(each, torch.nn.Parameter) and not each.requires_grad for each in plan.parameters):
            warn_user(
                "clip_grad_norm_ was given tensors with nothing in .grad, so nothing is clipped: it scales the .grad "
                "of parameters, and tracker.step(gradients=..., clip=...) gradients themselves"
            )
        return torch.tensor(0.0, device=plan.devices[0])
    if norm_type != 2.0 and not math.isinf(norm_type):
        return _clip_by_torch(plan.parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    exact, short, factor = _reduced(known, max_norm, abs(norm_type))
    norm = exact if plan.any_is_double() else short
    if error_if_nonfinite and not torch.isfinite(norm):
        count = sum(parameter.grad is not None for parameter in plan.parameters)
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients of {count} parameters is "
            f"{exact:g}, returned in {norm.dtype}: it is not finite, so they cannot be clipped. "
            "gradient_stats(...).nonfinite_names() says which are not"
        )
    plan.scale(factor)
    return norm


def _reduced(known: PlannedParameters, max_norm: float, order: float) -> Sequence[Tensor]:
    """Return the total norm over all devices and ranks, in float64 and float32, and the factor, on the first device."""
    total = known.worked_out.get("total norm")
    if total is None:
        total = known.worked_out["total norm"] = TotalNorm(known.parameters, known.plan.members)
    if total.is_local:
        return known.plan.reduce_and_clip(max_norm, order)
    norm = total.norm(known.plan.reduce(), order)[0]
    return norm, norm.float(), (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _clip_by_torch(
    parameters: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    """Clip by torch's functions, but for a norm in float32 at least."""
    gradients = [_widened(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def norm_by_torch(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Return the total norm of any order by torch's functions, 0-d, in float32 at least, of all ranks."""
    norm: Any = get_total_norm([_widened(gradient) for gradient in gradients], norm_type)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _widened(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


def _clip_in_graph(
    target: Any, max_norm: float, norm_type: Any, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    """Clip by what torch.compile can follow: the operators where they do, or torch's functions."""
    if isinstance(max_norm, (int, float)) and not max_norm >= 0:
        raise InvalidValueError("max_norm is negative or NaN; it is the largest norm allowed, zero or more")
    parameters = _tensors_of(target)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0, device=parameters[0].device if parameters else "cpu")
    plain = all(
        gradient.layout == torch.strided and gradient.device == gradients[0].device and not hasattr(gradient, "_spec")
        for gradient in gradients
    )
    if float(norm_type) != 2.0 or error_if_nonfinite or not plain:
        return _clip_by_torch(parameters, max_norm, float(norm_type), error_if_nonfinite, foreach)
    with torch.no_grad():
        norm: Tensor = torch.ops.pytracker.gradient_moments(gradients)[SUM_SQ].sqrt()
        torch.ops.pytracker.scale_gradients_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        wide = any(gradient.dtype in (torch.float64, torch.complex128) for gradient in gradients)
        return norm.to(torch.float64 if wide else torch.float32)


def _tensors_of(target: Any) -> list[Tensor]:
    if isinstance(target, torch.nn.Module):
        return list(target.parameters())
    if isinstance(target, Tensor):
        return [target]
    items = [each for item in target for each in (item.parameters() if isinstance(item, torch.nn.Module) else [item])]
    tensors = [item[1] if isinstance(item, tuple) else item for item in items]
    return list({id(tensor): tensor for tensor in tensors}.values())
