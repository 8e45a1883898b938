"""Warnings that point at the user's line, however deep in pytracker they are raised."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
# What torch puts around a function that torch.compile leaves alone.
_WRAPPERS = (os.path.join("torch", "_dynamo", ""), os.path.join("torch", "_compile.py"))


def warn_user(message: str) -> None:
    """Warn (RuntimeWarning) at the innermost line outside pytracker."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _is_inside(file: str) -> bool:
    return file.startswith(_PACKAGE) or any(wrapper in file for wrapper in _WRAPPERS)
