"""From tensors to moments: the native core, its stand-in, plans, and the device log."""

from __future__ import annotations

from . import native
from .device_log import FIRST_SLOTS, DeviceLog, Rows, checked_interval
from .plans import Planned, Target, held_by, make_plan, norms_of_known, plan_for
from .reference import total_moments
from .shards import Held, held, held_in

__all__ = [
    "FIRST_SLOTS",
    "DeviceLog",
    "Held",
    "Planned",
    "Rows",
    "Target",
    "checked_interval",
    "held",
    "held_by",
    "held_in",
    "make_plan",
    "native",
    "norms_of_known",
    "plan_for",
    "total_moments",
]
