"""What a sink is, and how a tracker tells all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import in_words


class Sink(Protocol):
    """What mirrors a training elsewhere (TensorBoard, CSV, ...): told of every exact value, in order."""

    def write(self, steps: NDArray[np.int64], series: dict[str, NDArray[np.float64]]) -> None:
        """Take a value of each series at each of ``steps``."""

    def close(self) -> None:
        """Write what is left."""


class Sinks:
    """Tells every sink; one that fails is reported and left out from then on, and the training goes on."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, steps: NDArray[np.int64], series: dict[str, NDArray[np.float64]]) -> None:
        self._each(lambda sink: sink.write(steps, series))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:  # noqa: PERF203 - each sink fails for itself
                self._sinks.remove(sink)
                warnings.warn(
                    f"the sink {type(sink).__name__} failed and is switched off: {in_words(error)}",
                    RuntimeWarning,
                    stacklevel=2,
                )
