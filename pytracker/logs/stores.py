"""Readers of the stores of other tools, by the packages of those tools: TensorBoard, MLflow, trackio."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .table import Table, as_number, numbers_of


def read_tensorboard(folder: Path) -> list[Table]:
    """Read the scalars of the event files in a folder (or of one event file), as one run.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
    """
    reader = _package("tensorboard.backend.event_processing.event_accumulator", "reading event files", "tensorboard")
    tensors = _package("tensorboard.util.tensor_util", "reading event files", "tensorboard")
    events = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0, reader.TENSORS: 0})
    events.Reload()
    tags = events.Tags()
    points = [(event.step, tag, event.value) for tag in tags["scalars"] for event in events.Scalars(tag)]
    for tag in tags["tensors"]:
        points += [
            (event.step, tag, float(tensors.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
            if event.tensor_proto.dtype in (1, 2) and not event.tensor_proto.tensor_shape.dim
        ]
    name = folder.parent.name if folder.is_file() else folder.name
    return [_of_points(folder, "TensorBoard events", name, points)] if points else []


def read_mlflow(folder: Path) -> list[Table]:
    """Read the runs of a local MLflow store: a folder ``mlruns``, or a file ``mlflow.db``.

    Raises:
        MissingExtraError: the package mlflow is not installed.
    """
    tracking = _package("mlflow.tracking", "reading an MLflow store", "mlflow")
    at = f"sqlite:///{folder.resolve()}" if folder.is_file() else folder.resolve().as_uri()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own changes
        client = tracking.MlflowClient(tracking_uri=at)
        found = []
        for experiment in client.search_experiments():
            for run in client.search_runs([experiment.experiment_id]):
                points = [
                    (each.step, name, each.value)
                    for name in run.data.metrics
                    for each in client.get_metric_history(run.info.run_id, name)
                ]
                table = _of_points(folder, "MLflow", run.info.run_name or run.info.run_id, points)
                table.meta["config"] = dict(run.data.params)
                found.append(table)
    return found


def read_trackio(path: Path) -> list[Table]:
    """Read the runs of one of trackio's projects: a file ``PROJECT.db``.

    Raises:
        MissingExtraError: the package trackio is not installed.
    """
    storage = _package("trackio.sqlite_storage", "reading a trackio project", "trackio")
    utils = _package("trackio.utils", "reading a trackio project", "trackio")
    before = utils.TRACKIO_DIR, storage.TRACKIO_DIR
    utils.TRACKIO_DIR = storage.TRACKIO_DIR = path.parent
    try:
        store = storage.SQLiteStorage
        found = []
        for run in store.get_runs(path.stem):
            table = Table(path, "trackio", run=run)
            for record in store.get_logs(path.stem, run):
                values, texts = numbers_of(record.items())
                table.add({**values, "step": as_number(record.get("step")) or 0.0}, texts)
            found.append(table)
    finally:
        utils.TRACKIO_DIR, storage.TRACKIO_DIR = before
    return found


def _of_points(path: Path, format_: str, run: str, points: Iterable[tuple[int, str, float]]) -> Table:
    """Return points as rows, one for each step."""
    table = Table(path, format_, run=run)
    by_step: dict[int, dict[str, float]] = {}
    for step, name, value in points:
        by_step.setdefault(step, {})[name] = value
    for step in sorted(by_step):
        table.add({"step": float(step), **{name: value for name, value in by_step[step].items() if name != "step"}})
    return table


def _package(module: str, what: str, extra: str) -> Any:
    load: Callable[[str], Any] = importlib.import_module
    try:
        return load(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(what, module.partition(".")[0], extra) from error
