"""The native core's contract in plain torch: the oracle of its tests, and the back end where there is no kernel.

It reads each gradient several times and launches several kernels for each, but waits for the device no more than the
native core does: everything stays in tensors. The classes have the methods of those in ``pytracker._C``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import real_number
from ..columns import ABS_MAX, COLUMNS, POWERS, SUM_SQ, TOTALS, row_width
from ..errors import InvalidTypeError, InvalidValueError, ParameterError
from ..moments import merge, totals
from .dtensor import local_pieces

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
    values = tensor.detach()
    missing_zeros = 0
    if values.layout == torch.sparse_coo:
        values = values.coalesce().values()
        missing_zeros = tensor.numel() - values.numel()
    dtype = wide(values.device)
    real = (values.real if values.is_complex() else values).to(dtype)
    modulus = (values.to(torch.complex128).abs() if values.is_complex() else values.to(dtype).abs()).to(dtype)
    squares = modulus * modulus
    if values.is_complex():  # (nan, inf) has an infinite modulus in C, and a NaN in its sum of squares
        squares = real * real + values.imag.to(dtype) ** 2
        modulus = torch.where(squares.isnan(), squares, modulus)
    abs_max = modulus.max() if values.numel() else modulus.new_zeros(())
    counts = [(values == 0).sum() + missing_zeros, values.isnan().sum(), values.isinf().sum()]
    return torch.stack([real.sum(), squares.sum(), abs_max, *(count.to(dtype) for count in counts)])


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
    if value.numel() != 1:
        raise InvalidValueError(
            f"{name!r} is a tensor of shape {list(value.shape)} with {value.numel()} elements; "
            "a recorded value has one: reduce it first, e.g. with .mean()"
        )
    if value.is_complex():
        raise InvalidValueError(f"{name!r} is complex ({value.dtype}); record .real, .imag or .abs()")
    if value.device.type != "cpu" and value.device not in devices:
        raise InvalidValueError(f"{name!r} is on {value.device}, where the model has no parameter; move it")
    return value


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
        self.parameters = list(parameters)
        self.names = list(names)
        self.source = source
        self.generation = 0
        self.devices: list[torch.device] = []
        self.members: list[list[int]] = []
        self.windows = list(windows)
        self.has_pieces = bool(windows) or any(hasattr(p, "_local_tensor") for p in parameters)
        self._gathered: list[Tensor | None] = []
        self._group()

    def _group(self) -> None:
        self.devices = list(dict.fromkeys(p.device for p in self.parameters)) or [torch.device("cpu")]
        self.members = [[i for i, p in enumerate(self.parameters) if p.device == device] for device in self.devices]
        self.generation += 1

    def is_for(self, parameters: Sequence[Any]) -> bool:
        """Tell whether the plan is for just these parameters, in this order."""
        return len(parameters) == len(self.parameters) and all(
            a is b for a, b in zip(parameters, self.parameters, strict=True)
        )

    def gather(self) -> None:
        """Take the gradients of this step.

        Raises:
            ParameterError: a gradient's dtype or layout is not supported.
        """
        gradient = self.source == "gradient"
        found: list[Any] = [p.grad if gradient else p for p in self.parameters]
        pieces = local_pieces(self.parameters, found) if self.has_pieces else found
        self._gathered = [self._checked(i, piece) for i, piece in enumerate(pieces)]
        if any(p.device != self.devices[g] for g, members in enumerate(self.members) for p in self._of(members)):
            self._group()

    def _of(self, members: list[int]) -> list[Tensor]:
        return [self.parameters[i] for i in members]

    def _checked(self, index: int, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        subject = f"the gradient of {self.names[index]!r}"
        if self.source == "value":
            subject = f"parameter {self.names[index]!r}"
        if tensor.dtype not in DTYPES:
            raise ParameterError(
                f"{subject} has dtype {tensor.dtype}; pytracker reads "
                + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            )
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            raise ParameterError(
                f"{subject} has layout {tensor.layout}; pytracker reads strided and sparse COO tensors"
            )
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
        return tensor.flatten()[offset : offset + length]

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

    def reduce(self, grad_scale: Tensor | float | None = None) -> list[Tensor]:
        """Gather, and return a row for each device."""
        if grad_scale is not None:
            checked_scalar("grad_scale", grad_scale, self.devices)
        self.gather()
        return [self.row(group, grad_scale) for group in range(len(self.devices))]

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """Gather, and return [total norm, factor that brings it down to max_norm], torch's formula."""
        norm = self.reduce()[0][SUM_SQ].sqrt()
        return torch.stack([norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)])

    def scale(self, factor: Tensor) -> None:
        """Multiply the gathered gradients by ``factor``, in place."""
        if factor.is_cpu and factor == 1:
            return
        for tensor in self._gathered:
            if tensor is not None:
                tensor.mul_(factor.to(tensor.device))

    def norm_and_max(self) -> tuple[float, float]:
        """Return the total norm and the largest norm of one parameter. Waits for the device."""
        whole = merge([row[:TOTALS].cpu().double() for row in self.reduce()])
        return math.sqrt(float(whole[SUM_SQ])), math.sqrt(float(whole[-1]))

    def norm_and_max_of(self, watch: ModuleWatch, root: torch.nn.Module) -> tuple[float, float] | None:
        """Return the norms of a module that is as it was when the plan was made, else None. Waits for the device."""
        return None if self.has_pieces or not watch.unchanged(root) else self.norm_and_max()


