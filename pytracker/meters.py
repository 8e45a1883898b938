"""Meters: statistics over steps that are fed without waiting and read when they are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import number_of_samples, wrong_type
from .columns import MAX_SUM_SQ_TOTAL, METER_COLUMNS, SUM_SQ
from .core import DeviceLog, Rows, Target, native, plan_for
from .errors import InvalidValueError, LayoutError

_VAL, _SUM, _COUNT, _NANS = range(len(METER_COLUMNS))


class AverageMeter:
    """Keeps the latest value, the sum, the count and the average of what it is fed.

    Python numbers (and tensors on the CPU, which are as near) are added in Python, with its own exact integers. A
    tensor on another device is added there, in float64, by one launch; only reading a value waits for it.

    A NaN is counted in ``nans`` and left out of the sum and the count, so that one bad batch does not spoil an epoch.

    Example:
        >>> losses = AverageMeter()
        >>> losses.update(0.5, n=32)
        >>> losses.update(1.0, n=96)
        >>> losses.val, losses.avg, losses.sum, losses.count
        (1.0, 0.875, 112.0, 128)
    """

    def __init__(self) -> None:
        """Start empty."""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._val: Any = 0
        self._sum: Any = 0
        self._count: Any = 0
        self._nans = 0
        self._states: dict[torch.device, Tensor] = {}
        self._latest: torch.device | None = None  # where the latest value is; None: here

    def update(self, val: Any, n: float = 1) -> None:
        """Add a value that stands for ``n`` samples. Never waits.

        Args:
            val: a number, or a tensor of one element of any dtype and device.
            n: the weight, 0 or more; usually the number of samples in the batch.

        Raises:
            InvalidTypeError: ``val`` is neither, or ``n`` is not a number.
            InvalidValueError: ``val`` has more than one element, or ``n`` is negative or not finite.
        """
        n = number_of_samples("n", n)
        if isinstance(val, Tensor):
            if val.numel() != 1:
                raise InvalidValueError(
                    f"val is a tensor of shape {list(val.shape)} with {val.numel()} elements; a meter takes one: "
                    "reduce it first, e.g. with .mean()"
                )
            if not val.is_cpu:
                self._update_there(val, n)
                return
            val = val.item()
        elif isinstance(val, (np.generic, np.ndarray)):
            val = val.item() if val.size == 1 else val
        if not isinstance(val, (int, float)):
            raise wrong_type("val", val, "a number or a tensor")
        self._latest = None
        self._val = val
        if val != val:
            self._nans += 1
        else:
            self._sum += val * n
            self._count += n

    def _update_there(self, val: Tensor, n: float) -> None:
        state = self._states.get(val.device)
        if state is None:
            state = self._states[val.device] = torch.zeros((1, len(METER_COLUMNS)), dtype=torch.float64).to(val.device)
        torch.ops.pytracker.meter_update_(state, [val.detach()], [float(n)])
        self._latest = val.device

    def _read(self, column: int) -> float:
        return sum(float(state.cpu()[0, column]) for state in self._states.values())

    @property
    def val(self) -> Any:
        """The latest value, 0 before the first. Waits where it is on a device."""
        return self._val if self._latest is None else float(self._states[self._latest].cpu()[0, _VAL])

    @property
    def sum(self) -> Any:
        """The sum of val * n. Waits where values are on a device."""
        return self._sum + self._read(_SUM) if self._states else self._sum

    @property
    def count(self) -> Any:
        """The sum of n. Waits where values are on a device."""
        return self._count + self._read(_COUNT) if self._states else self._count

    @property
    def avg(self) -> Any:
        """Sum / count, 0 before the first value. Waits where values are on a device."""
        count = self.count
        return self.sum / count if count else 0

    @property
    def nans(self) -> int:
        """How many NaN were left out. Waits where values are on a device."""
        return self._nans + int(self._read(_NANS))

    def __repr__(self) -> str:
        """Show the meter, without waiting for a device."""
        if self._states:
            return f"AverageMeter(values on {', '.join(map(str, self._states))})"
        return f"AverageMeter(val={self.val}, avg={self.avg}, sum={self.sum}, count={self.count})"


@dataclass
class _Spread:
    """Mean, extremes and standard deviation of series [n, K], merged batch by batch (Chan et al. 1979)."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]  # sum of squared distances from the mean
    least: NDArray[np.float64]
    most: NDArray[np.float64]
    last: NDArray[np.float64]

    @classmethod
    def empty(cls, width: int) -> _Spread:
        zeros, nothing = np.zeros(width), np.full(width, np.nan)
        return cls(zeros, zeros, zeros, nothing, nothing, nothing)

    def add(self, values: NDArray[np.float64], given: NDArray[np.bool_]) -> None:
        """Merge values [n, K], of which those ``given`` [n, K] count."""
        n = given.sum(0)
        some = n > 0
        with np.errstate(invalid="ignore"):
            mean = np.sum(values, axis=0, where=given) / np.maximum(n, 1)
            squares = np.sum((values - mean) ** 2, axis=0, where=given)
            distance = mean - self.mean
            total = self.count + n
            squares = self.squares + squares + distance**2 * self.count * (n / np.maximum(total, 1))
            mean = (self.mean * self.count + mean * n) / np.maximum(total, 1)  # an infinite mean stays infinite
        least = np.min(values, axis=0, where=given, initial=np.inf)
        most = np.max(values, axis=0, where=given, initial=-np.inf)
        first = self.count == 0
        latest = len(values) - 1 - np.argmax(given[::-1], axis=0)
        last = np.take_along_axis(values, latest[None], axis=0)[0]
        self.least = np.where(some, np.where(first, least, np.minimum(self.least, least)), self.least)
        self.most = np.where(some, np.where(first, most, np.maximum(self.most, most)), self.most)
        self.last = np.where(some, last, self.last)
        self.mean = np.where(some, mean, self.mean)
        self.squares = np.where(some, squares, self.squares)
        self.count = total

    def of(self, index: int) -> dict[str, float]:
        count = float(self.count[index])
        nothing = math.nan
        return {
            "mean": float(self.mean[index]) if count else nothing,
            "min": float(self.least[index]),
            "max": float(self.most[index]),
            "std": math.sqrt(self.squares[index] / count) if count else nothing,
            "last": float(self.last[index]),
            "count": count,
        }


