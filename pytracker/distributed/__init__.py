"""What ranks do together: merging, checks of copies, drift, the noise scale."""

from __future__ import annotations

from .noise_scale import NOISE_SERIES, GradientNoiseScale
from .row_merger import Receive
from .team import team_of

__all__ = [
    "NOISE_SERIES",
    "GradientNoiseScale",
    "Receive",
    "team_of",
]
