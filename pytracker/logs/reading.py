"""``read_log``: find out what wrote a file or a folder, and read it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .._checks import path as checked_path
from .._checks import wrong_type
from ..errors import RunFormatError, RunNotFoundError, StoreError
from ..history import History
from . import files, stores
from .assembly import histories_of
from .table import Table

_NAMES: Final = ("trainer_state.json", "metrics.csv", "results.csv", "metrics.json", "scalars.json", "history.json")
_ENDS: Final = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".log", ".txt", ".db")
_SQLITE: Final = b"SQLite format 3\0"
_NAMED: Final = 5  # damaged lines named in a warning
_DEEPEST: Final = 4  # folders below the one given


def read_log(path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> list[History]:
    r"""Read a log that another tool wrote, as one history for each run in it.

    The names are those of pytracker where a column is known to be the ``loss``, ``val_loss``, ``lr`` (or
    ``lr/<group>``), ``grad_norm``, ``accuracy`` or ``val_accuracy``; other columns keep theirs. What was taken for what
    stands in ``history.meta["log"]``: ``columns``, ``step``, ``unit`` ("step", "epoch", ...), ``format``, ``path``,
    ``run``, and ``skipped`` lines.

    Args:
        path: a file, or a folder that holds such files or a store.
        names: by the name of pytracker the column that it is: ``{"loss": "Train Loss", "step": "it"}``.

    Raises:
        RunNotFoundError: there is nothing at the path.
        RunFormatError: it is no log of a kind that is known.
        InvalidTypeError: ``names`` is no mapping of texts.
        InvalidValueError: ``names`` has a column that the log has not.
        MissingExtraError: the tool whose store it is isn't installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "log.csv")
    ...     _ = file.write_text("epoch,Train Loss,valid_loss\n0,2.0,2.1\n1,1.5,1.8\n")
    ...     (history,) = read_log(file)
    >>> history["loss"], history["val_loss"], history.meta["log"]["columns"]["loss"]
    (Series([2.0, 1.5]), Series([2.1, 1.8]), 'Train Loss')
    """
    chosen = _checked_names(names)
    place = checked_path("path", path)
    if not place.exists():
        raise RunNotFoundError(f"{place}: there is no such file or folder")
    tables = [table for found in _parts(place) for table in _read(found)]
    histories = [history for table in tables for history in histories_of(table, chosen)]
    if not histories:
        raise RunFormatError(
            f"{place}: no log that is known; expected CSV with a header, JSON lines, trainer_state.json, event files, "
            "or a store of MLflow or trackio"
        )
    for table in tables:
        _warn_of_skipped(table)
    return histories


def is_log(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path looks like a log of another tool, and not like a run of pytracker."""
    place = Path(path)
    if place.is_dir():
        return not (place / "run.sqlite").exists() and next(_parts(place), None) is not None
    return place.is_file() and place.name != "run.sqlite"


def _checked_names(names: Any) -> dict[str, str]:
    if names is None:
        return {}
    if not isinstance(names, Mapping) or not all(isinstance(each, str) for pair in names.items() for each in pair):
        raise wrong_type("names", names, "a mapping of texts such as {'loss': 'Train Loss'}")
    return dict(names)


def _parts(place: Path) -> Iterator[Path]:
    """Yield the files, and the folders that a tool's own package reads, in a stable order."""
    if place.is_file():
        yield place
        return
    if _is_mlflow(place):
        yield place
        return
    known, others = [], []
    for folder, names in _walk(place):
        if any("tfevents" in name for name in names):
            known.append(folder)
        for name in names:
            if name in _NAMES:
                known.append(folder / name)
            elif folder == place and name.endswith(_ENDS):
                others.append(folder / name)
    yield from _latest_checkpoint(known) or others


def _walk(place: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, folders, names in os.walk(place):
        folders.sort()
        if len(Path(folder).relative_to(place).parts) >= _DEEPEST:
            del folders[:]
        if "run.sqlite" not in names:
            yield Path(folder), sorted(names)


def _latest_checkpoint(found: list[Path]) -> list[Path]:
    """Leave of several trainer_state.json the longest in each folder: checkpoints hold the same log, cut off."""
    latest: dict[Path, Path] = {}
    for path in found:
        if path.name == "trainer_state.json":
            of = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
            if of not in latest or path.stat().st_size > latest[of].stat().st_size:
                latest[of] = path
    return [path for path in found if path.name != "trainer_state.json" or path in latest.values()]


def _is_mlflow(place: Path) -> bool:
    return any(place.glob("*/meta.yaml")) or (place / "meta.yaml").exists()


def _read(path: Path) -> list[Table]:
    """Read one file or store, by what is in it."""
    if path.is_dir():
        return stores.read_mlflow(path) if _is_mlflow(path) else stores.read_tensorboard(path)
    if "tfevents" in path.name:
        return stores.read_tensorboard(path)
    try:
        with path.open("rb") as file:
            is_sqlite = file.read(len(_SQLITE)) == _SQLITE
        if is_sqlite:
            return stores.read_mlflow(path) if "mlflow" in path.name else stores.read_trackio(path)
        text = files.read_text(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    return _read_text(path, text)


def _read_text(path: Path, text: str) -> list[Table]:
    start = text.lstrip()[:1]
    if start in "[{" and start:
        try:
            document = json.loads(text)
        except ValueError:
            return files.read_json_lines(path, text)
        single = files.read_json(path, document)
        return single or files.read_json_lines(path, text)
    readers: tuple[Callable[[Path, str], list[Table]], ...] = (files.read_csv, files.read_lines)
    if path.suffix in (".log", ".txt"):
        readers = readers[::-1]
    for reader in readers:
        tables = [table for table in reader(path, text) if len(table.rows) > 1]
        if tables and all(len(table.counts()) > 1 or len(table.rows) > 2 for table in tables):
            return tables
    return []


def _warn_of_skipped(table: Table) -> None:
    if table.skipped:
        more = len(table.skipped) - _NAMED
        named = "; ".join(table.skipped[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        warnings.warn(f"{table.path}: left out {named}", RuntimeWarning, stacklevel=3)
