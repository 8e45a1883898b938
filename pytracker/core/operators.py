"""The operators torch.ops.pytracker.*: fake kernels, and an implementation for devices without native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..columns import row_width
from ..errors import InvalidValueError
from ..reference import Plan
from . import cuda, native

_LIBRARIES: list[Any] = []  # operators live as long as the object that defines them


def _check_not_empty(gradients: list[Tensor]) -> None:
    if not gradients:
        raise InvalidValueError("gradient_moments was called with no tensors; give at least one")


def _define() -> None:
    """Make the operators on top of the reference, as csrc/bindings.cpp makes them on top of the native core."""
    library: Any = torch.library.Library("pytracker", "DEF")  # type: ignore[no-untyped-call]
    library.define("gradient_moments(Tensor[] gradients, Tensor? grad_scale=None) -> Tensor")
    library.define("scale_gradients_(Tensor(a!)[] gradients, Tensor factor) -> ()")
    library.define("meter_update_(Tensor(a!) state, Tensor[] values, Tensor[] weights) -> ()")
    for operator in (_gradient_moments, _scale_gradients_, meter_update_):
        library.impl(operator.__name__.removeprefix("_"), operator, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)


def update_meter(state: Tensor, value: Tensor, weight: Tensor) -> None:
    """Feed a value to the meter of ``state``, float64 [1, 4], where both lie, with native kernels or without."""
    core, _ = native.load()
    if core is None or native.is_native(core, state.device):
        torch.ops.pytracker.meter_update_(state, [value], [weight])
    else:
        meter_update_(state, [value], [weight])


def _gradient_moments(gradients: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    _check_not_empty(gradients)
    names = [f"tensors[{i}]" for i in range(len(gradients))]
    row: Tensor = Plan(gradients, names, "tensor").reduce(grad_scale)[0]
    return row


def _scale_gradients_(gradients: list[Tensor], factor: Tensor) -> None:
    for gradient in gradients:
        gradient.mul_(factor)


def meter_update_(state: Tensor, values: list[Tensor], weights: list[Tensor]) -> None:
    """Feed values[i] with weights[i] to the meter of row i of ``state``, float64 [K, 4]: val, sum, count, nans.

    A weight of 0 adds nothing, whatever the value.
    """
    for meter, value, weight in zip(state, values, weights, strict=False):
        number, n = (tensor.detach().reshape(()).to(state) for tensor in (value, weight))
        weighs, nothing = n != 0, torch.zeros_like(number)
        added = torch.where(weighs & ~number.isnan(), torch.stack([number * n, n]), nothing)
        nans = (weighs & number.isnan()).to(state)
        meter.copy_(torch.stack([number, meter[1] + added[0], meter[2] + added[1], meter[3] + nans]))


def _register_fakes() -> None:
    """Say to torch.compile what the operators return."""

    @torch.library.register_fake("pytracker::gradient_moments")  # type: ignore[untyped-decorator]  # torch has no types
    def _moments(gradients: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
        _check_not_empty(gradients)
        return gradients[0].new_empty((row_width(len(gradients)),), dtype=torch.float64)

    @torch.library.register_fake("pytracker::scale_gradients_")  # type: ignore[untyped-decorator]
    def _scale(gradients: list[Tensor], factor: Tensor) -> None:
        return None

    @torch.library.register_fake("pytracker::meter_update_")  # type: ignore[untyped-decorator]
    def _update(state: Tensor, values: list[Tensor], weights: list[Tensor]) -> None:
        return None


def _register_cuda() -> None:
    """Join the CUDA back end to the core, where both are there."""
    core, back_end = native.load()[0], cuda.library()[0]
    if core is not None and back_end is not None:
        core.add_cuda(back_end.factory())


if native.load()[0] is None:
    _define()
_register_cuda()
_register_fakes()
