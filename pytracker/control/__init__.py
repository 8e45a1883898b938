"""What a training does about its gradients: clipping."""

from __future__ import annotations

from .clipping import clip_grad_norm_

__all__ = [
    "clip_grad_norm_",
]
