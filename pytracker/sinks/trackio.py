"""trackio: every step's values, and findings as alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .extras import need
from .layers import Layers
from .sink import RunInfo, SinkRows
from .wandb import config_of

if TYPE_CHECKING:
    from ..diagnostics import Finding

_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class TrackioSink:
    """Logs to a trackio run of its own.

    trackio notes when a value reaches it, and has no place for when it was recorded. It cannot take values back, so a
    training that goes back to an earlier step goes on in a new run of the same group, ``NAME-from-STEP``.

    Args:
        project: the trackio project.
        per_parameter: also a value of each parameter: "norm", "abs_max", "zero_fraction" or "nonfinite".
        depth: of each module instead of each parameter, see ``Layers``.
        init: passed on to ``trackio.init``, e.g. ``space_id="user/space"``.

    Raises:
        MissingExtraError: trackio is not installed.
    """

    def __init__(
        self, project: str = "pytracker", *, per_parameter: str | None = None, depth: int | None = None, **init: Any
    ) -> None:
        need("TrackioSink", "trackio", "trackio")
        self._layers = Layers(per_parameter, depth)
        self._init = {"project": project, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False, **init}
        self._run: Any = None
        self._info: RunInfo | None = None
        self._alerted: dict[str, int] = {}  # rule -> how severe

    def open(self, info: RunInfo) -> dict[str, Any]:
        self._info = info
        self._layers.infos = info.parameters
        goes_back = info.first_step < info.recorded
        self._begin(info.first_step if goes_back else None, None if goes_back else info.remembered.get("name"))
        return {"name": self._run.name}

    def truncate(self, step: int) -> None:
        self._run.finish()
        self._begin(step, None)

    def write(self, rows: SinkRows) -> None:
        for step, time, values in self._layers.added_to(rows):
            self.late(step, time, values)

    def late(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finding(self, finding: Finding) -> None:
        if finding.rank <= self._alerted.get(finding.key, -1):
            return  # it has only grown, or become less
        from trackio import AlertLevel

        self._alerted[finding.key] = finding.rank
        level = AlertLevel[_LEVELS[finding.severity]]
        self._run.alert(f"pytracker: {finding.key}", str(finding), level=level, step=finding.last_step)

    def close(self, error: str | None) -> None:
        if self._run is not None:
            if error is not None:
                from trackio import AlertLevel

                self._run.alert("the training failed", error, level=AlertLevel.ERROR)
            self._run.finish()

    def _begin(self, first_step: int | None, known: str | None) -> None:
        """Start a run, or go on with the one of this name; ``first_step`` where the training has gone back to it."""
        import trackio

        assert self._info is not None
        group = self._info.name
        name = known or (group if first_step is None else f"{group or 'run'}-from-{first_step}")
        resume = "allow" if known else "never"
        settings = {"name": name, "group": group, "config": config_of(self._info), "resume": resume}
        self._run = trackio.init(**{**settings, **self._init})
