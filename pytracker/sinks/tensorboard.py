"""TensorBoard: scalars at the time when they were recorded, histograms of the parameters' norms, findings as text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .extras import need
from .layers import Layers
from .sink import RunInfo, SinkRows

if TYPE_CHECKING:
    from ..diagnostics import Finding
    from ..history import Interval


class TensorBoardSink:
    """Writes event files that ``tensorboard --logdir runs`` shows.

    Values are float32, as TensorBoard's scalars are. A resumed training purges the steps that are recorded again.

    Args:
        log_dir: the folder of the event files; by default the run's own folder, or ``runs/tensorboard`` without a run.
        per_parameter: also a value of each parameter: "norm", "abs_max", "zero_fraction" or "nonfinite".
        depth: of each module instead of each parameter, see ``Layers``.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        per_parameter: str | None = None,
        depth: int | None = None,
    ) -> None:
        need("TensorBoardSink", "tensorboard", "tensorboard")
        self._log_dir = log_dir
        self._layers = Layers(per_parameter, depth)
        self._writer: Any = None

    def open(self, info: RunInfo) -> None:
        self._layers.infos = info.parameters
        self._folder = Path(self._log_dir or info.directory or Path("runs", "tensorboard"))
        self._begin(info.first_step if info.recorded or info.first_step else None)
        if info.config:
            self._writer.add_text("config", _code(info.config), info.first_step)

    def truncate(self, step: int) -> None:
        self._writer.close()
        self._begin(step)

    def write(self, rows: SinkRows) -> None:
        for step, time, values in self._layers.added_to(rows):
            self.late(step, time, values)
        self.flush()

    def late(self, step: int, time: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def parameters(self, interval: Interval) -> None:
        for name in ("norm_mean", "weight_norm", "update_norm"):
            norms = getattr(interval, name)
            finite = norms[np.isfinite(norms)]
            if len(finite):
                self._writer.add_histogram(f"parameters/{name}", finite, interval.last_step)

    def finding(self, finding: Finding) -> None:
        self._writer.add_text(f"findings/{finding.key}", str(finding), finding.last_step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, error: str | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def _begin(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)


def _code(config: Any) -> str:
    """Return a config as markdown that shows it literally."""
    return "\n".join(f"    {line}" for line in str(config).splitlines())
