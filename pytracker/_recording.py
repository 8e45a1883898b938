"""What a tracker keeps besides the device log: stand-ins, means of an epoch, descriptions of parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from . import _ops
from ._pieces import Held
from ._targets import make_plan
from .columns import ABS_MAX, COLUMNS, INFS, MAX_SUM_SQ_TOTAL, NANS, SUM_SQ, ZEROS
from .device_log import Rows
from .diagnostics import Diagnosis
from .errors import InvalidTypeError, InvalidValueError, in_words
from .history import History
from .noise_scale import NOISE_SERIES
from .parameters import Interval, ParameterHistory, ParameterInfo
from .store import Run


def opened(run: Any) -> Any:
    """Return the run to write: the one given, a new one in the directory given, or one in memory.

    Raises:
        InvalidTypeError: ``run`` is none of these.
    """
    if run is None:
        return Memory()
    if isinstance(run, (str, Path)):
        return Run(run)
    if not hasattr(run, "log_many"):
        raise InvalidTypeError(f"run is {run!r:.80}, of type {type(run).__name__}; expected a Run or a directory")
    return run


class Memory:
    """Stands in for a run where there is none: keeps what a ``Run`` would, in memory only."""

    every_step = False

    def __init__(self) -> None:
        self.history = History()

    def log_many(self, steps: NDArray[np.int64], metrics: dict[str, NDArray[np.float64]]) -> None:
        for name, values in metrics.items():
            self.history[name].extend(values, steps)

    def set_parameters(self, infos: Iterable[ParameterInfo]) -> None:
        self.history.parameters = ParameterHistory(infos)

    def log_interval(self, interval: Interval) -> None:
        self.history.parameters.append(interval)

    def log_rows(self, steps: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
        self.history.parameters.append_rows(steps, rows)

    def log_finding(self, finding: dict[str, Any]) -> None:
        known = self.history.findings
        place = next((i for i, other in enumerate(known) if other["key"] == finding["key"]), len(known))
        known[place : place + 1] = [finding]

    def set_meta(self, **facts: Any) -> None:
        self.history.meta.update(facts)

    def truncate(self, step: int) -> None:
        self.history.truncate(step)

    def finish(self, state: str = "finished", *, error: str | None = None) -> None:
        return None


class Sink(Protocol):
    """What mirrors a training elsewhere (TensorBoard, CSV, ...): told of every exact value, in order."""

    def write(self, steps: NDArray[np.int64], series: dict[str, NDArray[np.float64]]) -> None:
        """Take a value of each series at each of ``steps``."""

    def close(self) -> None:
        """Write what is left."""


class Sinks:
    """Tells every sink; one that fails is reported and left out from then on, and the training goes on."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, steps: NDArray[np.int64], series: dict[str, NDArray[np.float64]]) -> None:
        self._each(lambda sink: sink.write(steps, series))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:  # noqa: PERF203 - each sink fails for itself
                self._sinks.remove(sink)
                warnings.warn(
                    f"the sink {type(sink).__name__} failed and is switched off: {in_words(error)}",
                    RuntimeWarning,
                    stacklevel=2,
                )


class EpochMeans:
    """The weighted means of the scalars over the steps of an epoch."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}  # of the steps that have not arrived yet
        self._sums: dict[str, list[float]] = {}  # name -> [sum of n * value, sum of n]

    def weigh(self, step: int, n: float) -> None:
        self._weights[step] = n

    def add(self, rows: Rows) -> None:
        weights = np.array([self._weights.pop(step, 1.0) for step in rows.steps.tolist()], np.float64)
        for name, (where, values) in rows.scalars.items():
            if name in NOISE_SERIES:
                continue  # means over many steps already
            here = weights[where]
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += float(values @ here)
            total[1] += float(here.sum())

    def take(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums = {}
        return means


def gradient_series(rows: Rows, numel: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return what is recorded of the gradients on every step, each [n]; ``numel`` [T]: elements of the parameters."""
    totals, present = rows.totals, ~np.isnan(rows.tensors[:, :, ZEROS])
    return {
        "grad_norm": np.sqrt(totals[:, SUM_SQ]),
        "grad_max": np.sqrt(totals[:, MAX_SUM_SQ_TOTAL]),
        "grad_abs_max": totals[:, ABS_MAX],
        "grad_nonfinite": totals[:, NANS] + totals[:, INFS],
        "grad_zero_fraction": totals[:, ZEROS] / np.maximum(present @ numel, 1),
    }


def parameter_infos(parameters: list[Held], optimizer: torch.optim.Optimizer | None) -> list[ParameterInfo]:
    """Return what each parameter is: name, shape, dtype, elements, and its group in the optimizer."""
    groups: dict[int, str] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer is not None else []):
        groups.update((id(parameter), str(group.get("name", index))) for parameter in group["params"])
    return [
        ParameterInfo(
            name=held.name,
            shape=held.shape,
            dtype=str(held.parameter.dtype).removeprefix("torch."),
            group=groups.get(id(held.parameter), ""),
            numel=math.prod(held.shape),
        )
        for held in parameters
    ]


def weight_moments(held: list[Held]) -> NDArray[np.float64]:
    """Return the moments of the parameters themselves, [T, 6]. Waits for the device."""
    plan = make_plan(held, "value")
    moments = np.full((len(held), len(COLUMNS)), math.nan)
    for of_device, row in zip(plan.members, plan.reduce(), strict=True):
        moments[of_device] = _ops.tensor_moments(row)
    return moments


def warned_of_no_gradients(rows: Rows) -> bool:
    """Say so where no parameter had a gradient in any of the steps, and return whether it was said."""
    if not rows.tensors.shape[1] or not np.isnan(rows.tensors[:, :, ZEROS]).all():
        return False
    warnings.warn(
        f"no parameter had a gradient in steps {rows.steps[0]} to {rows.steps[-1]}; call tracker.step() after "
        "loss.backward() and before optimizer.zero_grad()",
        RuntimeWarning,
        stacklevel=3,
    )
    return True


def facts_for_rules(
    optimizer: torch.optim.Optimizer | None, diagnosis: Diagnosis | None, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is noted in a run's meta: of the optimizer, and of the rules and settings where others were noted."""
    changed = diagnosis.changed if diagnosis is not None else {}
    differs = changed != (known.get("diagnosis") or {})
    return _optimizer_facts(optimizer) | ({"diagnosis": changed or None} if differs else {})


def _optimizer_facts(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return what the rules know of the optimizer: its name, and its momentum where it has one."""
    if optimizer is None:
        return {"optimizer": None}
    momentum = optimizer.param_groups[0].get("momentum") if optimizer.param_groups else None
    return {"optimizer": type(optimizer).__name__} | ({"momentum": float(momentum)} if momentum else {})


def as_number(name: str, value: Any) -> float:
    """Return a metric as a float; a tensor's device is waited for."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise InvalidValueError(
                f"{name!r} is a tensor of shape {list(value.shape)} with {value.numel()} elements; a metric has one"
            )
        return float(value.item())
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise InvalidTypeError(f"{name!r} is {value!r:.80}, of type {type(value).__name__}; expected a number")
    return float(value)
