"""From rows to named series, and from a model to what a run says of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..columns import ABS_MAX, COLUMNS, INFS, MAX_SUM_SQ_TOTAL, NANS, SUM_SQ, ZEROS
from ..core import LocalParameter, Rows, make_plan, native
from ..diagnostics import Diagnosis
from ..history import ParameterInfo
from ..moments import is_missing


def gradient_series(rows: Rows) -> dict[str, NDArray[np.float64]]:
    """Return what is recorded of the gradients on every step, each [n]; NaN where no parameter had a gradient."""
    if not rows.has_gradients:  # what ranks have merged is on the first of them
        return {}
    totals, present = rows.totals, ~is_missing(rows.tensors)
    series = {
        "grad_norm": np.sqrt(totals[:, SUM_SQ]),
        "grad_max": np.sqrt(totals[:, MAX_SUM_SQ_TOTAL]),
        "grad_abs_max": totals[:, ABS_MAX],
        "grad_nonfinite": totals[:, NANS] + totals[:, INFS],
        "grad_zero_fraction": totals[:, ZEROS] / np.maximum((present * rows.elements).sum(axis=1), 1),
    }
    some = present.any(axis=1) | (rows.elements.shape[1] == 0)
    return series if some.all() else {name: np.where(some, values, np.nan) for name, values in series.items()}


def parameter_infos(parameters: list[LocalParameter], optimizer: torch.optim.Optimizer | None) -> list[ParameterInfo]:
    """Return what each parameter is: name, shape, dtype, elements, and its group in the optimizer."""
    groups: dict[int, str] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer is not None else []):
        groups.update((id(parameter), str(group.get("name", index))) for parameter in group["params"])
    return [
        ParameterInfo(
            name=each.name,
            shape=each.shape,
            dtype=str(each.parameter.dtype).removeprefix("torch."),
            group=groups.get(id(each.parameter), ""),
            numel=math.prod(each.shape),
        )
        for each in parameters
    ]


def weight_moments(parameters: list[LocalParameter]) -> NDArray[np.float64]:
    """Return the moments of the parameters themselves, [T, 6]. Waits for the device."""
    plan = make_plan(parameters, "value")
    moments = np.full((len(parameters), len(COLUMNS)), math.nan)
    for of_device, row in zip(plan.members, plan.reduce(), strict=True):
        moments[of_device] = native.tensor_moments(row)
    return moments


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
