"""What a Tracker is made of."""

from __future__ import annotations

from .arguments import check_arguments, explain_scalars, warn_of_untrained
from .closing import Closing
from .delivery import Delivery
from .gradient_watch import GradientWatch
from .late_metrics import LateMetrics
from .live_diagnosis import LiveDiagnosis
from .micro_batches import MicroBatches
from .model_watch import ModelWatch
from .origin_watch import OriginWatch
from .recorder import InMemoryRun, opened
from .series import facts_for_rules, parameter_infos, weight_moments

__all__ = [
    "Closing",
    "Delivery",
    "GradientWatch",
    "InMemoryRun",
    "LateMetrics",
    "LiveDiagnosis",
    "MicroBatches",
    "ModelWatch",
    "OriginWatch",
    "check_arguments",
    "explain_scalars",
    "facts_for_rules",
    "opened",
    "parameter_infos",
    "warn_of_untrained",
    "weight_moments",
]
