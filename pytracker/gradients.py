"""Statistics of the gradients as they are: of each parameter and of all together, from one read of each gradient."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import moments
from ._checks import flag, real_number, wrong_value
from .collectives import group_named
from .columns import ABS_MAX, COLUMNS, INFS, MAX_SUM_SQ_TOTAL, NANS, SUM, SUM_SQ, TOTALS, ZEROS
from .core import ParameterLayout, PlannedParameters, Target, norms_of_known, planned_gradients
from .reference import root


def compute_gradient_stats(model: Target) -> dict[str, float]:
    """Return the total L2 norm of the gradients and the largest L2 norm of one parameter. Waits once for each device.

    The drop-in for the loop over ``p.grad.norm(2).item()``, which waits once for each parameter.

    Parameters that are DTensors (FSDP2, tensor parallel) are merged over their meshes, so every rank must call it.
    Plain ones are taken as this rank has them: a pipeline stage has the statistics of that stage.

    Args:
        model: a module, an iterable of parameters, an iterable of (name, parameter) pairs, or gradients themselves, as
            ``torch.autograd.grad`` returns them. Parameters without a gradient contribute nothing; the norm of no
            gradient at all is 0.

    Returns:
        ``{"grad_norm": float, "grad_max": float}``, both in the unit of the gradient. NaN and Inf propagate. The
        relative error against float64 is at most 1e-7 for gradients of 16 or 32 bits.

    Raises:
        InvalidTypeError: ``model`` is nothing of the kind.
        ParameterError: a gradient has a dtype, layout or device that cannot be read.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> compute_gradient_stats(model)
        {'grad_norm': 5.0, 'grad_max': 5.0}
    """
    norms = norms_of_known(model)
    if norms is None:
        with planned_gradients(model) as known:
            if known.sharded:
                stats = GradientStats(known)
                norms = stats.total_norm.item(), stats.max_norm.item()
            else:
                norms = known.plan.norm_and_max()
    return {"grad_norm": norms[0], "grad_max": norms[1]}


def gradient_stats(target: Target, *, grad_scale: float | Tensor | None = None) -> GradientStats:
    """Return the statistics of every gradient and of all together, as tensors on the device, without waiting.

    Args:
        target: a module, an iterable of parameters, an iterable of (name, parameter) pairs, or gradients themselves:
            tensors that are no ``nn.Parameter``, require no gradient or were computed, and have none in ``.grad``.
        grad_scale: divides the statistics, not the gradients: the scale of a GradScaler, a float or a tensor of one
            element.

    Raises:
        InvalidTypeError: ``target`` is nothing of the kind.
        InvalidValueError: ``grad_scale`` is not finite or not above 0, or has more than one element. The value of a
            tensor on a device is not checked, since reading it would wait.
        ParameterError: a gradient has a dtype, layout or device that cannot be read.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, -4.0]])
        >>> stats = gradient_stats(model)
        >>> stats.names
        ['weight', 'bias']
        >>> stats.norms.tolist()
        [5.0, nan]
        >>> stats.to_dict()["abs_max"]
        4.0
    """
    divisor = _scale_tensor(grad_scale)
    with planned_gradients(target) as known:
        return GradientStats(known, divisor)


def _scale_tensor(grad_scale: float | Tensor | None) -> Tensor | None:
    if grad_scale is None or isinstance(grad_scale, Tensor):
        return grad_scale
    scale = real_number("grad_scale", grad_scale)
    if not 0 < scale < math.inf:
        raise wrong_value("grad_scale", grad_scale, "a finite number above 0: the statistics are divided by it")
    return torch.tensor(scale, dtype=torch.float64, device="cpu")


class GradientStats:
    """The statistics of one step's gradients; made by ``gradient_stats``.

    Tensors [T] have an element for each parameter, in the order of ``names``, and are NaN where a parameter has no
    gradient. All are float64 and lie on the device of the gradients (with parameters on several devices: on the
    first); reading a value from one waits, as with any tensor. The statistics can be pickled and copied: they refer to
    no parameter then.
    """

    def __init__(self, known: PlannedParameters, grad_scale: Tensor | None = None) -> None:
        """Reduce the gradients as they are."""
        self._parameters = known.parameters  # asked for names only when they are wanted: there may be thousands
        self._rows: list[Tensor] = known.plan.reduce(grad_scale)  # of each device
        self._members: list[list[int]] = known.plan.members if len(self._rows) > 1 else []
        self._counts: Tensor = known.plan.elements  # [T] on the host, of the gradients that were read
        if known.sharded:  # the ranks' pieces are merged: collectives, which every rank must call
            local = self._tensors
            counts = [math.prod(each.shape) for each in known.parameters]
            self._counts = torch.tensor(counts, dtype=torch.float64, device="cpu")
            self._tensors = _merged(known.parameters, local)
            self._totals = moments.totals(self._tensors)
            self._rows = [torch.cat([self._totals, self._tensors.flatten()])]

    @functools.cached_property
    def _names(self) -> list[str]:
        return [each.name for each in self._parameters]

    @property
    def names(self) -> list[str]:
        """The parameters' names."""
        return list(self._names)

    @functools.cached_property
    def _tensors(self) -> Tensor:
        """The moments of each parameter, [T, 6]."""
        parts = [row[TOTALS:].view(-1, len(COLUMNS)) for row in self._rows]
        if len(parts) == 1:
            return parts[0]
        gathered = parts[0].new_empty((len(self._names), len(COLUMNS)))
        for members, part in zip(self._members, parts, strict=True):
            gathered[members] = part.to(gathered.device)
        return gathered

    @functools.cached_property
    def _totals(self) -> Tensor:
        """The moments of all gradients together, [7]."""
        totals: Tensor = moments.merge([row[:TOTALS].to(self._rows[0].device) for row in self._rows])
        return totals

    @functools.cached_property
    def _elements(self) -> Tensor:
        return self._counts.clamp(min=1).to(self._rows[0])

    @property
    def norms(self) -> Tensor:
        """L2 norms, [T]: ``sqrt(sum |g|^2)``."""
        return root(self._tensors[:, SUM_SQ])

    @property
    def abs_max(self) -> Tensor:
        """Largest absolute elements, [T]."""
        return self._tensors[:, ABS_MAX]

    @property
    def means(self) -> Tensor:
        """Means of the elements, [T] (complex gradients: of their real parts)."""
        return self._tensors[:, SUM] / self._elements

    @property
    def rms(self) -> Tensor:
        """Root mean squares, [T]: norm / sqrt(number of elements)."""
        return root(self._tensors[:, SUM_SQ] / self._elements)

    @property
    def zero_fraction(self) -> Tensor:
        """Shares of elements that are exactly zero, [T], 0 to 1."""
        return self._tensors[:, ZEROS] / self._elements

    @property
    def nans(self) -> Tensor:
        """Numbers of NaN elements, [T]."""
        return self._tensors[:, NANS]

    @property
    def infs(self) -> Tensor:
        """Numbers of infinite elements, [T]."""
        return self._tensors[:, INFS]

    @property
    def total_norm(self) -> Tensor:
        """L2 norm of all gradients together, 0-d."""
        return root(self._totals[SUM_SQ])

    @property
    def max_norm(self) -> Tensor:
        """Largest L2 norm of one parameter, 0-d."""
        return root(self._totals[MAX_SUM_SQ_TOTAL])

    @property
    def total_abs_max(self) -> Tensor:
        """Largest absolute element of all gradients, 0-d."""
        return self._totals[ABS_MAX]

    @property
    def total_nonfinite(self) -> Tensor:
        """Number of NaN and infinite elements of all gradients, 0-d."""
        return self._totals[NANS] + self._totals[INFS]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_rows", "_members", "_names", "_counts")}

    def _on_host(self) -> GradientStats:
        host = GradientStats.__new__(GradientStats)
        host.__dict__.update(self.__getstate__(), _rows=[row.cpu() for row in self._rows])
        return host

    def to_dict(self, per_parameter: bool = False) -> dict[str, float]:
        """Return the statistics of all gradients together as floats. Waits once for each device.

        The keys are ``grad_norm`` and ``grad_max`` (the original loop's), ``abs_max``, ``nonfinite`` and
        ``zero_fraction``; with ``per_parameter`` also ``norm/NAME`` for each parameter that has a gradient.

        Example:
            >>> import torch
            >>> weight = torch.nn.Parameter(torch.zeros(4))
            >>> weight.grad = torch.tensor([0.0, 0.0, 3.0, 4.0])
            >>> gradient_stats([("w", weight)]).to_dict(per_parameter=True)
            {'grad_norm': 5.0, 'grad_max': 5.0, 'abs_max': 4.0, 'nonfinite': 0.0, 'zero_fraction': 0.5, 'norm/w': 5.0}
        """
        per_parameter = flag("per_parameter", per_parameter)
        host = self._on_host()
        present = ~moments.is_missing(host._tensors)
        elements = self._counts[present].sum().item()
        result = {
            "grad_norm": host.total_norm.item(),
            "grad_max": host.max_norm.item(),
            "abs_max": host.total_abs_max.item(),
            "nonfinite": host.total_nonfinite.item(),
            "zero_fraction": host._totals[ZEROS].item() / max(elements, 1),
        }
        if per_parameter:
            norms = zip(self._names, host.norms.tolist(), present.tolist(), strict=True)
            result.update({f"norm/{name}": norm for name, norm, here in norms if here})
        return result

    def nonfinite_names(self) -> list[str]:
        """Return the names of the parameters whose gradient has a NaN or infinite element. Waits once for each device.

        Example:
            >>> import torch
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> weight.grad = torch.tensor([1.0, float("inf")])
            >>> gradient_stats([("w", weight)]).nonfinite_names()
            ['w']
        """
        host = self._on_host()
        return [name for name, count in zip(self._names, (host.nans + host.infs).tolist(), strict=True) if count > 0]

    def __repr__(self) -> str:
        """Say how many parameters there are, without waiting for a value."""
        return f"GradientStats({len(self._names)} parameters on {', '.join(str(r.device) for r in self._rows)})"


def _merged(parameters: Sequence[ParameterLayout], tensors: Tensor) -> Tensor:
    """Merge the moments [T, 6] of local pieces over the ranks that hold the others; waits as collectives do.

    Every rank must call it. Plain parameters are taken as they are: each rank has all of them.
    """
    merged = tensors.clone()
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, each in enumerate(parameters):
        if each.groups:
            alike[each.groups].append(index)
    for groups, members in alike.items():
        sums, maxima = moments.split(tensors[members], torch.ones((), dtype=torch.bool, device=tensors.device))
        for group in map(group_named, groups):
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        merged[members] = moments.join(sums, maxima)[0]
    return merged
