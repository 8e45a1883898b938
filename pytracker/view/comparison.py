"""Runs side by side: best and last values, what differs in the configs, how soon each got somewhere. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._checks import items, kind_of, real_number, shown
from ..errors import InvalidValueError, MissingExtraError
from ..history import Series, html_table
from ..store import StoredRun, load_run
from .formatting import steps_per_second
from .metric_names import goal, ordered

if TYPE_CHECKING:
    import pandas as pd

_FACTS: Final = ("git_commit", "git_dirty", "host", "devices", "torch", "python", "pytracker", "command")


@dataclass(frozen=True)
class MetricResult:
    """One metric of one run. ``best`` and its step are None where neither high nor low is good (a learning rate)."""

    best: float | None
    best_step: int | None
    last: float
    last_step: int


@dataclass(frozen=True)
class Reach:
    """When each run first got to ``threshold`` in ``metric``: steps and training seconds, None where it never did."""

    metric: str
    threshold: float
    steps: list[int | None]
    seconds: list[float | None]


@dataclass(frozen=True)
class Comparison:
    """Several runs compared. Every list has one element a run, in the order of ``names``."""

    names: list[str]
    states: list[str]
    last_steps: list[int]
    seconds: list[float]
    steps_per_second: list[float | None]
    goals: dict[str, str | None]
    metrics: dict[str, list[MetricResult | None]]
    reach: list[Reach]
    config: dict[str, list[Any]]  # keys that differ only; None where a run has no such key
    facts: dict[str, list[Any]]  # likewise: commit, host, versions, ...
    usual_levels: bool = True  # whether the levels of ``reach`` were chosen here, and not by the caller

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return asdict(self)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return by run what it is and came to: state, steps, what differs in its config, best and last values."""
        rows: dict[str, dict[str, Any]] = {}
        for place, name in enumerate(self.names):
            rows[name] = {"state": self.states[place], "steps": self.last_steps[place] + 1}
            rows[name] |= {"seconds": self.seconds[place], "steps/s": self.steps_per_second[place]}
            rows[name] |= {key: values[place] for key, values in self.config.items()}
            for metric, results in self.metrics.items():
                result = results[place]
                if self.goals[metric]:
                    rows[name][f"best {metric}"] = None if result is None else result.best
                rows[name][f"last {metric}"] = None if result is None else result.last
        return rows

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame: one row a run, which is its index.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("Comparison.to_pandas", "pandas", "pandas") from error
        return pd.DataFrame.from_dict(self.rows(), orient="index")

    def _repr_html_(self) -> str:
        """Show the runs in a notebook, a row each."""
        rows = self.rows()
        columns = list(next(iter(rows.values())))
        cells = [[name, *("" if row[key] is None else row[key] for key in columns)] for name, row in rows.items()]
        return html_table("", ("run", *columns), cells)


def compare(
    runs: Iterable[StoredRun | str | os.PathLike[str]], *, thresholds: Mapping[str, float] | None = None
) -> Comparison:
    """Compare runs.

    Args:
        runs: two or more, as ``load_run`` gives them or as paths; one alone works too.
        thresholds: by metric, the level whose step and time to ask for. By default, for each metric with a goal, the
            level that every run has reached: the worst of their best values.

    Raises:
        InvalidValueError: there are no runs, or a threshold is for a metric that no run has, or that has no goal.

    >>> import tempfile
    >>> from pytracker.store import Run
    >>> folder, paths = tempfile.mkdtemp(), []
    >>> for name, lr in (("slow", 0.1), ("fast", 0.5)):
    ...     with Run(folder, name=name, config={"lr": lr}) as run:
    ...         for step in range(4):
    ...             run.log(step, loss=1 - step * lr / 2)
    ...     paths.append(run.path)
    >>> comparison = compare(paths, thresholds={"loss": 0.9})
    >>> comparison.config, comparison.reach[0].steps
    ({'lr': [0.1, 0.5]}, [2, 1])
    """
    given = items("runs", runs, "a list of runs or paths")
    loaded = [run if isinstance(run, StoredRun) else load_run(run) for run in given]
    if not loaded:
        raise InvalidValueError("compare: no runs were given")
    names = ordered(dict.fromkeys(name for run in loaded for name in run.summaries))
    clocks = [run.clock() for run in loaded]
    metrics = {name: [metric_result(run, name) if name in run.summaries else None for run in loaded] for name in names}
    return Comparison(
        names=distinct_names(loaded),
        states=[run.state for run in loaded],
        last_steps=[run.last_step for run in loaded],
        seconds=[run.seconds for run in loaded],
        steps_per_second=[steps_per_second(*clock) for clock in clocks],
        goals={name: goal(name) for name in names},
        metrics=metrics,
        reach=_reaches(loaded, clocks, _levels(metrics) if thresholds is None else _checked(thresholds, names)),
        config=_differences([flatten(run.config) for run in loaded]),
        usual_levels=thresholds is None,
        facts=_differences([{name: run.facts.get(name) for name in _FACTS} for run in loaded]),
    )


def distinct_names(runs: Sequence[StoredRun]) -> list[str]:
    """Return the runs' names; where two share one, their whole paths."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level with dotted keys.

    >>> flatten({"optimizer": {"name": "sgd", "lr": 0.1}, "seed": 0})
    {'optimizer.name': 'sgd', 'optimizer.lr': 0.1, 'seed': 0}
    """
    if not isinstance(config, Mapping):
        return {prefix or "config": config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat.update(flatten(value, name) if isinstance(value, Mapping) else {name: value})
    return flat


def metric_result(run: StoredRun, name: str) -> MetricResult:
    """Return what a metric that the run has came to."""
    summary = run.summaries[name]
    best, step = {
        "min": (summary.minimum, summary.minimum_step),
        "max": (summary.maximum, summary.maximum_step),
        None: (None, None),
    }[goal(name)]
    return MetricResult(best, step, summary.last, summary.last_step)


def _levels(metrics: dict[str, list[MetricResult | None]]) -> dict[str, float]:
    levels = {}
    for name, results in metrics.items():
        bests = [result.best for result in results if result is not None and result.best is not None]
        if len(bests) == len(results) > 1:
            levels[name] = min(bests) if goal(name) == "max" else max(bests)
    return levels


def _checked(thresholds: Mapping[str, float], names: list[str]) -> dict[str, float]:
    given = kind_of("thresholds", thresholds, Mapping, 'values by metric, as {"loss": 0.5}')
    for name in given:
        if name not in names:
            raise InvalidValueError(f"thresholds: no run has a metric {shown(name)}; there are {', '.join(names)}")
        if goal(name) is None:
            raise InvalidValueError(f"thresholds: nobody knows whether {name!r} should rise or fall")
    return {name: real_number(f"thresholds[{name!r}]", value) for name, value in given.items()}


def _reaches(runs: list[StoredRun], clocks: list[Any], levels: Mapping[str, float]) -> list[Reach]:
    if not levels:
        return []
    histories = [run.load_history(parameters=False) for run in runs]
    reaches = []
    for name, level in levels.items():
        steps = [_first_step(history.get(name), level, goal(name)) for history in histories]
        seconds = [
            None if step is None or not len(clock[0]) else float(np.interp(step, *clock))
            for step, clock in zip(steps, clocks, strict=True)
        ]
        reaches.append(Reach(name, level, steps, seconds))
    return reaches


def _first_step(series: Series | None, level: float, aim: str | None) -> int | None:
    if series is None:
        return None
    there = series.values >= level if aim == "max" else series.values <= level
    return int(series.steps[np.argmax(there)]) if there.any() else None


def _differences(tables: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key) for table in tables] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
