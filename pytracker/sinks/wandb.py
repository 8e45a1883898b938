"""Weights & Biases: every step's values over a step of their own, findings as alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .extras import need
from .layers import Layers
from .sink import RunInfo, SinkRows

if TYPE_CHECKING:
    from ..diagnostics import Finding

_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class WandbSink:
    """Logs to a run of its own, or to the one given, over the metric ``step`` and not W&B's own count of calls.

    A resumed training continues its W&B run. W&B cannot take values back, so one that goes back to an earlier step goes
    on in a new W&B run of the same group, ``NAME-from-STEP``.

    Args:
        project: the W&B project.
        run: log to this run, e.g. ``wandb.run``, and leave it open. Your own ``run.log`` must not give ``step=`` then:
            W&B drops values of a step before its latest.
        per_parameter: also a value of each parameter: "norm", "abs_max", "zero_fraction" or "nonfinite".
        depth: of each module instead of each parameter, see ``Layers``.
        init: passed on to ``wandb.init``, e.g. ``mode="offline"``, ``entity=...``, ``tags=[...]``.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        run: Any = None,
        per_parameter: str | None = None,
        depth: int | None = None,
        **init: Any,
    ) -> None:
        need("WandbSink", "wandb", "wandb")
        self._layers = Layers(per_parameter, depth)
        self._given, self._run = run, run
        self._init = {"project": project, **init}
        self._config: dict[str, Any] = {}
        self._name: str | None = None
        self._alerted: dict[str, int] = {}  # rule -> how severe

    def open(self, info: RunInfo) -> dict[str, Any] | None:
        self._layers.infos = info.parameters
        self._config = config_of(info)
        self._name = info.name
        if self._given is None:
            goes_back = info.first_step < info.recorded
            self._begin(info.first_step if goes_back else None, None if goes_back else info.remembered.get("id"))
        self._define()
        return {"id": self._run.id} if self._given is None else None

    def truncate(self, step: int) -> None:
        if self._given is None:
            self._run.finish()
            self._begin(step, None)
            self._define()

    def write(self, rows: SinkRows) -> None:
        for step, time, values in self._layers.added_to(rows):
            self.late(step, time, values)

    def late(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step, "_timestamp": time})

    def finding(self, finding: Finding) -> None:
        if finding.rank <= self._alerted.get(finding.key, -1):
            return  # it has only grown, or become less
        self._alerted[finding.key] = finding.rank
        self._run.alert(f"pytracker: {finding.key}"[:63], str(finding), level=_LEVELS[finding.severity])

    def close(self, error: str | None) -> None:
        if self._run is None or self._given is not None:
            return
        if error is not None:
            self._run.summary["error"] = error
        self._run.finish(exit_code=0 if error is None else 1)

    def _begin(self, first_step: int | None, run_id: str | None) -> None:
        """Start a run, or go on with the one of this id; ``first_step`` where the training has gone back to it."""
        import wandb

        name = self._name if first_step is None else f"{self._name or 'run'}-from-{first_step}"
        goes_on = {} if run_id is None else {"id": run_id, "resume": "allow"}
        settings = {"name": name, "group": self._name, "config": self._config, "reinit": "create_new"}
        self._run = wandb.init(**{**settings, **goes_on, **self._init})

    def _define(self) -> None:
        self._run.define_metric("step", hidden=True)
        if self._given is None:
            self._run.define_metric("*", step_metric="step")


def config_of(info: RunInfo) -> dict[str, Any]:
    """Return a run's config and meta as a dictionary whose keys are strings."""
    config = info.config if isinstance(info.config, Mapping) else vars(info.config) if info.config else {}
    return {**{str(name): value for name, value in config.items()}, "pytracker": dict(info.meta)}
