"""What ranks do together: groups, merging, checks of copies, drift, the noise scale."""

from __future__ import annotations

from .noise_scale import NOISE_SERIES, GradientNoiseScale
from .ranks import group_named
from .shard_moments import merge_shards
from .team import team_of

__all__ = [
    "NOISE_SERIES",
    "GradientNoiseScale",
    "group_named",
    "merge_shards",
    "team_of",
]
