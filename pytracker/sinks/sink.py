"""What a sink is: a mirror of a training in another tool, and what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .._checks import shown, wrong_type, wrong_value
from ..errors import InvalidTypeError

if TYPE_CHECKING:
    from ..history import ParameterInfo


@dataclass(frozen=True)
class RunInfo:
    """What a sink learns of the training when it is opened."""

    name: str | None  # of the run; None where it is kept in memory only
    directory: Path | None  # the run's folder
    config: Any
    meta: Mapping[str, Any]
    parameters: tuple[ParameterInfo, ...]
    first_step: int  # the first that will be written
    recorded: int  # steps that the run held before; above first_step, the training has gone back
    remembered: Mapping[str, Any]  # what `open` returned when this run was last opened; empty for a new one


@dataclass(frozen=True)
class SinkRows:
    """Exact values of consecutive steps. No step comes twice, and none before an earlier one.

    Iterating gives one (step, time, values) a step; values that a step lacks are left out.

    Example:
        >>> series = {"loss": (np.array([0, 1]), np.array([0.5, 0.25])), "val": (np.array([1]), np.array([9.0]))}
        >>> rows = SinkRows(np.array([7, 8]), np.array([1.5, 2.5]), series, np.empty((2, 0, 6)))
        >>> list(rows)
        [(7, 1.5, {'loss': 0.5}), (8, 2.5, {'loss': 0.25, 'val': 9.0})]
    """

    steps: NDArray[np.int64]  # [n]
    times: NDArray[np.float64]  # [n], when each step was recorded, in seconds since 1970
    series: Mapping[str, tuple[NDArray[np.intp], NDArray[np.float64]]]  # name -> places in `steps`, values
    moments: NDArray[np.float64]  # [n, T, 6], columns.COLUMNS of each parameter; NaN where it had no gradient

    def __iter__(self) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Iterate over (step, time, values by name)."""
        values: list[dict[str, float]] = [{} for _ in range(len(self.steps))]
        for name, (places, numbers) in self.series.items():
            for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
                values[place][name] = number
        return iter(zip(self.steps.tolist(), self.times.tolist(), values, strict=True))

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)


class Sink(Protocol):
    """What mirrors a training elsewhere. Only ``write`` must be there; a method that a sink lacks is not called.

    The other methods, in the order in which they are called::

        open(info: RunInfo) -> dict | None     before anything else; what it returns is ``info.remembered`` on a resume
        truncate(step: int)                    the training went back: what was written at ``step`` and later is void
        write(rows: SinkRows)
        late(step: int, time: float, values: dict)    more values, for a step that may be written already: an epoch's
        parameters(interval: Interval)         what a drain says of every parameter
        finding(finding: Finding)              a new finding, or one that has grown
        flush()                                a good moment to write what is buffered
        close(error: str | None)               always called once, even if ``open`` failed; ``error`` ended the run

    All are called on one thread of the sink's own, never on the training's. A call that raises is tried again, with the
    same arguments, so what it did before it raised should bear repeating.
    """

    def write(self, rows: SinkRows) -> None:
        """Take the values of consecutive steps."""


_ARGUMENTS = {"open": 1, "truncate": 1, "write": 1, "late": 3, "parameters": 1, "finding": 1, "flush": 0, "close": 1}

SinkLike = Sink | str | Callable[[], Sink]
"""A sink, the name of one that pytracker brings (``"tensorboard"``), or a function that makes one."""


def check_sinks(sinks: Any, known: Mapping[str, Callable[[], Sink]]) -> None:
    """Make sure that each of ``sinks`` is a sink, a name in ``known``, or a function that makes one.

    Raises:
        InvalidTypeError: one is none of these, or a method of it takes other arguments.
        InvalidValueError: there is no sink of that name.
        MissingExtraError: the tool of that name is not installed.
    """
    if isinstance(sinks, (str, bytes)) or not isinstance(sinks, Sequence):
        raise wrong_type("sinks", sinks, 'a list of sinks, as ["tensorboard", CSVSink(path)]')
    for sink in sinks:
        if isinstance(sink, str):
            if sink not in known:
                raise wrong_value("a sink", sink, f"one of {', '.join(map(repr, known))}")
            known[sink]()  # opens nothing
        elif hasattr(sink, "write") and not isinstance(sink, type):
            check_methods(sink)
        elif not callable(sink):
            names = ", ".join(map(repr, known))
            raise wrong_type("a sink", sink, f"one with write(rows), a function that makes one, or one of {names}")


def check_made(sink: Any, given: Any) -> None:
    """Make sure that ``sink``, which is ``given`` or was made by it, is one.

    Raises:
        InvalidTypeError: it is not.
    """
    if sink is None:
        raise InvalidTypeError(
            f"{shown(given)} returned None: a function among the sinks is called without arguments, to make an object "
            "with write(rows), which is then given the values; to hear of findings, give on_finding"
        )
    check_methods(sink)


def check_methods(sink: Any) -> None:
    """Make sure that the methods of a sink can be called as they will be.

    Raises:
        InvalidTypeError: one cannot.
    """
    kind = type(sink).__name__
    if not hasattr(sink, "write"):
        raise InvalidTypeError(f"{kind} is no sink; it needs a method write(rows)")
    for name, count in _ARGUMENTS.items():
        method = getattr(sink, name, None)
        if method is None:
            continue
        try:
            inspect.signature(method).bind(*range(count))
        except (TypeError, ValueError):
            raise InvalidTypeError(
                f"{kind}.{name} is called with {count} argument{'' if count == 1 else 's'}, and takes others; see "
                "pytracker.sinks.Sink"
            ) from None
