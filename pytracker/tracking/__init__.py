"""What a Tracker is made of."""

from __future__ import annotations

from .arguments import check_arguments, check_choices, checked_state, explain_scalars
from .closing import Closing
from .delivery import Delivery
from .gradient_watch import GradientWatch
from .in_graphs import InGraphs, graphed
from .lanes import Lane, Lanes
from .late_metrics import LateMetrics
from .live_diagnosis import LiveDiagnosis
from .origin_watch import OriginWatch
from .players import Players
from .recorder import InMemoryRun, opened
from .series import EXTRA_SERIES, GRADIENT_SERIES, facts_for_rules
from .weight_watch import WeightWatch
from .whose_steps import WhoseSteps

__all__ = [
    "EXTRA_SERIES",
    "GRADIENT_SERIES",
    "Closing",
    "Delivery",
    "GradientWatch",
    "InGraphs",
    "InMemoryRun",
    "Lane",
    "Lanes",
    "LateMetrics",
    "LiveDiagnosis",
    "OriginWatch",
    "Players",
    "WeightWatch",
    "WhoseSteps",
    "check_arguments",
    "check_choices",
    "checked_state",
    "explain_scalars",
    "facts_for_rules",
    "graphed",
    "opened",
]
