"""What a training does about its gradients: clipping, by a constant or by the norms so far, skipping, locating NaN."""

from __future__ import annotations

from .clipping import clip_grad_norm_
from .in_backward import ReadInBackward
from .loss_scale import LossScale
from .nonfinite import NonfiniteOrigin, NonfiniteSearch, locate_nonfinite
from .optimizers import unwrapped
from .rules import AGC, AutoClip, ClipRule, MaxNorm, ZClip
from .sources import GradientSource
from .steering import CLIP_SERIES, Steering

__all__ = [
    "AGC",
    "CLIP_SERIES",
    "AutoClip",
    "ClipRule",
    "GradientSource",
    "LossScale",
    "MaxNorm",
    "NonfiniteOrigin",
    "NonfiniteSearch",
    "ReadInBackward",
    "Steering",
    "ZClip",
    "clip_grad_norm_",
    "locate_nonfinite",
    "unwrapped",
]
