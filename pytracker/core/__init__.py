"""From tensors to moments: the native core, plans, and the device log."""

from __future__ import annotations

from . import native, operators
from .device_log import FIRST_SLOTS, DeviceLog, name_rates
from .plans import (
    PlannedParameters,
    Target,
    TrackedParameters,
    are_gradients,
    make_plan,
    norms_of_known,
    parameters_of,
    planned,
    planned_gradients,
    track,
    watchable,
)
from .rows import Rows, joined
from .shards import LocalParameter, ParameterLayout, local_parameter, parameters_of_module

__all__ = [
    "FIRST_SLOTS",
    "DeviceLog",
    "LocalParameter",
    "ParameterLayout",
    "PlannedParameters",
    "Rows",
    "Target",
    "TrackedParameters",
    "are_gradients",
    "joined",
    "local_parameter",
    "make_plan",
    "name_rates",
    "native",
    "norms_of_known",
    "operators",
    "parameters_of",
    "parameters_of_module",
    "planned",
    "planned_gradients",
    "track",
    "watchable",
]
