"""Keras on torch: a callback.

model.fit(x, y, callbacks=[PytrackerCallback(run="runs")])
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..errors import InvalidValueError, MissingExtraError
from ..tracker import Tracker
from .metrics import loggable

if find_spec("keras") is None:
    raise MissingExtraError("pytracker.integrations.keras", "keras", "keras")
import keras


class PytrackerCallback(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]  # Any where keras has no types
    """Records every batch of ``fit``: the gradients before Keras clips them, the batch's own loss, the learning rate.

    At the end of an epoch its metrics are recorded, validation's too. An optimizer with
    ``gradient_accumulation_steps`` adds gradients up where nobody sees it: each batch's own is recorded.

    Args:
        options: those of ``Tracker``: ``run``, ``sinks``, ``every``, ...

    Raises:
        InvalidValueError: when training begins, Keras runs on another backend than torch.

    Attributes:
        tracker: the tracker; None until training begins. Another ``fit`` goes on counting.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tracker: Tracker | None = None
        self._options = options
        self._loss: Any = None
        self._rate: Any = None
        self._scale: Any = None
        self._compute_loss: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Make the tracker, and listen for the loss of each batch."""
        if keras.backend.backend() != "torch":
            raise InvalidValueError(
                f"Keras runs on {keras.backend.backend()!r}; pytracker reads the gradients of torch: set "
                "KERAS_BACKEND=torch before Keras is imported"
            )
        self._compute_loss = self.model.compute_loss
        self.model.compute_loss = self._keep_loss

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note the learning rate and the loss scale that the batch is trained with."""
        optimizer = self.model.optimizer
        self._rate = _copy(optimizer.learning_rate)
        factor = getattr(optimizer, "dynamic_scale", None)
        self._scale = _copy(optimizer.loss_scale_factor if factor is None else factor)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Record the batch."""
        if self.tracker is None:  # now, and not before: a model may be built by its first batch
            self.tracker = Tracker(
                [(variable.path, variable.value) for variable in self.model.trainable_variables], **self._options
            )
        if not self.tracker.closed:
            self.tracker.step(loss=self._loss, lr=self._rate, grad_scale=self._scale)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """End an epoch, with its metrics; its mean loss follows from the batches'."""
        if self.tracker is not None and not self.tracker.closed:
            self.tracker.epoch(**loggable(logs or {}, leave_out=["loss"]))

    def on_train_end(self, logs: Any = None) -> None:
        """Bring everything home."""
        self.model.compute_loss = self._compute_loss
        if self.tracker is not None and not self.tracker.closed:
            self.tracker.flush()

    def close(self) -> None:
        """Close the tracker, and with it the run; the end of the program does so too."""
        if self.tracker is not None:
            self.tracker.close()

    def _keep_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = self._compute_loss(*arguments, **named)
        if named.get("training", True):
            self._loss = loss.detach()
        return loss


def _copy(value: Any) -> Any:
    """Return what a variable of Keras holds now: it is changed in place. Numbers and None as they are."""
    value = getattr(value, "value", value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
