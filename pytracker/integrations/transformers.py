"""The Trainer of Hugging Face transformers, and those that inherit it (TRL's).

No callback of the Trainer comes between backward and the clip: ``on_pre_optimizer_step`` sees clipped gradients. So the
step is recorded at the end of ``training_step``, where the Trainer is about to clip and to step the optimizer::

    trainer = Trainer(model, args, train_dataset=data)
    tracking = track(trainer, run="runs")
    trainer.train()
    tracking.close()
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from ..errors import InvalidTypeError, MissingExtraError, in_words
from ..tracker import Tracker
from .metrics import loggable

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("pytracker.integrations.transformers", "transformers", "transformers") from error

_OF_THE_TRAINER = ("loss", "grad_norm", "learning_rate", "epoch")
"""What the Trainer logs and the tracker records on every step, or under its own name."""

_REINFORCED = ("GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer")
"""Those of TRL whose loss is not meant to fall."""

_OF_TIMING = ("_runtime", "_per_second", "_model_preparation_time")


class Tracking(TrainerCallback):  # type: ignore[misc, unused-ignore]  # Any where transformers has no types
    """What joins a Trainer and a tracker. ``track`` makes it.

    Attributes:
        tracker: the tracker; None until training begins.
    """

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self.tracker: Tracker | None = None
        self._trainer, self._options = trainer, options
        self._loss: torch.Tensor | None = None  # of the micro-batches since the last step
        self._is_training = False
        self._training_step, self._train = trainer.training_step, trainer.train
        trainer.training_step, trainer.train = self._tracked_step, self._tracked_train
        trainer.add_callback(self)

    def close(self, error: str | None = None) -> None:
        """Close the tracker, and with it the run. The Trainer goes on as before; more than once is fine."""
        if self.tracker is not None:
            self.tracker.close(error=error)

    def __enter__(self) -> Tracking:
        """Return what ``track`` returned."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; with the error that leaves the block."""
        self.close(None if error is None else in_words(error))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the tracker where there is none, and go to the Trainer's step."""
        if self.tracker is None or self.tracker.closed:
            self.tracker = Tracker(_trained(self._trainer), **self._all_options(args))
        # The Trainer starts over after a failed try of `auto_find_batch_size`. A second `train()` goes on counting.
        begins_again = self._is_training or state.global_step
        if begins_again and state.global_step != self.tracker.steps:
            self.tracker.load_state_dict({"steps": state.global_step, "epochs": int(state.epoch or 0)})
        self._loss, self._is_training = None, True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Record what the Trainer or its heirs log, evaluations above all, at the latest step."""
        is_summary = "train_runtime" in (logs or {})
        if self._is_open and logs and not is_summary:
            timing = [name for name in logs if name.endswith(_OF_TIMING)]
            self.tracker.log(**loggable(logs, leave_out=(*_OF_THE_TRAINER, *timing)))  # type: ignore[union-attr]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End an epoch of the tracker."""
        if self._is_open:
            self.tracker.epoch()  # type: ignore[union-attr]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring everything home. An ``evaluate()`` that comes later is recorded still."""
        self._is_training = False
        if self._is_open:
            self.tracker.flush()  # type: ignore[union-attr]

    @property
    def _is_open(self) -> bool:
        return self.tracker is not None and not self.tracker.closed

    def _tracked_step(self, *arguments: Any, **named: Any) -> Any:
        loss = self._training_step(*arguments, **named)
        if self._is_open:
            self._loss = loss if self._loss is None else self._loss + loss
            if self._trainer.accelerator.sync_gradients:
                scaler = self._trainer.accelerator.scaler
                self.tracker.step(loss=self._loss, grad_scale=getattr(scaler, "_scale", None))  # type: ignore[union-attr]
                self._loss = None
        return loss

    def _tracked_train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return self._train(*arguments, **named)
        except BaseException as error:
            self._is_training = False
            self.close(in_words(error))
            raise

    def _all_options(self, args: Any) -> dict[str, Any]:
        meta: dict[str, Any] = {"scheduler": str(getattr(args.lr_scheduler_type, "value", "")) != "constant"}
        if args.max_grad_norm:
            meta["clip_threshold"] = float(args.max_grad_norm)
        if any(each.__name__ in _REINFORCED for each in type(self._trainer).__mro__):
            meta["objective"] = "reinforcement"
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)  # Accelerate wraps it
        given = {"optimizer": optimizer, **self._options}
        return {**given, "meta": {**meta, **(self._options.get("meta") or {})}}


def track(trainer: Any, **options: Any) -> Tracking:
    """Record every step of a Trainer: the gradients before the clip, its loss, its evaluations.

    ``loss`` is what the Trainer adds up for its own log: of all micro-batches of a step, on this rank. Evaluations and
    whatever else is logged are recorded at the latest step, also after the end of training. Resumed from a checkpoint,
    steps go on from its ``global_step``; ``run=Run(name=..., resume=True)`` continues the run.

    Args:
        trainer: a ``transformers.Trainer``, or one of a class that inherits it.
        options: those of ``Tracker``: ``run``, ``sinks``, ``every``, ...

    Returns:
        What has the ``tracker``, and closes it: ``close()``, or a ``with`` block. A training that fails closes it, and
        so does the end of the program.

    Raises:
        InvalidTypeError: ``trainer`` is no Trainer.

    Example::

        with track(trainer, run=Run(config=args.to_dict()), sinks=["tensorboard"]) as tracking:
            trainer.train()
            trainer.evaluate()
        print(tracking.tracker.findings)
    """
    if not hasattr(trainer, "training_step") or not hasattr(trainer, "add_callback"):
        raise InvalidTypeError(
            f"trainer is {trainer!r:.80}, of type {type(trainer).__name__}; expected a transformers.Trainer"
        )
    return Tracking(trainer, options)


class TrackedTrainerMixin:
    """``track`` for a Trainer class: the options of ``Tracker`` are the attribute ``tracker_options``.

    Example::

        class MyTrainer(TrackedTrainerMixin, Trainer):
            tracker_options = {"run": "runs", "sinks": ["tensorboard"]}

        trainer = MyTrainer(model, args, train_dataset=data)
        trainer.train()
        trainer.tracking.close()
    """

    tracker_options: dict[str, Any] = {}  # noqa: RUF012 - a subclass replaces it

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.tracking = track(self, **self.tracker_options)


def _trained(trainer: Any) -> torch.nn.Module:
    """Return the model whose gradients are to be read: DDP's and FSDP's wrapper says how ranks share it."""
    wrapped = trainer.model_wrapped
    model: torch.nn.Module = trainer.model if isinstance(wrapped, torch.nn.DataParallel) else wrapped
    return model
