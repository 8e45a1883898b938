"""What ``log`` and ``epoch`` record beside the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .._checks import real_number
from ..errors import InvalidValueError
from ..reference import number_in
from ..sinks import NoSinks


class LateMetrics:
    """Records values at the latest step, whose row may not have arrived yet.

    A series is either one of the steps or one of these. Whichever call had its name first keeps it.

    Args:
        run: what records them.
        sinks: what mirrors them.
        reserved: the names that no step may give a value; those of the metrics are added.
    """

    def __init__(self, run: Any, sinks: NoSinks, reserved: set[str]) -> None:
        self._run, self._sinks, self._reserved = run, sinks, reserved
        self._names: set[str] = set()
        self._of_steps: set[str] = set()

    def leave_to_steps(self, names: Iterable[str]) -> None:
        """Take names for those of steps: of a training that goes on, none of whose steps has been taken yet."""
        self._of_steps.update(names)

    def checked(self, metrics: Mapping[str, Any], of_steps: Iterable[str]) -> dict[str, float]:
        """Return metrics as numbers, without those that are None. Waits for values on a device.

        Args:
            metrics: by name a number or a tensor of one element.
            of_steps: the scalars of the steps.

        Raises:
            InvalidTypeError: a metric is not a number.
            InvalidValueError: its name is that of what is recorded on each step, or its value cannot be read.
        """
        values = {name: _number(repr(name), value) for name, value in metrics.items() if value is not None}
        taken = {*of_steps, *self._of_steps, *(self._reserved - self._names)}
        for name in values:
            if name in taken:
                raise InvalidValueError(f"{name!r} is recorded on each step already; give this value another name")
        return values

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at ``step``."""
        if values:
            self._run.log_many(np.array([step], np.int64), {name: np.array([value]) for name, value in values.items()})
            self._names.update(values.keys() - self._reserved)
            self._reserved.update(values)
            self._sinks.late(step, values)


def _number(name: str, value: Any) -> float:
    is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return real_number(name, number_in(value, name) if is_one else value)