class StepLog:
    """The rows that the host has not read yet: a ring for each device."""

    def __init__(self, plan: Plan, capacity: int, slots: int) -> None:
        """Allocate ``capacity`` rows with ``slots`` scalars each."""
        self.capacity = capacity
        self.slots = slots
        self.written = 0
        self.drained = 0
        self.scalar_names: list[str] = []
        self._generation = plan.generation
        self._notes: deque[tuple[int, list[int]]] = deque()
        self.rows = [
            torch.empty((capacity, row_width(len(members), slots)), dtype=wide(device), device=device)
            for device, members in zip(plan.devices, plan.members, strict=True)
        ]

    def slot_of(self, name: str) -> int:
        """Return the slot of a scalar's name, new names included; -1 where all are taken."""
        if name not in self.scalar_names:
            if len(self.scalar_names) == self.slots:
                return -1
            self.scalar_names.append(name)
        return self.scalar_names.index(name)

    def append(self, plan: Plan, reader: StepReader, step: int, scalars: dict[str, Any]) -> int:
        """Record one step; return the number of undrained rows, or -1 where a new log is needed."""
        plan.gather()
        scalars = dict(scalars)
        grad_scale = scalars.pop("grad_scale", None)
        if grad_scale is not None:
            grad_scale = checked_scalar("grad_scale", grad_scale, plan.devices)
            if grad_scale.is_cpu and grad_scale == 0:
                raise InvalidValueError("'grad_scale' is 0; the statistics are divided by it")
        values = reader.read(self, scalars)
        if values is None or plan.generation != self._generation:
            return -1
        checked = [(slot, checked_scalar(self.scalar_names[slot], value, plan.devices)) for slot, value in values]
        index = self.written % self.capacity
        given = [0] * len(self.rows)
        for group, rows in enumerate(self.rows):
            row = plan.row(group, grad_scale)
            rows[index, : len(row)] = row
            for slot, value in checked:
                if (value.device if value.device.type != "cpu" else plan.devices[0]) == plan.devices[group]:
                    rows[index, len(row) + slot] = value.detach().reshape(())
                    given[group] |= 1 << slot
        self._notes.append((step, given))
        self.written += 1
        return self.written - self.drained

    def replayed(self, step: int) -> None:
        """Note a row that a replayed CUDA graph has written; the reference can't be captured, so there is none."""
        raise InvalidValueError(f"step {step}: only the native core records CUDA graph replays")

    def notes(self, first: int, count: int) -> tuple[list[int], list[list[int]]]:
        """Return the steps of the rows from ``first`` on and, for each device, a bit for each scalar in its row."""
        begin = first - self.drained
        noted = list(self._notes)[begin : begin + count]
        return [step for step, _ in noted], [given for _, given in noted]

    def release(self, end: int) -> None:
        """Make the places of the rows before ``end`` free."""
        while self.drained < min(end, self.written):
            self._notes.popleft()
            self.drained += 1


