"""The command line: `pytracker VERB`. Torch is imported by the verbs that need it."""

from __future__ import annotations

from .verbs import main

__all__ = ["main"]
