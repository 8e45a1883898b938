"""Meters: statistics over steps that are fed without waiting and read when they are wanted."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import by_name, flag, no_copies, number_of_samples, real_number, text, wrong_value
from .columns import MAX_SUM_SQ_TOTAL, METER_COLUMNS, SUM_SQ
from .core import DeviceLog, Rows, Target, native, operators, track, watchable
from .errors import InvalidTypeError, InvalidValueError, LayoutError
from .moments import is_missing
from .reference import number_in

_VAL, _SUM, _COUNT, _NANS = range(len(METER_COLUMNS))
_STATE = ("val", "sum", "count", "nans")
_SUMMARIES = ("none", "average", "sum", "count")


def _number(name: str, value: Any) -> float:
    """Return a number of Python, NumPy or torch as a float, or an int where it is an integer. Waits for its device."""
    if isinstance(value, Tensor):
        _check_one_real_element(name, value)
        value = number_in(value, name)
    number = real_number(name, value)
    return int(value) if isinstance(value, Integral) else number


def _check_one_real_element(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise InvalidValueError(
            f"{name} is a tensor of shape {list(tensor.shape)} with {tensor.numel()} elements; expected one: reduce "
            "it first, e.g. with .mean()"
        )
    if tensor.is_complex():
        raise InvalidTypeError(f"{name} is a complex tensor ({tensor.dtype}); give its .real, .imag or .abs()")
    if tensor.is_meta:
        raise InvalidValueError(f"{name} is a tensor on the meta device, which has no value")


class AverageMeter:
    """Keeps the latest value, the sum, the count and the average of what it is fed.

    The meter of the ImageNet example, with the same arguments and attributes. Python numbers (and tensors on the CPU)
    are added in Python, with its own exact integers. A tensor on another device is added there, in float64, by one
    launch; only reading a value waits for it.

    A NaN is counted in ``nans`` and left out of the sum and the count, so that one bad batch does not spoil an epoch. A
    weight of 0 adds nothing, whatever the value.

    ``val``, ``sum``, ``count`` and ``avg`` may be assigned, as after an all-reduce of the sum and the count.

    Args:
        name: shown by ``str(meter)``.
        fmt: how ``str(meter)`` shows the value and the average: a format of ``str.format``, with its colon.
        summary_type: what ``summary()`` shows: "none", "average", "sum" or "count", or what has such a name, as the
            members of the example's ``Summary``.

    Raises:
        InvalidTypeError: ``name`` or ``fmt`` is no text.
        InvalidValueError: ``fmt`` is no format of a float, or ``summary_type`` none of those.

    Example:
        >>> losses = AverageMeter("Loss", ":.4e")
        >>> losses.update(0.5, n=32)
        >>> losses.update(1.0, n=96)
        >>> losses.val, losses.avg, losses.sum, losses.count
        (1.0, 0.875, 112.0, 128)
        >>> str(losses)
        'Loss 1.0000e+00 (8.7500e-01)'
    """

    def __init__(self, name: str = "", fmt: str = ":f", summary_type: Any = "average") -> None:
        self.name = text("name", name)
        self.fmt = text("fmt", fmt)
        self.summary_type = _summary_name(summary_type)
        self.reset()
        try:
            self._shown(0.0, 0.0)
        except (ValueError, KeyError, IndexError, AttributeError):
            raise InvalidValueError(
                f"fmt is {fmt!r:.80}; expected the format of a float, as ':.4e' or ':6.2f'"
            ) from None

    def reset(self) -> None:
        """Forget everything."""
        self._val: Any = 0
        self._sum: Any = 0
        self._count: Any = 0
        self._nans = 0
        self._assigned_avg: float | None = None
        self._states: dict[torch.device, Tensor] = {}
        self._latest: torch.device | None = None  # where the latest value is; None: on the host

    def update(self, val: Any, n: Any = 1) -> None:
        """Add a value that stands for ``n`` samples. Never waits.

        Args:
            val: a number, or a tensor of one element of any real dtype, on any device.
            n: the weight, 0 or more: usually the number of samples in the batch, or of tokens that count
                (``mask.sum()``). Of a tensor that is not on the CPU the value is not checked, since that would wait.

        Raises:
            InvalidTypeError: ``val`` or ``n`` is not a real number.
            InvalidValueError: one is a tensor of more than one element, or ``n`` is negative or not finite.
        """
        on_device = _is_on_device(f"n{self._of}", n)
        if not on_device:
            weight = _number(f"n{self._of}", n) if isinstance(n, Tensor) else n
            n = number_of_samples(f"n{self._of}", weight)
        if _is_on_device(f"val{self._of}", val):
            self._update_on(val.device, val, n)
            return
        val = _number(f"val{self._of}", val)
        if on_device:
            self._update_on(n.device, val, n)
            return
        self._assigned_avg = None
        self._latest = None
        self._val = val
        if n == 0:
            return
        if val != val:
            self._nans += 1
        else:
            self._sum = _added(self._sum, _times(val, n))
            self._count = _added(self._count, n)

    @functools.cached_property
    def _of(self) -> str:
        """Which meter it is, for messages."""
        return f" of the meter {self.name!r}" if self.name else ""

    def _update_on(self, device: torch.device, val: Any, n: Any) -> None:
        state = self._states.get(device)
        if state is None:
            zeros = torch.zeros((1, len(METER_COLUMNS)), dtype=torch.float64, device="cpu")
            state = self._states[device] = zeros.to(device)
        operators.update_meter(state, _as_tensor(val, device), _as_tensor(n, device))
        self._assigned_avg = None
        self._latest = device

    def _read(self, column: int) -> float:
        return sum(float(state.cpu()[0, column]) for state in self._states.values())

    def _bring_home(self) -> None:
        """Hold on the host what is on devices. Waits for them."""
        self._val, self._sum, self._count, self._nans = self.val, self.sum, self.count, self.nans
        self._states, self._latest = {}, None

    @property
    def val(self) -> Any:
        """The latest value, 0 before the first. Waits where it is on a device."""
        return self._val if self._latest is None else float(self._states[self._latest].cpu()[0, _VAL])

    @val.setter
    def val(self, value: Any) -> None:
        value = _number(f"val{self._of}", value)
        self._bring_home()
        self._val = value

    @property
    def sum(self) -> Any:
        """The sum of val * n. Waits where values are on a device."""
        return _added(self._sum, self._read(_SUM)) if self._states else self._sum

    @sum.setter
    def sum(self, value: Any) -> None:
        value = _number(f"sum{self._of}", value)
        self._bring_home()
        self._sum = value

    @property
    def count(self) -> Any:
        """The sum of n. Waits where values are on a device."""
        return _added(self._count, self._read(_COUNT)) if self._states else self._count

    @count.setter
    def count(self, value: Any) -> None:
        value = _number(f"count{self._of}", value)
        self._bring_home()
        self._count = value

    @property
    def avg(self) -> Any:
        """Sum / count, 0 before the first value; what was assigned until the next update. Waits as ``sum`` does."""
        if self._assigned_avg is not None:
            return self._assigned_avg
        count = self.count
        return self.sum / count if count else 0

    @avg.setter
    def avg(self, value: Any) -> None:
        self._assigned_avg = _number(f"avg{self._of}", value)

    @property
    def nans(self) -> int:
        """How many NaN were left out. Waits where values are on a device."""
        return self._nans + int(self._read(_NANS))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as numbers. Waits where values are on a device.

        Example:
            >>> losses = AverageMeter()
            >>> losses.update(0.5, n=32)
            >>> losses.state_dict()
            {'val': 0.5, 'sum': 16.0, 'count': 32, 'nans': 0}
        """
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; the name and the format stay.

        Raises:
            InvalidTypeError, InvalidValueError: ``state`` is nothing of the kind. The meter stays as it is.
        """
        if not isinstance(state, Mapping) or set(state) != set(_STATE):
            raise wrong_value("state", state, "what AverageMeter.state_dict() returned")
        numbers = {name: _number(f"state[{name!r}]", state[name]) for name in _STATE}
        self.reset()
        self._val, self._sum, self._count, self._nans = (numbers[name] for name in _STATE)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        kept = {"name": self.name, "fmt": self.fmt, "summary_type": self.summary_type}
        return {**kept, "avg": self._assigned_avg, "state": self.state_dict()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.name, self.fmt, self.summary_type = kept["name"], kept["fmt"], kept["summary_type"]
        self.load_state_dict(kept["state"])
        self._assigned_avg = kept["avg"]

    def __str__(self) -> str:
        return self._shown(self.val, self.avg)

    def _shown(self, val: float, avg: float) -> str:
        shown = f"{{val{self.fmt}}} ({{avg{self.fmt}}})".format(val=val, avg=avg)
        return f"{self.name} {shown}" if self.name else shown

    def summary(self) -> str:
        """Return a line for the end of an epoch, as in the ImageNet example. Waits where values are on a device.

        Example:
            >>> accuracy = AverageMeter("Acc@1", ":6.2f")
            >>> accuracy.update(75.0, n=4)
            >>> accuracy.summary()
            'Acc@1 75.000'
        """
        if self.summary_type == "none":
            return ""
        number = getattr(self, "avg" if self.summary_type == "average" else self.summary_type)
        return f"{self.name} {number:.3f}"

    def __repr__(self) -> str:
        """Show the meter, without waiting for a device."""
        named = f"{self.name!r}, " if self.name else ""
        if self._states:
            return f"AverageMeter({named}values on {', '.join(map(str, self._states))})"
        return f"AverageMeter({named}val={self.val}, avg={self.avg}, sum={self.sum}, count={self.count})"


def _summary_name(given: Any) -> str:
    name = getattr(given, "name", given)
    if not isinstance(name, str) or name.lower() not in _SUMMARIES:
        raise wrong_value("summary_type", given, f"one of {', '.join(_SUMMARIES)}")
    return name.lower()


def _is_on_device(name: str, value: Any) -> bool:
    """Whether ``value`` is a tensor, of one real element, that cannot be read without waiting for a device."""
    if not isinstance(value, Tensor) or value.is_cpu:
        return False
    _check_one_real_element(name, value)
    return True


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    """Return a number as a tensor on the CPU, which the operator reads at once, and a tensor on ``device``."""
    if isinstance(value, Tensor):
        return value.detach().to(device, non_blocking=True)
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _times(val: float, n: float) -> float:
    """Return val * n: exact for integers, in float64 where one is a float or the product would not fit one."""
    product = val * n
    return float(val) * float(n) if isinstance(product, int) and product.bit_length() > 1000 else product


def _added(left: float, right: float) -> float:
    """Return left + right; infinite where integers grow past what a float64 holds."""
    try:
        return left + right
    except OverflowError:
        return math.inf if left > 0 else -math.inf


@dataclass(frozen=True)
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

    def merged(self, values: NDArray[np.float64], given: NDArray[np.bool_]) -> _Spread:
        """Return what it is with values [n, K], of which those ``given`` [n, K] count."""
        n = given.sum(0)
        some = n > 0
        total = self.count + n
        with np.errstate(invalid="ignore"):
            mean = np.sum(values, axis=0, where=given) / np.maximum(n, 1)
            squares = np.sum((values - mean) ** 2, axis=0, where=given)
            distance = mean - self.mean
            squares = self.squares + squares + distance**2 * self.count * (n / np.maximum(total, 1))
            mean = (self.mean * self.count + mean * n) / np.maximum(total, 1)  # an infinite mean stays infinite
        least = np.min(values, axis=0, where=given, initial=np.inf)
        most = np.max(values, axis=0, where=given, initial=-np.inf)
        first = self.count == 0
        latest = len(values) - 1 - np.argmax(given[::-1], axis=0)
        last = np.take_along_axis(values, latest[None], axis=0)[0]
        return _Spread(
            count=total,
            mean=np.where(some, mean, self.mean),
            squares=np.where(some, squares, self.squares),
            least=np.where(some, np.where(first, least, np.minimum(self.least, least)), self.least),
            most=np.where(some, np.where(first, most, np.maximum(self.most, most)), self.most),
            last=np.where(some, last, self.last),
        )

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

    Args:
        target: what to measure: a module, parameters, or (name, parameter) pairs.
        every: updates from one asynchronous copy to the host to the next.

    Raises:
        InvalidTypeError: ``target`` is nothing of the kind, or gradients; or ``every`` is not a whole number.
        InvalidValueError: ``every`` is less than 1.
        ParameterError: two parameters have the same name, or one has no data.
        LayoutError: parameters are sharded over ranks.

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

    def __init__(self, target: Target, *unnamed: Any, every: int = 50) -> None:
        by_name("GradientMeter", unnamed, "target, every=50")
        tracked = track(watchable(target))
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

    __reduce_ex__ = no_copies("a GradientMeter", "keep what compute() returns, or make another one")

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
        present = ~is_missing(rows.tensors[here])
        any_present = present.any(axis=1, keepdims=True)
        given = np.concatenate([any_present, any_present, present], axis=1)
        if len(norms):  # both at once, as rows that an interruption has let in may come again
            self._spread, self._counted_from = self._spread.merged(norms, given), int(rows.steps[-1]) + 1

    def compute(self, per_parameter: bool = False) -> dict[str, dict[str, float]]:
        """Return mean, min, max, std (population), last and count of each norm. Waits for the device.

        The keys are ``grad_norm`` (of all gradients together) and ``grad_max`` (the largest norm of one parameter),
        over the updates in which there was a gradient; with ``per_parameter`` also ``norm/NAME``, over those in which
        that parameter had one. Where there was none all are NaN and the count is 0.
        """
        per_parameter = flag("per_parameter", per_parameter)
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
