"""The native core's contract in plain torch: the oracle of its tests, and the back end where there is no kernel.

It reads each gradient several times and launches several kernels for each, but waits for the device no more than the
native core does: everything stays in tensors. The classes have the methods of those in ``pytracker._C``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import real_number
from ..columns import (
    ABS_MAX,
    COLUMNS,
    EXTRAS,
    POWERS,
    SMALLEST_NORMAL,
    SUM_SQ,
    TOTALS,
    TWO_HIGHEST_BINADES,
)
from ..errors import InvalidValueError, ParameterError
from ..moments import merge, totals
from .dtensor import is_subclass, local_pieces, whole_value

RENEW = -1
"""``StepLog.append`` recorded nothing: the log has too few slots, or the parameters moved. Make a new one."""
CAPTURED = -2
"""``StepLog.append`` was captured in a CUDA graph, whose replays record."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of moments on a device: float64, or float32 where the device has no other (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(tensor: Tensor) -> Tensor:
    """Return the six moments of one tensor, float64 [6] on its device.

    Example:
        >>> moments(torch.tensor([3.0, -4.0, 0.0])).tolist()
        [-1.0, 25.0, 4.0, 1.0, 0.0, 0.0]
    """
    values = _stored(tensor)
    missing_zeros = tensor.numel() - values.numel()
    dtype = wide(values.device)
    real = (values.real if values.is_complex() else values).to(dtype)
    modulus = _modulus(values)
    squares = real * real + values.imag.to(dtype) ** 2 if values.is_complex() else modulus * modulus
    abs_max = modulus.max() if values.numel() else modulus.new_zeros(())
    counts = [(values == 0).sum() + missing_zeros, values.isnan().sum(), values.isinf().sum()]
    return torch.stack([real.sum(), squares.sum(), abs_max, *(count.to(dtype) for count in counts)])


def extras(tensor: Tensor) -> Tensor:
    """Return the further columns of one tensor, float64 [7] on its device.

    Example:
        >>> extras(torch.tensor([3.0, -1e-5, 0.0, 2.0**15])).tolist()[1:]
        [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    """
    modulus = _modulus(_stored(tensor))
    counts = [((modulus > 0) & (modulus < low)).sum() for low in SMALLEST_NORMAL]
    counts += [(modulus >= high).sum() for high in TWO_HIGHEST_BINADES]
    return torch.stack([modulus.sum(), *(count.to(modulus) for count in counts)])


def _stored(tensor: Tensor) -> Tensor:
    """Return the elements that lie in memory."""
    values = tensor.detach()
    return values.coalesce().values() if values.layout == torch.sparse_coo else values


def _modulus(values: Tensor) -> Tensor:
    """Return the moduli in a wide dtype, NaN where a part is: (nan, inf) has an infinite one in C."""
    dtype = wide(values.device)
    if not values.is_complex():
        return values.to(dtype).abs()
    modulus = values.to(torch.complex128).abs().to(dtype)
    return torch.where(values.isnan(), torch.full_like(modulus, math.nan), modulus)


def root(values: Tensor) -> Tensor:
    """Return square roots, correctly rounded as IEEE says: torch's own on the CPU may be wrong in the last bit.

    Example:
        >>> root(torch.tensor([4.0, 2.0], dtype=torch.float64)).tolist()
        [2.0, 1.4142135623730951]
    """
    if not values.is_cpu:
        on_device: Tensor = values.sqrt()
        return on_device
    roots = torch.empty_like(values, device=values.device)
    np.sqrt(values.detach().numpy(), out=roots.numpy())
    return roots


def divide(rows: Tensor, scale: Tensor | float) -> Tensor:
    """Return rows [..., 6 or 7] of gradients divided by ``scale``: counts stay."""
    powers = torch.tensor(POWERS[: rows.shape[-1]], device=rows.device)
    divisor = torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
    divisors = torch.where(powers == 2, divisor * divisor, torch.where(powers == 1, divisor, torch.ones_like(divisor)))
    divided = rows / divisors
    divided[..., ABS_MAX] = divided[..., ABS_MAX].abs()
    return divided


