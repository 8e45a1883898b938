"""Hugging Face Accelerate: when to step a tracker, and pytracker as one of its own trackers.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
with Tracker(model, optimizer=optimizer) as tracker:  # 1
for x, y in loader:
with accelerator.accumulate(model):
loss = loss_function(model(x), y)
accelerator.backward(loss)
step(tracker, accelerator, loss=loss)  # 2: where a step of the optimizer is due, before you clip
optimizer.step()
optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MissingExtraError
from ..store import Run
from ..tracker import Tracker
from .metrics import loggable

try:
    from accelerate.tracking import GeneralTracker, on_main_process
except ImportError as error:
    raise MissingExtraError("pytracker.integrations.accelerate", "accelerate", "accelerate") from error


def step(tracker: Tracker, accelerator: Any, n: float = 1, **scalars: Any) -> None:
    """Record a step if this micro-batch completes one, with the means of its scalars. Never waits.

    An fp16 scale is taken out.

    Call it between ``accelerator.backward`` and ``accelerator.clip_grad_norm_`` or ``optimizer.step``.

    Args:
        tracker: of the model that ``accelerator.prepare`` returned.
        accelerator: whose ``sync_gradients`` says whether a step is due.
        n: as in ``Tracker.step``.
        scalars: as in ``Tracker.step``, and so ``only`` and ``clip``.

    Raises:
        ClosedError, InvalidTypeError, InvalidValueError, ParameterError: as ``Tracker.step``.
    """
    scale = getattr(accelerator.scaler, "_scale", None)
    tracker.step(n=n, when=accelerator.sync_gradients, grad_scale=scale, **scalars)


class PytrackerTracker(GeneralTracker):  # type: ignore[misc, unused-ignore]  # Any where accelerate has no types
    """Writes what ``accelerator.log`` is given to a ``Run``, which a ``Tracker`` may share.

    For example::

        accelerator = Accelerator(log_with=PytrackerTracker("runs"))
        accelerator.init_trackers("project", config={"lr": 1e-3})
        run = accelerator.get_tracker("pytracker", unwrap=True)
        with Tracker(model, optimizer=optimizer, run=run) as tracker:  # every step, in the same run

    Args:
        directory: where runs are kept.
        options: those of ``Run``: ``name``, ``config``, ``resume``.
    """

    name = "pytracker"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, directory: str = "runs", **options: Any) -> None:
        super().__init__()
        self._directory, self._options = directory, options
        self._run: Run | None = None

    @property
    def tracker(self) -> Run:
        """The run, opened when it is asked for; on the main process only."""
        if self._run is None:
            self._run = Run(self._directory, **self._options)
        return self._run

    @on_main_process  # type: ignore[untyped-decorator, unused-ignore]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Record the configuration in the run's meta."""
        plain = {str(name): value for name, value in values.items() if isinstance(value, (str, int, float, type(None)))}
        if plain:
            self.tracker.set_meta(config=plain)

    @on_main_process  # type: ignore[untyped-decorator, unused-ignore]
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Record the numbers among ``values`` at ``step``, by default the latest."""
        last = max(self.tracker.history.last_step, 0)
        self.tracker.log(last if step is None else step, **loggable(values))

    @on_main_process  # type: ignore[untyped-decorator, unused-ignore]
    def finish(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
