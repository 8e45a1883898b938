"""Other tools' logs, read into histories. No torch here.

``read_log(path)`` knows what Hugging Face's Trainer, Lightning, Keras, Ultralytics, detectron2, mmengine, W&B,
TensorBoard, MLflow and trackio write, any CSV file with a header, JSON lines, and lines of ``name: number``.
docs/reading-logs.md says what is recognised.
"""

from __future__ import annotations

from .reading import is_log, read_log

__all__ = ["is_log", "read_log"]
