"""Lightning, under both of its names: a callback that records every step, and a logger that writes runs.

    trainer = Trainer(callbacks=[PytrackerCallback(run="runs")])

The gradients are read in ``on_before_optimizer_step``: once a step of the optimizer, whatever is accumulated, unscaled,
and before Lightning clips them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import InvalidValueError, MissingExtraError, in_words
from ..store import Run
from ..tracker import Tracker
from .metrics import loggable


def _lightning() -> Any:
    """Return the package of Lightning that the program uses; of two that are installed, the one that is loaded.

    Raises:
        MissingExtraError: neither is installed.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    installed = [name for name in names if find_spec(name.partition(".")[0]) is not None]
    if not installed:
        raise MissingExtraError("pytracker.integrations.lightning", "lightning", "lightning")
    return import_module((loaded or installed)[0])


_pl: Any = _lightning()
_rank_zero_only: Any = _pl.utilities.rank_zero_only


class PytrackerCallback(_pl.Callback):  # type: ignore[misc]
    """Records every step of every optimizer: gradients before the clip, the loss, what validation logs.

    ``loss`` is what the step minimises: the mean over its micro-batches, on this rank. What is logged in validation is
    recorded at the latest step. The step is in the trainer's checkpoints; ``run=Run(name=..., resume=True)`` continues
    the run of a training that goes on from one.

    Several optimizers are players of one run, each called as the part of the module whose parameters it has
    (``generator/grad_norm``), or by its number. In manual optimization, what you clip before ``optimizer.step`` is
    recorded clipped.

    Args:
        options: those of ``Tracker``: ``run``, ``sinks``, ``every``, ... With a ``PytrackerLogger`` on the trainer, its
            run is the default.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._tracker: Tracker | None = None
        self._players: list[str | None] = []  # whose each optimizer is; None where there is only one
        self._loss: torch.Tensor | None = None  # of the micro-batches since the last step
        self._state: dict[str, Any] | None = None
        self._before: dict[str, Any] = {}  # what had been logged when validation began
        self._logger: PytrackerLogger | None = None

    @property
    def tracker(self) -> Tracker:
        """The tracker.

        Raises:
            InvalidValueError: training has not begun.
        """
        if self._tracker is None:
            raise InvalidValueError("there is no tracker yet; it is made when training begins")
        return self._tracker

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and epochs of the tracker, for a checkpoint."""
        return {} if self._tracker is None else {"tracker": self._tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says until training begins."""
        self._state = state_dict.get("tracker")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the tracker, of the model as the strategy has wrapped it."""
        if self._tracker is None or self._tracker.closed:
            self._logger = next((each for each in trainer.loggers if isinstance(each, PytrackerLogger)), None)
            self._tracker = self._made(trainer, pl_module)
        if self._state is not None:
            self._tracker.load_state_dict(self._state)
        self._state = self._loss = None

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Add up the loss."""
        value = loss.detach()
        self._loss = value if self._loss is None else self._loss + value

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Record a step of this optimizer."""
        place = next((i for i, each in enumerate(trainer.optimizers) if each is optimizer), 0)
        self.tracker.step(only=self._players[place], loss=self._loss)
        self._loss = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note what has been logged before."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record what validation has logged, unless the logger does."""
        if trainer.sanity_checking or self._logger is not None:
            return
        logged = {
            name: value for name, value in trainer.callback_metrics.items() if value is not self._before.get(name)
        }
        if self._is_open:
            self.tracker.log(**loggable(logged))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End an epoch of the tracker."""
        if self._is_open:
            self.tracker.epoch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close with the error: the run has failed."""
        if self._tracker is not None:
            self._tracker.close(error=in_words(exception))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close at the end of ``fit``; with a ``PytrackerLogger`` its run stays open, for a test that is to come."""
        if stage != "fit" or not self._is_open:
            return
        if self._logger is None:
            self.tracker.close()
        else:
            self.tracker.flush()

    @property
    def _is_open(self) -> bool:
        return self._tracker is not None and not self._tracker.closed

    def _made(self, trainer: Any, pl_module: torch.nn.Module) -> Tracker:
        options = dict(self._options)
        if self._logger is not None and trainer.is_global_zero:
            options.setdefault("run", self._logger.experiment)
        meta = {"clip_threshold": float(trainer.gradient_clip_val)} if trainer.gradient_clip_val else {}
        options["meta"] = {**meta, "scheduler": bool(trainer.lr_scheduler_configs), **(options.get("meta") or {})}
        optimizers = trainer.optimizers
        if len(optimizers) > 1:
            names = _names_of(optimizers, pl_module)
            self._players, known = [*names], dict(zip(names, optimizers, strict=True))
            tracker = Tracker(trainer.strategy.model, **{"optimizer": known, **options})
        else:
            self._players = [None]
            tracker = Tracker(trainer.strategy.model, **{"optimizer": next(iter(optimizers), None), **options})
        if self._logger is not None:
            self._logger.tracker = tracker
        return tracker


class PytrackerLogger(_pl.loggers.logger.Logger):  # type: ignore[misc]
    """Writes what Lightning logs to a ``Run``: one SQLite file, for ``pytracker report``, ``compare`` and the rest.

    With a ``PytrackerCallback`` on the same trainer, both write one run. It is finished at the end of the program, or
    by ``logger.experiment.finish()``, so that ``trainer.test()`` finds it open. A failed training ends it as failed.

    Args:
        directory: where runs are kept.
        options: those of ``Run``: ``name``, ``config``, ``resume``.
    """

    def __init__(self, directory: str = "runs", **options: Any) -> None:
        super().__init__()
        self.tracker: Tracker | None = None  # the callback's
        self._directory, self._options = directory, options
        self._run: Run | None = None

    @property
    def name(self) -> str | None:
        """The name of the run; None before it is opened, and on other ranks than the first."""
        return None if self._run is None else self._run.name

    @property
    def version(self) -> str | None:
        """None: every run has a name of its own."""
        return None

    @property
    def save_dir(self) -> str:
        """The directory of the runs."""
        return self._directory

    @property
    def experiment(self) -> Run:
        """The run, opened when it is asked for; call it on the first rank only."""
        if self._run is None:
            self._run = Run(self._directory, **self._options)
        return self._run

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics: at ``step``, or at the callback's latest one."""
        values = loggable(metrics, leave_out=["epoch"])
        if self.tracker is not None and not self.tracker.closed:
            self.tracker.log(**values)
        elif values and self.experiment.state == "running":
            self.experiment.log(max(step or 0, self.experiment.history.last_step, 0), **values)

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Record the hyperparameters in the run's meta."""
        given = vars(params) if isinstance(params, Namespace) else dict(params)
        plain = {str(name): value for name, value in given.items() if isinstance(value, (str, int, float, type(None)))}
        if plain:
            self.experiment.set_meta(hyperparameters=plain)

    @_rank_zero_only  # type: ignore[untyped-decorator, unused-ignore]
    def finalize(self, status: str) -> None:
        """Write what waits; after a failure, finish the run as failed."""
        if self._run is None or self._run.state != "running":
            return
        if status == "success":
            self._run.flush()
        else:
            self._run.finish("failed", error=f"the training ended as {status}")


def _names_of(optimizers: list[torch.optim.Optimizer], module: torch.nn.Module) -> list[str]:
    """Return the part of the module that each optimizer trains; their numbers where that is no name for each."""
    parts = {name: {id(parameter) for parameter in part.parameters()} for name, part in module.named_children()}
    names = []
    for number, optimizer in enumerate(optimizers):
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names.append(next((name for name, known in parts.items() if its <= known), str(number)))
    return names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]
