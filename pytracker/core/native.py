"""The native core or its stand-in: every module above takes plans, step logs and operators from here.

The core is compiled against one version of torch. Where it is missing or does not load, the reference implementation
in plain torch does the same work more slowly, and a warning says so once, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import reference
from .._checks import writable
from ..columns import COLUMNS, EXTRAS, MAX_SCALARS, METER_COLUMNS, TOTALS
from ..contract import Clip, Core, ModuleWatch, Plan, StepLog, StepReader
from ..errors import ParameterError
from . import cuda

_CONTRACT = {
    "COLUMNS": list(COLUMNS),
    "EXTRAS": list(EXTRAS),
    "TOTALS": TOTALS,
    "METER_COLUMNS": len(METER_COLUMNS),
    "MAX_SCALARS": MAX_SCALARS,
    "RENEW": reference.RENEW,
    "CAPTURED": reference.CAPTURED,
}
"""What the native core must say of itself: numbers that both sides have to know."""


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return the native core and "", or None and the reason why it is not there."""
    info = cuda.build_info()
    if not info:
        return None, "there is no record of a build; install pytracker again"
    if not info.get("built"):
        return None, str(info.get("reason"))
    if _release(str(info.get("torch"))) != _release(torch.__version__):  # it might load all the same, and crash later
        return None, (
            f"it was built for torch {info.get('torch')} and this is torch {torch.__version__}. {cuda.REINSTALL}"
        )
    try:
        core = importlib.import_module("pytracker._C")
    except ImportError as error:
        return None, str(error)
    for name, expected in _CONTRACT.items():
        found = getattr(core, name, None)
        if found != expected:
            return None, (
                f"it was compiled from another version of the sources: {name} is {found} there and {expected} here; "
                "reinstall"
            )
    return core, ""


def _release(version: str) -> str:
    """Return a version without what kind of build it is: one core serves torch for the CPU and for each CUDA."""
    return version.partition("+")[0]


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _core_for(tensors: Sequence[Tensor]) -> Core:
    """Return the module whose classes can read these tensors: the native core, or the reference."""
    core, reason = load()
    if core is None:
        _warn_once(f"pytracker runs without its native core, more slowly: {reason}. `pytracker doctor` says more.")
        return reference
    devices = {tensor.device for tensor in tensors if not tensor.is_meta}
    return as_core(core) if all(is_native(core, device) for device in devices) else reference


def as_core(module: ModuleType) -> Core:
    """Return the native core as what it is; a test compares it with the protocols."""
    return cast(Core, module)


def is_native(core: ModuleType, device: torch.device) -> bool:
    """Whether the native core can read what lies on a device. Of a CUDA device that it cannot, it is said why."""
    if device.type != "cuda":
        return bool(core.has_backend(device.type))
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = cuda.reason_without_kernels(index)
    if reason:
        _warn_once(
            f"pytracker reads the gradients on cuda:{index} ({torch.cuda.get_device_name(index)}) with plain torch, "
            f"which takes many operations for each tensor: {reason}. `pytracker doctor` says more."
        )
    return not reason


def make_plan(
    parameters: Sequence[Tensor],
    names: Sequence[str],
    source: str = "gradient",
    windows: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Return a plan for reducing the gradients of ``parameters``, or with source="value" the parameters themselves.

    ``windows``: for each, the offset and the length of what is read of it where it is one of several in a flat tensor;
    a length of -1 reads all. None: all of every parameter.

    Raises:
        ParameterError: a parameter that is trained has no data (the meta device).
    """
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.is_meta and parameter.requires_grad and source != "value":
            raise ParameterError(
                f"parameter {name!r} is on the meta device and has no data; materialize the model first "
                "(model.to_empty(device=...) and load its weights)"
            )
    return _core_for(parameters).Plan(list(parameters), list(map(writable, names)), source, list(windows))


def outside_of_transforms() -> Any:
    """Return a context in which nothing that is made is wrapped, within torch.func.grad and the like too."""
    return torch._C._DisableFuncTorch()


def make_step_log(plan: Plan, capacity: int, slots: int, *, extras: bool = False) -> StepLog:
    """Return a log of at most ``capacity`` undrained rows, with ``slots`` scalars a row, beside the plan's tensors.

    ``extras``: each row has the further columns of every tensor, too.
    """
    with outside_of_transforms():
        return _module_of(plan).StepLog(plan, capacity, slots, extras)


def make_reader(
    plan: Plan, optimizer: Any, name_groups: Callable[[list[dict[str, Any]]], list[str]], reserved: set[str]
) -> StepReader:
    """Return what turns the keywords of a step and the optimizer's learning rates into scalars of a log.

    ``name_groups`` names the series of each parameter group. A keyword may have none of these names, nor one that is in
    ``reserved`` when it is first given.
    """
    if optimizer is not None:
        reserved.add("lr")
    return _module_of(plan).StepReader(optimizer, name_groups, reserved)


def make_clip(
    plan: Plan,
    order: float,
    max_norm: float | Tensor,
    outcome: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Clip:
    """Return what a step log of this plan can decide on: the tensors lie where the plan's first device is.

    ``outcome``, float64 [2], gets the total norm of order 2 or inf, and the factor min(1, max_norm / (norm + 1e-6));
    ``grad_scale`` gets 1 / factor and ``found_inf`` 1 where the norm is not finite, both float32. A ``max_norm`` that
    is a tensor, float64 [1], is read on the device.
    """
    return _module_of(plan).Clip(order, max_norm, outcome, grad_scale, found_inf)


def watch_module(model: torch.nn.Module) -> ModuleWatch:
    """Return a watch with ``unchanged(model)``: whether the modules and parameters are still the same."""
    core, _ = load()
    return (reference if core is None else as_core(core)).ModuleWatch(model)


def tensor_moments(row: Tensor) -> NDArray[np.float64]:
    """Return the moments of each tensor of a row, float64 [T, 6] on the host. Waits for the device."""
    return row.cpu().numpy()[TOTALS:].reshape(-1, len(COLUMNS)).astype(np.float64)


def _module_of(plan: Plan) -> Core:
    core, _ = load()
    return as_core(core) if core is not None and isinstance(plan, core.Plan) else reference
