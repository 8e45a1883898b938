"""Mirrors of a training in other tools: one small file each."""

from __future__ import annotations

from .csv import CSVSink
from .sink import Sink, Sinks

__all__ = ["CSVSink", "Sink", "Sinks"]