class StepReader:
    """Gives each keyword its slot, and each parameter group its learning rate."""

    def __init__(
        self, optimizer: Any, name_groups: Callable[[list[dict[str, Any]]], list[str]], reserved: set[str]
    ) -> None:
        """Remember the optimizer, or None, and the names that a scalar may not have."""
        self._optimizer = optimizer
        self._reserved = reserved
        self._name_groups = name_groups
        self._rate_names: list[str] = []

    def read(self, log: StepLog, scalars: dict[str, Any]) -> list[tuple[int, Any]] | None:
        """Return (slot, value) of everything to record; None where the log has too few slots."""
        named = [(name, value) for name, value in scalars.items() if value is not None]
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        if not isinstance(groups, list):
            raise InvalidTypeError(f"the optimizer's param_groups is of type {type(groups).__name__}; expected a list")
        if len(groups) != len(self._rate_names):
            self._rate_names = self._name_groups(groups)
        for name, _ in named:
            if not name or not name.isprintable():
                raise InvalidValueError(f"a recorded value has a printable name, got {name!r}")
            if name in self._reserved or name in self._rate_names:
                raise InvalidValueError(f"{name!r} is recorded by pytracker itself; give your value another name")
        rates = [
            (name, group["lr"])
            for name, group in zip(self._rate_names, groups, strict=True)
            if group.get("lr") is not None
        ]
        values = [(log.slot_of(name), value) for name, value in rates + named]
        return None if any(slot < 0 for slot, _ in values) else values

    def reset(self) -> None:
        """Forget what belongs to a log that is gone."""
        self._rate_names = []


class ModuleWatch:
    """Tells whether a module still has the modules and parameters that it had."""

    def __init__(self, root: torch.nn.Module) -> None:
        """Remember the tree below ``root``."""
        self._before = self._snapshot(root)

    def unchanged(self, root: torch.nn.Module) -> bool:
        """Compare the tree with what it was."""
        return self._snapshot(root) == self._before

    @staticmethod
    def _snapshot(root: torch.nn.Module) -> list[list[int]]:
        return [[id(p) for p in module._parameters.values()] for module in root.modules()]


def define_operators() -> None:
    """Define torch.ops.pytracker.* on top of this module, where the native core has not."""
    library: Any = torch.library.Library("pytracker", "DEF")  # type: ignore[no-untyped-call]
    library.define("gradient_moments(Tensor[] gradients, Tensor? grad_scale=None) -> Tensor")
    library.define("scale_gradients_(Tensor(a!)[] gradients, Tensor factor) -> ()")
    library.define("meter_update_(Tensor(a!) state, Tensor[] values, Tensor[] weights) -> ()")

    def gradient_moments(gradients: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
        names = [f"tensors[{i}]" for i in range(len(gradients))]
        return Plan(gradients, names, "value").reduce(grad_scale)[0]

    def scale_gradients_(gradients: list[Tensor], factor: Tensor) -> None:
        for gradient in gradients:
            gradient.mul_(factor)

    library.impl("gradient_moments", gradient_moments, "CompositeExplicitAutograd")
    library.impl("scale_gradients_", scale_gradients_, "CompositeExplicitAutograd")
    library.impl("meter_update_", meter_update_, "CompositeExplicitAutograd")
    globals()["_library"] = library  # the operators live as long as this object


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
