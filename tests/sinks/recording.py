"""Sinks that remember what they were given, and a training to mirror."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytracker import Tracker
from pytracker.sinks import RunInfo, SinkRows


class RecordingSink:
    """Keeps every call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.info: RunInfo | None = None

    def open(self, info: RunInfo) -> dict[str, Any]:
        self.info = info
        self.calls.append(("open", info.first_step))
        return {"id": "first"}

    def write(self, rows: SinkRows) -> None:
        self.calls.append(("write", list(rows)))

    def late(self, step: int, time: float, values: dict[str, float]) -> None:
        self.calls.append(("late", step, values))

    def parameters(self, interval: Any) -> None:
        self.calls.append(("parameters", interval.first_step, interval.last_step))

    def finding(self, finding: Any) -> None:
        self.calls.append(("finding", finding.rule))

    def truncate(self, step: int) -> None:
        self.calls.append(("truncate", step))

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self, error: str | None) -> None:
        self.calls.append(("close", error))

    def of(self, method: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == method]

    @property
    def steps(self) -> list[tuple[int, float, dict[str, float]]]:
        return [step for (rows,) in self.of("write") for step in rows]


def train(tracker: Tracker, model: nn.Module, steps: range) -> None:
    """Record steps whose gradients and losses follow from their numbers."""
    for step in steps:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, (step + index) / 7)
        tracker.step(loss=1 / (step + 1), rare=float(step) if step % 3 == 0 else None)


def crash(tracker: Tracker, model: nn.Module) -> None:
    """Record three steps and fail."""
    with tracker:
        train(tracker, model, range(3))
        raise ZeroDivisionError("by design")
