"""Per-layer values for tools that have no place for rows of moments: one series for each parameter or module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from .._checks import whole_number, wrong_value
from ..columns import ABS_MAX, INFS, NANS, SUM_SQ, ZEROS
from .sink import SinkRows

if TYPE_CHECKING:
    from ..history import ParameterInfo

STATISTICS: Final = ("norm", "abs_max", "zero_fraction", "nonfinite")


class Layers:
    """Computes a statistic of each parameter's gradient, or of the parameters of each module together.

    Args:
        statistic: one of ``STATISTICS``; None for no values at all.
        depth: how many parts of a parameter's module path name its group: 2 makes ``encoder.layers`` of
            ``encoder.layers.0.weight``. None: each parameter for itself.

    Raises:
        InvalidValueError: there is no such statistic, or ``depth`` is less than 1.
        InvalidTypeError: ``depth`` is no whole number.

    Example:
        >>> from pytracker.history import ParameterInfo
        >>> infos = [ParameterInfo(name, (1,), "float32", "", 1) for name in ("a.0.weight", "a.0.bias", "b.weight")]
        >>> moments = np.zeros((1, 3, 6))
        >>> moments[0, :, 1] = 9.0, 16.0, 4.0  # sums of squares
        >>> layers = Layers("norm", depth=1)
        >>> layers.infos = infos  # a sink knows them when it is opened
        >>> rows = SinkRows(np.array([7]), np.array([0.5]), {"loss": (np.array([0]), np.array([0.1]))}, moments)
        >>> list(layers.added_to(rows))
        [(7, 0.5, {'loss': 0.1, 'grad_norm/a': 5.0, 'grad_norm/b': 2.0})]
    """

    def __init__(self, statistic: str | None, depth: int | None = None) -> None:
        if statistic is not None and not (isinstance(statistic, str) and statistic in STATISTICS):
            raise wrong_value("per_parameter", statistic, f"one of {', '.join(map(repr, STATISTICS))}, or None")
        if depth is not None:
            depth = whole_number("depth", depth, low=1)
        self._statistic, self._depth = statistic, depth
        self.infos: Sequence[ParameterInfo] = ()

    def added_to(self, rows: SinkRows) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Iterate over ``rows`` with the values of the layers among each step's."""
        layers = {name: values.tolist() for name, values in self._series(rows.moments).items()}
        for index, (step, time, values) in enumerate(rows):
            yield step, time, {**values, **{name: of_steps[index] for name, of_steps in layers.items()}}

    def _series(self, moments: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Return [n] values by name, of ``moments`` [n, T, 6]; NaN where no parameter of a group has a gradient."""
        if self._statistic is None:
            return {}
        groups: dict[str, list[int]] = {}
        for index, info in enumerate(self.infos):
            groups.setdefault(self._group(info.name), []).append(index)
        numel = np.array([info.numel for info in self.infos], np.float64)
        return {
            f"grad_{self._statistic}/{name}": _statistic(self._statistic, moments[:, members], numel[members])
            for name, members in groups.items()
        }

    def _group(self, name: str) -> str:
        if self._depth is None:
            return name
        return ".".join(name.split(".")[:-1][: self._depth]) or name


def _statistic(statistic: str, moments: NDArray[np.float64], numel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [n] of ``moments`` [n, k, 6] of the parameters of one group."""
    missing = np.isnan(moments[:, :, ZEROS])
    there = np.where(missing[:, :, None], 0.0, moments)  # adds nothing to any of these
    if statistic == "norm":
        values = np.sqrt(there[:, :, SUM_SQ].sum(axis=1))
    elif statistic == "abs_max":
        values = there[:, :, ABS_MAX].max(axis=1)
    elif statistic == "zero_fraction":
        values = there[:, :, ZEROS].sum(axis=1) / np.maximum((~missing) @ numel, 1.0)
    else:
        values = (there[:, :, NANS] + there[:, :, INFS]).sum(axis=1)
    return np.where(missing.all(axis=1), np.nan, values)
