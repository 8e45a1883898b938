"""Manages finished runs: tags, notes, renaming, removal."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import InvalidTypeError, InvalidValueError, RunNotFoundError, StoreError
from ..store import RunLock, checked_name

NOTES_NAME: Final = "notes.json"
_FILE: Final = "run.sqlite"
_LARGEST: Final = 2**20  # bytes of notes that are read
_FILES: Final = (_FILE, f"{_FILE}-wal", f"{_FILE}-shm", f"{_FILE}-journal", "run.lock", NOTES_NAME)


def read_notes(run: Path) -> dict[str, Any]:
    """Return what people said of a run: "tags" (a list of texts), "note", "group"; empty where nothing, or no sense."""
    try:
        if not (run / NOTES_NAME).is_file():  # a pipe would be waited for
            return {}
        with open(run / NOTES_NAME, encoding="utf-8") as file:
            text = file.read(_LARGEST)
        given = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(given, dict):
        return {}
    notes: dict[str, Any] = {name: given[name] for name in ("note", "group") if isinstance(given.get(name), str)}
    tags = given.get("tags")
    if isinstance(tags, list) and tags:
        notes["tags"] = [tag for tag in tags if isinstance(tag, str)]
    return notes


def annotate_run(
    run: str | os.PathLike[str],
    *,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    note: str | None = None,
    group: str | None = None,
) -> dict[str, Any]:
    """Tag a run, or write a note to it, also while a training writes it; return all notes that it has then.

    They lie in a file of their own, ``notes.json``, beside the run's.

    Args:
        run: the run's folder.
        add: tags to add.
        remove: tags to take away.
        note: a text; "" takes the note away.
        group: the name of a group of runs; "" takes the run out of its group.

    Raises:
        RunNotFoundError: there is no run.
        InvalidTypeError: a tag, note or group is not a text.
        InvalidValueError: a tag is empty, or has a comma or a control character in it.
        StoreError: the notes cannot be written.

    >>> import tempfile
    >>> from pytracker.store import Run
    >>> with Run(tempfile.mkdtemp()) as run:
    ...     run.log(0, loss=1.0)
    >>> annotate_run(run.path, add=["paper", "best"], note="the one in figure 3")
    {'tags': ['paper', 'best'], 'note': 'the one in figure 3'}
    >>> annotate_run(run.path, remove=["best"], note="")
    {'tags': ['paper']}
    """
    path = _existing(run)
    added, removed = [_checked_tag(tag) for tag in add], set(remove)
    notes = read_notes(path)
    tags = [tag for tag in dict.fromkeys([*notes.pop("tags", []), *added]) if tag not in removed]
    notes = ({"tags": tags} if tags else {}) | notes
    for name, text in (("note", note), ("group", group)):
        if text is None:
            continue
        if not isinstance(text, str):
            raise InvalidTypeError(f"{name}: expected a str, got {type(text).__name__} {text!r:.80}")
        notes.pop(name, None)
        notes |= {name: text} if text else {}
    scratch = path / f"{NOTES_NAME}.{os.getpid()}"
    try:
        scratch.write_text(json.dumps(notes), encoding="utf-8")
        scratch.replace(path / NOTES_NAME)
    except OSError as error:
        raise StoreError(f"the notes of {path} cannot be written: {error}") from error
    return notes


def rename_run(run: str | os.PathLike[str], name: str) -> Path:
    """Give a run another name, which is that of its folder, and return its new path.

    Raises:
        RunNotFoundError: there is no run.
        RunLockedError: a process writes it.
        InvalidValueError: the name cannot be a folder's, or is taken.
        StoreError: the folder cannot be renamed.
    """
    path = _existing(run)
    target = path.with_name(checked_name(name))
    if target.exists():
        raise InvalidValueError(f"name: {name!r} is taken: {target}")
    with _not_written(path), _as_store_error(f"{path} cannot be renamed"):
        path.rename(target)
    return target


def delete_run(run: str | os.PathLike[str]) -> list[str]:
    """Take a run away for good; return the names of files in its folder that are not the run's, and stay.

    Raises:
        RunNotFoundError: there is no run.
        RunLockedError: a process writes it.
        StoreError: it cannot be deleted.
    """
    path = _existing(run)
    with _not_written(path), _as_store_error(f"{path} cannot be deleted"):
        for name in _FILES:
            (path / name).unlink(missing_ok=True)
        left = sorted(child.name for child in path.iterdir())
        if not left:
            path.rmdir()
    return left


def _existing(run: str | os.PathLike[str]) -> Path:
    path = Path(run)
    if not (path / _FILE).exists():
        raise RunNotFoundError(f"there is no run at {path}: {path / _FILE} does not exist")
    return path.absolute()


def _checked_tag(tag: Any) -> str:
    if not isinstance(tag, str):
        raise InvalidTypeError(f"tag: expected a str, got {type(tag).__name__} {tag!r:.80}")
    if not tag.strip() or not tag.isprintable() or "," in tag:
        raise InvalidValueError(f"tag: expected a text without commas and control characters, got {tag!r:.80}")
    return tag


@contextlib.contextmanager
def _not_written(path: Path) -> Iterator[None]:
    with _as_store_error(f"{path} cannot be locked"):
        lock = RunLock(path, path.name)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _as_store_error(message: str) -> Iterator[None]:
    try:
        yield
    except StoreError:  # an OSError too
        raise
    except OSError as error:
        raise StoreError(f"{message}: {error}") from error
