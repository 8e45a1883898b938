"""From tensors to moments: the native core, its stand-in, plans, and the device log."""

from __future__ import annotations

from . import native
from .device_log import FIRST_SLOTS, DeviceLog, Rows
from .plans import (
    Target,
    TrackedParameters,
    are_gradients,
    make_plan,
    norms_of_known,
    parameters_of,
    plan_for,
    plan_for_gradients,
    watchable,
)
from .shards import LocalParameter, local_parameter, parameters_of_module

__all__ = [
    "FIRST_SLOTS",
    "DeviceLog",
    "LocalParameter",
    "Rows",
    "Target",
    "TrackedParameters",
    "are_gradients",
    "local_parameter",
    "make_plan",
    "native",
    "norms_of_known",
    "parameters_of",
    "parameters_of_module",
    "plan_for",
    "plan_for_gradients",
    "watchable",
]