def checked_scalar(name: str, value: Any, devices: Sequence[torch.device]) -> Tensor:
    """Return a value to record as a tensor of one element.

    Raises:
        InvalidTypeError: it is neither a number nor a tensor.
        InvalidValueError: it has not one element, is complex, or lies on none of ``devices``.
    """
    if not isinstance(value, Tensor):
        return torch.tensor(real_number(repr(name), value), dtype=torch.float64, device="cpu")
    tensor: Tensor = whole_value(value, name) if is_subclass(value) else value
    if tensor.numel() != 1:
        raise InvalidValueError(
            f"{name!r} is a tensor of shape {list(tensor.shape)} with {tensor.numel()} elements; "
            "a recorded value has one: reduce it first, e.g. with .mean()"
        )
    if tensor.is_complex():
        raise InvalidValueError(f"{name!r} is complex ({tensor.dtype}); record .real, .imag or .abs()")
    if tensor.device.type == "cpu":
        return torch.tensor(float(number_in(tensor, repr(name))), dtype=torch.float64, device="cpu")
    if tensor.device not in devices:
        raise InvalidValueError(f"{name!r} is on {tensor.device}, where the model has no parameter; move it")
    return tensor


def checked_divisor(value: Any, devices: Sequence[torch.device]) -> Tensor:
    """Return a grad_scale as a tensor of one element.

    Raises:
        InvalidTypeError, InvalidValueError: it cannot be read, or is on the host and not finite or not above 0.
    """
    divisor = checked_scalar("grad_scale", value, devices)
    if divisor.is_cpu and not 0 < divisor.item() < math.inf:
        raise InvalidValueError(
            f"'grad_scale' is {divisor.item():g}; the statistics are divided by it, so it must be finite and above 0"
        )
    return divisor


def number_in(value: Tensor, name: str) -> float | int | bool:
    """Return the number in a tensor of one real element, of whatever kind. Waits for its device.

    Raises:
        InvalidValueError: it cannot be read; the message has ``name`` and the kind of tensor.

    Example:
        >>> number_in(torch.tensor([3]).to_sparse(), "val")
        3
    """
    if value.layout is torch.strided and not value._is_zerotensor() and _is_freed(value):
        raise InvalidValueError(f"{name} is a tensor whose memory was freed (untyped_storage().resize_)")
    try:
        number: float = (value if value.layout is torch.strided else value.to_dense()).item()
    except (RuntimeError, NotImplementedError) as error:  # torch cannot read it either: within vmap, say
        layout = "nested" if value.is_nested else value.layout
        kind = f"{layout}, {value.dtype}, on {value.device}".replace("torch.", "")
        raise InvalidValueError(f"{name} is a tensor whose value cannot be read ({kind}): {error}") from error
    return number


def _is_freed(tensor: Tensor) -> bool:
    """Tell whether a strided tensor has elements and no memory."""
    try:
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # wrapped by a transform, which says more when it is read
        return False


