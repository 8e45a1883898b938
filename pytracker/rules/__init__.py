"""The rules that come with pytracker, a family each file. Importing them registers them, in this order."""

from __future__ import annotations

from . import loss as loss  # isort: skip
from . import spikes as spikes  # isort: skip
from . import validation as validation  # isort: skip
from . import gradients as gradients  # isort: skip
from . import layers as layers  # isort: skip
from . import optimizer as optimizer  # isort: skip
from . import settings as settings  # isort: skip
from .updates import typical_update, update_ratios

__all__ = ["typical_update", "update_ratios"]
