"""From rows to named series, and from a model to what a run says of its parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..columns import ABS_MAX, EXTRAS, INFS, MAX_SUM_SQ_TOTAL, NANS, SUM_SQ, ZEROS
from ..control import unwrapped
from ..core import LocalParameter, Rows
from ..diagnostics import Diagnosis
from ..history import ParameterInfo
from ..moments import is_missing

GRADIENT_SERIES: Final = ("grad_norm", "grad_max", "grad_abs_max", "grad_nonfinite", "grad_zero_fraction")
"""What is recorded of the gradients on every step, besides the scalars given and the learning rates."""

EXTRA_SERIES: Final = {name: "grad_l1" if name == "l1" else f"grad_{name}_fraction" for name in EXTRAS}
"""By the name of a further column what is recorded of it on every step: the sum, or the share of all elements."""


def gradient_series(rows: Rows, extras: Collection[str] = ()) -> dict[str, NDArray[np.float64]]:
    """Return what is recorded of the gradients on every step, each [n]; NaN where no parameter had a gradient.

    Of the further columns, those of ``extras``.
    """
    if not rows.has_gradients:  # what ranks have merged is on the first of them
        return {}
    totals, present = rows.totals, ~is_missing(rows.tensors)
    elements = (present * rows.elements).sum(axis=1)
    series = {
        "grad_norm": np.sqrt(totals[:, SUM_SQ]),
        "grad_max": np.sqrt(totals[:, MAX_SUM_SQ_TOTAL]),
        "grad_abs_max": totals[:, ABS_MAX],
        "grad_nonfinite": totals[:, NANS] + totals[:, INFS],
        "grad_zero_fraction": totals[:, ZEROS] / np.maximum(elements, 1),
    }
    if rows.extras is not None:
        sums = np.where(present[:, :, None], rows.extras, 0).sum(axis=1).T
        sums[1:] /= np.maximum(elements, 1)
        series |= {EXTRA_SERIES[name]: sums[EXTRAS.index(name)] for name in extras}
    some = present.any(axis=1) | (rows.elements.shape[1] == 0)
    return series if some.all() else {name: np.where(some, values, np.nan) for name, values in series.items()}


def parameter_infos(parameters: list[LocalParameter], optimizers: Mapping[str, Any]) -> list[ParameterInfo]:
    """Return what each parameter is: name, shape, dtype, elements, and its group in an optimizer.

    ``optimizers``: by what the names of their groups begin with; None for none.
    """
    groups: dict[int, str] = {}
    for prefix, optimizer in optimizers.items():
        for index, group in enumerate(optimizer.param_groups if optimizer is not None else []):
            name = prefix + str(group.get("name", index))
            groups.update((id(parameter), name) for parameter in group["params"])
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


def facts_for_rules(
    of_optimizers: dict[str, Any],
    parameters: list[LocalParameter],
    infos: list[ParameterInfo],
    diagnosis: Diagnosis | None,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what is noted in a run's meta for the rules.

    What there is of optimizers, of parameters that are frozen, and of the rules and settings where others were noted.
    """
    changed = diagnosis.changed if diagnosis is not None else {}
    differs = changed != (known.get("diagnosis") or {})
    frozen = {"frozen": _frozen_ranges(parameters, infos)}
    return of_optimizers | frozen | ({"diagnosis": changed or None} if differs else {})


def facts_of_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return what the rules know of the optimizer: name, kind, and momentum where it has one."""
    if optimizer is None:
        return {"optimizer": None}
    inner = unwrapped(optimizer)
    momentum = inner.param_groups[0].get("momentum") if inner.param_groups else None
    facts = {"optimizer": type(inner).__name__, "optimizer_kind": _kind(inner)}
    return facts | ({"momentum": float(momentum)} if momentum else {})


def _kind(optimizer: Any) -> str:
    """Return "adaptive" where elements move by about the learning rate, "plain" for SGD, "" for others.

    By the classes that it is made of, and by what its groups can be set to: copies of Adam have betas, too.
    """
    classes = [each.__name__.lower() for each in type(optimizer).__mro__]
    options = optimizer.param_groups[0].keys() if optimizer.param_groups else ()
    if any(name in each for each in classes for name in ("adafactor", "lamb", "lars", "adagrad", "adadelta")):
        return ""
    if any(name in each for each in classes for name in ("adam", "rmsprop", "lion")) or {"betas", "lr"} <= set(options):
        return "adaptive"
    return "plain" if any("sgd" in each for each in classes) or {"dampening", "lr"} <= set(options) else ""


def _frozen_ranges(parameters: list[LocalParameter], infos: list[ParameterInfo]) -> list[list[int]]:
    """Return which of ``infos`` require no gradient, as ranges of their places: [[start, stop], ...]."""
    frozen = {each.name for each in parameters if not each.parameter.requires_grad}
    ranges: list[list[int]] = []
    for place, info in enumerate(infos):
        if info.name not in frozen:
            continue
        if ranges and ranges[-1][1] == place:
            ranges[-1][1] += 1
        else:
            ranges.append([place, place + 1])
    return ranges
