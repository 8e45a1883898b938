"""Every gradient statistic of every training step, for the price of reading the gradients once.

Three lines in a training loop::

    with pytracker.Tracker(model, optimizer=optimizer) as tracker:
        ...
        loss.backward()
        tracker.step(loss=loss)

Names are imported when they are first used, so that reading a run needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .diagnostics import Finding as Finding
    from .diagnostics import diagnose as diagnose
    from .errors import PytrackerError as PytrackerError
    from .gradients import GradientStats as GradientStats
    from .gradients import clip_grad_norm_ as clip_grad_norm_
    from .gradients import compute_gradient_stats as compute_gradient_stats
    from .gradients import gradient_stats as gradient_stats
    from .history import History as History
    from .meters import AverageMeter as AverageMeter
    from .meters import GradientMeter as GradientMeter
    from .noise_scale import GradientNoiseScale as GradientNoiseScale
    from .store import Run as Run
    from .store import list_runs as list_runs
    from .store import load_run as load_run
    from .tracker import Tracker as Tracker

__version__ = "0.1.0"

_HOMES = {
    "AverageMeter": "meters",
    "Finding": "diagnostics",
    "GradientMeter": "meters",
    "GradientNoiseScale": "noise_scale",
    "GradientStats": "gradients",
    "History": "history",
    "PytrackerError": "errors",
    "Run": "store",
    "Tracker": "tracker",
    "clip_grad_norm_": "gradients",
    "compare": "comparison",
    "compute_gradient_stats": "gradients",
    "diagnose": "diagnostics",
    "gradient_stats": "gradients",
    "list_runs": "store",
    "load_run": "store",
}

__all__ = [
    "AverageMeter",
    "Finding",
    "GradientMeter",
    "GradientNoiseScale",
    "GradientStats",
    "History",
    "PytrackerError",
    "Run",
    "Tracker",
    "clip_grad_norm_",
    "compare",
    "compute_gradient_stats",
    "diagnose",
    "gradient_stats",
    "list_runs",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pytracker' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