class Plan:
    """The parameters, grouped by device, and the reduction of their gradients to a row for each device."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        source: str = "gradient",
        windows: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Group the parameters by device."""
        self._objects = list(parameters)
        self._ids = [id(parameter) for parameter in parameters]
        self._holds = 1
        self._counts = [parameter.numel() for parameter in parameters]
        self.names = list(names)
        self.source = source
        self.generation = 0
        self.devices: list[torch.device] = []
        self.members: list[list[int]] = []
        self.windows = list(windows)
        self.has_pieces = bool(windows) or any(hasattr(p, "_local_tensor") for p in parameters)
        self._gathered: list[Tensor | None] = []
        self._selected: set[int] = set()
        self._given: list[Tensor | None] = []
        self._group()

    def _group(self) -> None:
        homes = self._homes()
        self.devices = list(dict.fromkeys(homes)) or [torch.device("cpu")]
        self.members = [[i for i, home in enumerate(homes) if home == device] for device in self.devices]
        self.generation += 1

    def _homes(self) -> list[torch.device]:
        """Return each parameter's device; of one on the meta device that of the first which has data."""
        first = next((p.device for p in self.parameters if not p.is_meta), torch.device("cpu"))
        return [first if p.is_meta else p.device for p in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, where the plan holds them."""
        if not self._holds:
            raise InvalidValueError("the plan has let go of its parameters")
        return self._objects

    @property
    def elements(self) -> Tensor:
        """The elements of each gradient as it was last found, float64 [T] on the host."""
        return torch.tensor(self._counts, dtype=torch.float64, device="cpu")

    def hold(self) -> None:
        """Hold the parameters until one more ``release``."""
        self._holds += 1

    def release(self) -> None:
        """Let go of the parameters, where as many calls were made as of those that hold them."""
        self._holds -= 1
        if not self._holds:
            self._objects, self._gathered = [], []

    def hold_for(self, parameters: Sequence[Any]) -> bool:
        """Hold the parameters where they are just these, in this order; tell whether they are."""
        if [id(parameter) for parameter in parameters] != self._ids:
            return False
        self._objects = list(parameters)
        self.hold()
        return True

    def hold_of(self, watch: ModuleWatch, root: torch.nn.Module) -> bool:
        """Hold the parameters of a module that is as it was when the plan was made; tell whether it is."""
        if not watch.unchanged(root):
            return False
        if not self._holds:
            known = {id(parameter): parameter for parameter in root.parameters()}
            self._objects = [known[each] for each in self._ids]
        self.hold()
        return True

    def select(self, parameters: Sequence[int]) -> None:
        """Take only the gradients of these parameters from now on, of none: of all."""
        self._selected = set(parameters)

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Take these in the place of the parameters' own gradients from now on, of none: their own again.

        Raises:
            InvalidValueError: there is not one for each parameter.
        """
        if gradients and len(gradients) != len(self._ids):
            raise InvalidValueError(
                f"there are {len(gradients)} gradients for {len(self._ids)} parameters; give one for each, in their "
                "order, and None where there is none"
            )
        self._given = list(gradients)

    def gather(self) -> None:
        """Take the gradients of this step.

        Raises:
            ParameterError: a gradient's dtype or layout is not supported.
        """
        gradient = self.source == "gradient"
        found: list[Any] = self._given or [p.grad if gradient else p for p in self.parameters]
        if self._selected:
            found = [each if index in self._selected else None for index, each in enumerate(found)]
        pieces = local_pieces(self.parameters, found) if self.has_pieces else found
        self._gathered = [self._piece(i, piece) for i, piece in enumerate(pieces)]
        self._counts = [
            count if tensor is None else tensor.numel()
            for count, tensor in zip(self._counts, self._gathered, strict=True)
        ]
        homes = self._homes()
        if any(homes[i] != self.devices[g] for g, members in enumerate(self.members) for i in members):
            self._group()

    def _piece(self, index: int, tensor: Tensor | None) -> Tensor | None:
        """Return what can be read of a gradient; None where it is missing."""
        if tensor is None or (tensor.is_meta and self.source == "value"):
            return None
        try:
            return self._checked(index, tensor)
        except ParameterError:
            if self.source != "value":
                raise
            return None  # a weight that cannot be read is missing

    def _checked(self, index: int, tensor: Tensor) -> Tensor | None:
        of_gradient = self.source == "gradient"
        subject = f"{'the gradient of' if of_gradient else 'parameter'} {self.names[index]!r}"
        if is_subclass(tensor):
            raise ParameterError(
                f"{subject} is a {type(tensor).__name__}, a tensor subclass without a local tensor that could be read; "
                "track the plain parameters instead"
            )
        if tensor.dtype not in DTYPES:
            raise ParameterError(
                f"{subject} has dtype {tensor.dtype}; pytracker reads "
                + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            )
        if tensor.layout not in (torch.strided, torch.sparse_coo) or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise ParameterError(f"{subject} has layout {layout}; pytracker reads strided and sparse COO tensors")
        if tensor._is_zerotensor():
            return torch.zeros_like(tensor, device=tensor.device)
        if tensor.layout is torch.strided and _is_freed(tensor):
            return None
        return self._in_window(index, tensor)

    def _in_window(self, index: int, tensor: Tensor) -> Tensor:
        """Return the elements of a flat gradient that belong to one of its parameters."""
        offset, length = self.windows[index] if self.windows else (0, -1)
        if length < 0:
            return tensor
        if tensor.numel() != self.parameters[index].numel():
            raise ParameterError(
                f"the gradient of {self.names[index]!r} lies in {tensor.numel()} elements where the rank's shard has "
                f"{self.parameters[index].numel()}: it is not reduced yet. Record it after a backward outside of "
                "no_sync()"
            )
        return tensor.detach().flatten()[offset : offset + length]

    def row(self, group: int, grad_scale: Tensor | float | None = None) -> Tensor:
        """Return [totals | tensors] of what was gathered on one device."""
        device = self.devices[group]
        missing = torch.full((len(COLUMNS),), math.nan, dtype=wide(device), device=device)
        gathered = [self._gathered[i] for i in self.members[group]]
        rows = [missing if tensor is None else moments(tensor) for tensor in gathered]
        stacked = torch.stack(rows) if rows else missing.new_empty((0, len(COLUMNS)))
        if grad_scale is not None:
            stacked = divide(stacked, grad_scale)
        return torch.cat([totals(stacked), stacked.flatten()])

    def extra_row(self, group: int, grad_scale: Tensor | float | None = None) -> Tensor:
        """Return the further columns of what was gathered on one device, [7 T]."""
        device = self.devices[group]
        missing = torch.full((len(EXTRAS),), math.nan, dtype=wide(device), device=device)
        rows = [missing if (tensor := self._gathered[i]) is None else extras(tensor) for i in self.members[group]]
        stacked = torch.stack(rows) if rows else missing.new_empty((0, len(EXTRAS)))
        if grad_scale is not None:
            stacked[:, 0] /= torch.as_tensor(grad_scale, dtype=stacked.dtype, device=device).abs()
        return stacked.flatten()

    def reduce(self, grad_scale: Tensor | float | None = None) -> list[Tensor]:
        """Gather, and return a row for each device."""
        if grad_scale is not None:
            grad_scale = checked_divisor(grad_scale, self.devices)
        self.gather()
        return [self.row(group, grad_scale) for group in range(len(self.devices))]

    def reduce_and_clip(self, max_norm: float, order: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
        """Gather, and return the total norm, the same in float32, and the factor that brings it down to max_norm."""
        norm = norm_of(self.reduce()[0], order)
        return norm, norm.float(), factor_of(norm, max_norm)

    def any_is_double(self) -> bool:
        """Tell whether one of the gathered gradients is of float64 or complex128."""
        return any(
            tensor is not None and tensor.dtype in (torch.float64, torch.complex128) for tensor in self._gathered
        )

    def scale(self, factors: Tensor) -> None:
        """Multiply the gathered gradients by a factor, or each by its own, in place."""
        if factors.numel() == 1 and factors.is_cpu and factors == 1:
            return
        each = factors.reshape(-1).expand(len(self._gathered))
        for tensor, factor in zip(self._gathered, each, strict=True):
            if tensor is not None:
                tensor.mul_(factor.to(tensor.device))

    def norm_and_max(self) -> tuple[float, float]:
        """Return the total norm and the largest norm of one parameter. Waits for the device."""
        whole = merge([row[:TOTALS].cpu().double() for row in self.reduce()])
        return math.sqrt(float(whole[SUM_SQ])), math.sqrt(float(whole[-1]))

    def norm_and_max_of(self, watch: ModuleWatch, root: torch.nn.Module) -> tuple[float, float] | None:
        """Return the norms of a module that is as it was when the plan was made, else None. Waits for the device."""
        if self.has_pieces or not self.hold_of(watch, root):
            return None
        try:
            return self.norm_and_max()
        finally:
            self.release()


def norm_of(row: Tensor, order: float) -> Tensor:
    """Return the norm of all gradients together, 2 or inf, from the totals of a row."""
    return row[ABS_MAX] if math.isinf(order) else root(row[SUM_SQ])


def factor_of(norm: Tensor, max_norm: Tensor | float) -> Tensor:
    """Return what brings a norm down to ``max_norm``, as torch computes it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class ModuleWatch:
    """Tells whether a module still has the modules and parameters that it had."""

    def __init__(self, root: torch.nn.Module) -> None:
        """Remember the tree below ``root``."""
        self._before = self._snapshot(root)

    def unchanged(self, root: torch.nn.Module) -> bool:
        """Compare the tree with what it was."""
        return self._snapshot(root) == self._before

    def covers(self, plan: Plan) -> bool:
        """Tell whether all parameters of a plan belong to the tree."""
        return set(plan._ids) <= {each for of_module in self._before for each in of_module}

    @staticmethod
    def _snapshot(root: torch.nn.Module) -> list[list[int]]:
        return [[id(p) for p in module._parameters.values()] for module in root.modules()]
