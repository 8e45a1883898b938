"""Watch: a running training in the terminal, also one that another process writes. No torch here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .._checks import flag
from ..diagnostics import most_severe_first
from ..errors import RunNotFoundError
from ..history import History
from ..store import StoredRun, Tail, find_run
from . import console
from .comparison import flatten
from .formatting import age, duration, number, sparkline, steps_per_second
from .metric_names import ordered

_SPEED_SECONDS: Final = 30.0  # the speed is that of the last so many
_PLANNED: Final = ("total_steps", "max_steps", "num_training_steps", "num_steps")
_SERIES: Final = 10
_FINDINGS: Final = 3


def watch_run(path: str | os.PathLike[str], *, seconds: float = 1.0, once: bool = False) -> None:
    """Show a run in the terminal, and go on until it ends or Ctrl-C is pressed.

    Args:
        path: the run's folder.
        seconds: between two readings of the file. Each reads only what is new.
        once: show it once and return, as for a run that nobody writes.

    Raises:
        RunNotFoundError: there is no run.
        RunFormatError: the file is not a run.
    """
    once = flag("once", once)
    console = Console(highlight=False)
    tail = Tail(Path(path))
    tail.read()
    if once or tail.run.state != "running":
        console.print(screen(tail))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        live.update(screen(tail), refresh=True)
        while tail.run.state == "running":
            time.sleep(seconds)
            tail.read()
            live.update(screen(tail), refresh=True)


def wait_for_run(
    run: str, directory: str | os.PathLike[str], *, seconds: float = 1.0, waiting: Callable[[str], None] = print
) -> StoredRun:
    """Return the run that ``find_run`` finds, as soon as there is one; until then, say once what is waited for."""
    said = False
    while True:
        try:
            return find_run(run, directory)
        except RunNotFoundError as error:
            if not said:
                waiting(f"{error}; waiting for it (Ctrl-C ends)")
            said = True
        time.sleep(seconds)


def steps_planned(run: StoredRun) -> int | None:
    """Return how many steps a training is to have, where its meta or its config says so.

    >>> steps_planned(StoredRun(Path("a"), "a", "running", config={"train": {"max_steps": 500}}))
    500
    """
    known = {**flatten(run.config), **run.meta}
    for name in _PLANNED:
        for key, value in known.items():
            if key.rpartition(".")[2] == name and type(value) is int and value > 0:
                return value
    return None


def screen(tail: Tail) -> RenderableType:
    """Return what ``watch`` shows at one moment."""
    history, parameters = tail.history, tail.history.parameters
    parts: list[RenderableType] = [
        _head(tail.run, steps_per_second(*tail.clock, latest=_SPEED_SECONDS)),
        "",
        _series(history),
    ]
    if len(parameters):
        title = f"Gradient norms of {len(parameters.infos)} parameters, loudest and quietest"
        parts.append(console.norm_table(parameters.names, parameters.field("norm_mean"), title))
    if history.findings:
        parts.append(console.findings(most_severe_first(history.findings)[:_FINDINGS]))
        if len(history.findings) > _FINDINGS:
            more = f"and {len(history.findings) - _FINDINGS} less severe; all: pytracker show {tail.run.name}"
            parts.append(console.literal(more))
    return Group(*parts)


def _head(run: StoredRun, speed: float | None) -> Text:
    planned = steps_planned(run)
    left = None if planned is None or not speed or run.state != "running" else (planned - run.last_step - 1) / speed
    facts = [
        run.name,
        run.state,
        f"step {run.last_step}" if run.summaries else "no steps yet",
        "" if planned is None else f"of {planned} ({min(1.0, (run.last_step + 1) / planned):.0%})",
        "" if left is None or left <= 0 else f"{duration(left)} left",
        duration(run.seconds or None),
        f"{number(speed)} steps/s" if speed else "",
    ]
    if run.state == "running" and run.sessions:
        facts.append(f"written {age(run.sessions[-1].last_written)} ago")
    return console.literal("   ".join(filter(None, facts)), "bold")


def _series(history: History) -> Table:
    table = console.plain_table("series", "last", "lowest", "highest", "course", numbers=("last", "lowest", "highest"))
    for name in ordered(history)[:_SERIES]:
        values = history[name].values
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
        shown = np.log10(np.where(values > 0, values, np.nan)) if name in ("grad_norm", "grad_max") else values
        cells = (number(float(values[-1])), number(low), number(high))
        table.add_row(name, *cells, sparkline(shown))
    return table
