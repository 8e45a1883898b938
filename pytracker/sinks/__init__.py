"""Mirrors of a training in other tools: one small file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .csv import CSVSink
from .layers import Layers
from .mirrors import NoSinks, Sinks
from .mlflow import MLflowSink
from .sink import RunInfo, Sink, SinkLike, SinkRows, check_sinks
from .tensorboard import TensorBoardSink
from .trackio import TrackioSink
from .wandb import WandbSink

__all__ = [
    "SINKS",
    "CSVSink",
    "Layers",
    "MLflowSink",
    "NoSinks",
    "RunInfo",
    "Sink",
    "SinkLike",
    "SinkRows",
    "Sinks",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "check_sinks",
    "mirrors_of",
]

SINKS: dict[str, Callable[[], Sink]] = {
    "csv": CSVSink,
    "mlflow": MLflowSink,
    "tensorboard": TensorBoardSink,
    "trackio": TrackioSink,
    "wandb": WandbSink,
}
"""The sinks that can be given by name."""


def mirrors_of(sinks: Sequence[SinkLike], *, is_first: bool) -> NoSinks:
    """Return what gives ``sinks`` all that is recorded: nothing is made or opened unless this rank ``is_first``."""
    given: list[Any] = list(sinks) if is_first else []
    return Sinks([SINKS[sink] if isinstance(sink, str) else sink for sink in given]) if given else NoSinks()