class GradientMeter:
    """Mean, extremes, standard deviation and last value of the gradient norms since the last reset.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> meter = GradientMeter([("w", weight)])
        >>> for norm in (1.0, 3.0):
        ...     weight.grad = torch.tensor([0.0, norm])
        ...     meter.update()
        >>> meter.compute()["grad_norm"]
        {'mean': 2.0, 'min': 1.0, 'max': 3.0, 'std': 1.0, 'last': 3.0, 'count': 2.0}
    """

    def __init__(self, target: Target, *, every: int = 50) -> None:
        """Measure the gradients of ``target``: a module, parameters, or (name, parameter) pairs.

        Args:
            target: what to measure.
            every: updates from one asynchronous copy to the host to the next.

        Raises:
            InvalidTypeError: ``target`` is nothing of the kind, or ``every`` not a whole number.
            InvalidValueError: ``every`` is less than 1.
            ParameterError: two parameters have the same name, or one has no data.
            LayoutError: parameters are sharded over ranks.
        """
        tracked = plan_for(target)
        if tracked.sharded:
            raise LayoutError(
                "a GradientMeter sees only this rank's pieces of sharded parameters; use a Tracker instead"
            )
        self.names: list[str] = [each.name for each in tracked.parameters]
        self._log = DeviceLog(tracked.plan, every=every, on_rows=self._receive)
        self._updates = 0
        self._counted_from = 0
        self._clear()

    def _clear(self) -> None:
        self._spread = _Spread.empty(2 + len(self.names))

    def update(self) -> None:
        """Measure the gradients of this step. Never waits: one launch for each device.

        Raises:
            ParameterError: a gradient has a dtype or layout that cannot be read.
        """
        self._log.append(self._updates, {})
        self._updates += 1

    def _receive(self, rows: Rows) -> None:
        here = rows.steps >= self._counted_from
        norms = np.sqrt(
            np.concatenate([rows.totals[:, [SUM_SQ, MAX_SUM_SQ_TOTAL]], rows.tensors[:, :, SUM_SQ]], axis=1)[here]
        )
        given = np.ones(norms.shape, bool)
        given[:, 2:] = ~np.isnan(rows.tensors[here][:, :, -1])
        if len(norms):
            self._spread.add(norms, given)

    def compute(self, per_parameter: bool = False) -> dict[str, dict[str, float]]:
        """Return mean, min, max, std (population), last and count of each norm. Waits for the device.

        The keys are ``grad_norm`` (of all gradients together) and ``grad_max`` (the largest norm of one parameter);
        with ``per_parameter`` also ``norm/NAME``, over the updates in which that parameter had a gradient. Before the
        first update all are NaN and the count is 0.
        """
        self._log.flush()
        result = {"grad_norm": self._spread.of(0), "grad_max": self._spread.of(1)}
        if per_parameter:
            result.update({f"norm/{name}": self._spread.of(2 + i) for i, name in enumerate(self.names)})
        return result

    def reset(self) -> None:
        """Forget every update so far. Never waits."""
        self._counted_from = self._updates
        self._clear()


native.load()
