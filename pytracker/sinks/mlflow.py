"""MLflow: values in batches, with their steps and times; findings as tags; a crash ends the run as failed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .extras import need
from .layers import Layers
from .sink import RunInfo, SinkRows
from .wandb import config_of

if TYPE_CHECKING:
    from ..diagnostics import Finding

_BATCH = 1000
"""Metrics that MLflow takes in one request."""

_LONGEST_TAG = 5000
_LONGEST_PARAM = 6000


class MLflowSink:
    """Logs to a run of its own, or to the one given.

    MLflow stores Inf as the largest float; the tag ``pytracker.nonfinite.NAME`` says where a series was first NaN or
    infinite. A resumed training continues its MLflow run. MLflow cannot take values back, so one that goes back to an
    earlier step goes on in a new run, ``NAME-from-STEP``, whose tag ``pytracker.continues`` names the one before.

    Args:
        experiment: its name; it is made where there is none.
        tracking_uri: where MLflow keeps it; by default as MLflow is configured.
        run_id: log to this run, and leave it open.
        per_parameter: also a value of each parameter: "norm", "abs_max", "zero_fraction" or "nonfinite".
        depth: of each module instead of each parameter, see ``Layers``.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "Default",
        *,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        per_parameter: str | None = None,
        depth: int | None = None,
    ) -> None:
        need("MLflowSink", "mlflow", "mlflow")
        self._experiment, self._uri = experiment, tracking_uri
        self._given, self._run_id = run_id, run_id
        self._layers = Layers(per_parameter, depth)
        self._client: Any = None
        self._info: RunInfo | None = None
        self._sent = 0  # metrics of the call under way that MLflow has: a call is repeated if one of its requests fails
        self._nonfinite: set[str] = set()

    def open(self, info: RunInfo) -> dict[str, Any] | None:
        from mlflow import MlflowClient

        self._info = info
        self._layers.infos = info.parameters
        self._client = MlflowClient(self._uri)
        if self._given is not None:
            return None
        known = info.remembered.get("run_id")
        if known is not None and info.recorded <= info.first_step:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
        else:
            self._begin(info.first_step if info.recorded else None, known)
        return {"run_id": self._run_id}

    def truncate(self, step: int) -> None:
        if self._given is None:
            before = self._run_id
            self._client.set_terminated(before, "FINISHED")
            self._begin(step, before)

    def write(self, rows: SinkRows) -> None:
        self._log([(step, time, values) for step, time, values in self._layers.added_to(rows)])

    def late(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._log([(step, time, values)])

    def finding(self, finding: Finding) -> None:
        self._client.set_tag(self._run_id, f"pytracker.finding.{_name(finding.key)}", str(finding)[:_LONGEST_TAG])

    def close(self, error: str | None) -> None:
        if self._client is None or self._given is not None or self._run_id is None:
            return
        if error is not None:
            self._client.set_tag(self._run_id, "pytracker.error", error[:_LONGEST_TAG])
        self._client.set_terminated(self._run_id, "FINISHED" if error is None else "FAILED")

    def _begin(self, first_step: int | None, before: str | None) -> None:
        """Start a run; ``first_step`` where the training has gone back to it from the run ``before``."""
        from mlflow.entities import Param

        assert self._info is not None
        name = self._info.name
        if first_step is not None:
            name = f"{name or 'run'}-from-{first_step}"
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(self._experiment)
        tags = {} if before is None else {"pytracker.continues": before}
        run = self._client.create_run(experiment, run_name=name, tags=tags)
        self._run_id = run.info.run_id
        config = config_of(self._info)
        params = [Param(_name(key), str(value)[:_LONGEST_PARAM]) for key, value in config.items()]
        self._client.log_batch(self._run_id, params=params)

    def _log(self, rows: list[tuple[int, float, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for step, time, values in rows:
            metrics += [Metric(_name(name), value, int(time * 1000), step) for name, value in values.items()]
            for name, value in values.items():
                if not math.isfinite(value) and name not in self._nonfinite:
                    tag = f"pytracker.nonfinite.{_name(name)}"
                    self._client.set_tag(self._run_id, tag, f"{value} at step {step}")
                    self._nonfinite.add(name)
        while self._sent < len(metrics):
            self._client.log_batch(self._run_id, metrics=metrics[self._sent : self._sent + _BATCH])
            self._sent += _BATCH
        self._sent = 0


def _name(name: str) -> str:
    """Return a name that MLflow takes: letters, digits and ``_-. /``."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
