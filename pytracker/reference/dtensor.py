"""Brings gradients that are laid out differently from their parameters into the parameters' layout."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidValueError

_OPERATIONS = {"sum", "avg"}  # partial results that one sum over the ranks makes whole


def redistributed(parameters: list[Any], gradients: list[Any]) -> list[Tensor]:
    """Return the local pieces of gradients (DTensors) once they are laid out as their parameters are.

    Sequence parallel leaves gradients of replicated parameters as partial sums, which the optimizer would add up. Their
    norm cannot be told from the norms of the parts, so they are added up here too, in a copy: one all-reduce for all of
    one mesh, dtype and device. Every rank must call it, with gradients of the same parameters.
    """
    pieces: list[Any] = [None] * len(gradients)
    together: dict[Any, list[int]] = defaultdict(list)
    with torch.no_grad():
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            dimensions = _summed_dimensions(parameter.placements, gradient.placements)
            if dimensions:
                together[gradient.device_mesh, dimensions, gradient.dtype].append(index)
            else:
                pieces[index] = gradient.redistribute(placements=parameter.placements).to_local()
        for (mesh, dimensions, _dtype), members in together.items():
            parts = [gradients[index]._local_tensor for index in members]
            flat = torch.cat([part.reshape(-1) for part in parts])
            for dimension, operation in dimensions:
                dist.all_reduce(flat, group=mesh.get_group(dimension))
                if operation == "avg":
                    flat /= mesh.size(dimension)
            whole = torch.split(flat, [part.numel() for part in parts])
            for index, part, summed in zip(members, parts, whole, strict=True):
                pieces[index] = summed.view(part.shape)
    return pieces


def _summed_dimensions(wanted: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[tuple[int, str], ...]:
    """Return the mesh dimensions over which a sum makes the layout ``given`` the one ``wanted``; none if none does."""
    dimensions = []
    for dimension, (to, origin) in enumerate(zip(wanted, given, strict=True)):
        if to == origin:
            continue
        if not (to.is_replicate() and origin.is_partial() and origin.reduce_op in _OPERATIONS):
            return ()
        dimensions.append((dimension, origin.reduce_op))
    return tuple(dimensions)


def whole_value(value: Any, name: str) -> Tensor:
    """Return a value of a tensor subclass as this rank has it: of a DTensor that is replicated, or of a collective.

    Raises:
        InvalidValueError: this rank has only a part of it, or it is of another subclass.
    """
    placements = getattr(value, "placements", ())
    if not all(placement.is_replicate() for placement in placements):
        raise InvalidValueError(
            f"{name!r} is a DTensor with placements {list(placements)}, of which this rank has a part; "
            "record .full_tensor()"
        )
    local = getattr(value, "_local_tensor", value)
    if is_subclass(local) and hasattr(local, "wait"):  # of a collective that has not been waited for
        local = local.wait()
    if not isinstance(local, Tensor) or is_subclass(local):
        raise InvalidValueError(
            f"{name!r} is a {type(value).__name__}, a tensor subclass whose value cannot be read; record a plain tensor"
        )
    return local


def is_subclass(tensor: Any) -> bool:
    """Tell whether Python defines what a tensor is, as for a DTensor or a FakeTensor."""
    return bool(torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python))


def local_pieces(parameters: list[Any], gradients: list[Any]) -> list[Any]:
    """Return what lies on this rank of each gradient, laid out as its parameter is; plain tensors and None as they are.

    Every rank must call it: where a gradient lies otherwise than its parameter, it is ``redistributed``.
    """
    pieces = [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]
    misplaced = [
        index
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True))
        if hasattr(parameter, "placements") and gradient is not None and gradient.placements != parameter.placements
    ]
    if misplaced:
        whole = redistributed([parameters[i] for i in misplaced], [gradients[i] for i in misplaced])
        for index, piece in zip(misplaced, whole, strict=True):
            pieces[index] = piece
    return pieces
