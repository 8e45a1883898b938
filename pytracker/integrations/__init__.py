"""Adapters to trainers: ``transformers``, ``lightning``, ``accelerate`` and ``keras``, one module each.

Each imports its trainer's package, so import the module that you need::

    from pytracker.integrations.transformers import track
    from pytracker.integrations.lightning import PytrackerCallback
"""

from __future__ import annotations

__all__: list[str] = []
