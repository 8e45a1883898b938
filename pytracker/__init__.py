"""Every gradient statistic of every training step, for the price of reading the gradients once.

Three lines in a training loop::

    with pytracker.Tracker(model, optimizer=optimizer) as tracker:
        ...
        loss.backward()
        tracker.step(loss=loss)

Names are imported when they are first used, so that reading a run needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import attach

if TYPE_CHECKING:
    from .control import AGC as AGC
    from .control import AutoClip as AutoClip
    from .control import ClipRule as ClipRule
    from .control import MaxNorm as MaxNorm
    from .control import ZClip as ZClip
    from .control import clip_grad_norm_ as clip_grad_norm_
    from .control import locate_nonfinite as locate_nonfinite
    from .diagnostics import Diagnosis as Diagnosis
    from .diagnostics import Finding as Finding
    from .diagnostics import diagnose as diagnose
    from .distributed import GradientNoiseScale as GradientNoiseScale
    from .errors import ClosedError as ClosedError
    from .errors import InvalidTypeError as InvalidTypeError
    from .errors import InvalidValueError as InvalidValueError
    from .errors import LayoutError as LayoutError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import ParameterError as ParameterError
    from .errors import PytrackerError as PytrackerError
    from .errors import RankMismatchError as RankMismatchError
    from .errors import RunFormatError as RunFormatError
    from .errors import RunLockedError as RunLockedError
    from .errors import RunNotFoundError as RunNotFoundError
    from .errors import SeriesIndexError as SeriesIndexError
    from .errors import StoreError as StoreError
    from .gradients import GradientStats as GradientStats
    from .gradients import compute_gradient_stats as compute_gradient_stats
    from .gradients import gradient_stats as gradient_stats
    from .history import History as History
    from .logs import read_log as read_log
    from .meters import AverageMeter as AverageMeter
    from .meters import GradientMeter as GradientMeter
    from .sinks import CSVSink as CSVSink
    from .store import Run as Run
    from .store import list_runs as list_runs
    from .store import load_run as load_run
    from .tracker import Tracker as Tracker
    from .view import compare as compare
    from .view import report as report

__version__ = "0.1.0"

_HOMES = {
    "AGC": "control",
    "AutoClip": "control",
    "ClipRule": "control",
    "MaxNorm": "control",
    "ZClip": "control",
    "AverageMeter": "meters",
    "CSVSink": "sinks",
    "ClosedError": "errors",
    "Diagnosis": "diagnostics",
    "Finding": "diagnostics",
    "GradientMeter": "meters",
    "GradientNoiseScale": "distributed",
    "GradientStats": "gradients",
    "History": "history",
    "InvalidTypeError": "errors",
    "InvalidValueError": "errors",
    "LayoutError": "errors",
    "MissingExtraError": "errors",
    "ParameterError": "errors",
    "PytrackerError": "errors",
    "RankMismatchError": "errors",
    "Run": "store",
    "RunFormatError": "errors",
    "RunLockedError": "errors",
    "RunNotFoundError": "errors",
    "SeriesIndexError": "errors",
    "StoreError": "errors",
    "Tracker": "tracker",
    "clip_grad_norm_": "control",
    "compare": "view",
    "compute_gradient_stats": "gradients",
    "diagnose": "diagnostics",
    "gradient_stats": "gradients",
    "list_runs": "store",
    "load_run": "store",
    "locate_nonfinite": "control",
    "read_log": "logs",
    "report": "view",
}

__all__ = [
    "AGC",
    "AutoClip",
    "AverageMeter",
    "CSVSink",
    "ClipRule",
    "ClosedError",
    "Diagnosis",
    "Finding",
    "GradientMeter",
    "GradientNoiseScale",
    "GradientStats",
    "History",
    "InvalidTypeError",
    "InvalidValueError",
    "LayoutError",
    "MaxNorm",
    "MissingExtraError",
    "ParameterError",
    "PytrackerError",
    "RankMismatchError",
    "Run",
    "RunFormatError",
    "RunLockedError",
    "RunNotFoundError",
    "SeriesIndexError",
    "StoreError",
    "Tracker",
    "ZClip",
    "clip_grad_norm_",
    "compare",
    "compute_gradient_stats",
    "diagnose",
    "gradient_stats",
    "list_runs",
    "load_run",
    "locate_nonfinite",
    "read_log",
    "report",
]

__getattr__, __dir__ = attach(__name__, _HOMES)
