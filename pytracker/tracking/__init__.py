"""What a Tracker is made of."""

from __future__ import annotations

from .arguments import check_arguments, check_by_name, explain_scalars, warn_of_strangers
from .epoch_means import EpochMeans
from .live_diagnosis import LiveDiagnosis
from .model_watch import ModelWatch
from .recorder import InMemoryRun, opened
from .series import facts_for_rules, gradient_series, parameter_infos, warned_of_no_gradients, weight_moments

__all__ = [
    "EpochMeans",
    "InMemoryRun",
    "LiveDiagnosis",
    "ModelWatch",
    "check_arguments",
    "check_by_name",
    "explain_scalars",
    "facts_for_rules",
    "gradient_series",
    "opened",
    "parameter_infos",
    "warn_of_strangers",
    "warned_of_no_gradients",
    "weight_moments",
]
