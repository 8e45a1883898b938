"""The native core's contract in plain torch: the oracle of its tests, and what serves where there is no kernel."""

from __future__ import annotations

from .log import Clip, StepLog, StepReader
from .plan import (
    CAPTURED,
    DTYPES,
    RENEW,
    ModuleWatch,
    Plan,
    number_in,
    root,
)

__all__ = [
    "CAPTURED",
    "DTYPES",
    "RENEW",
    "Clip",
    "ModuleWatch",
    "Plan",
    "StepLog",
    "StepReader",
    "number_in",
    "root",
]
