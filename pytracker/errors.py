"""The exceptions of pytracker: a small tree with one root.

Each message says what was wrong (the name and the value) and what to do. Catch ``PytrackerError`` for all of them; each
class is also the built-in exception that a reader would expect (``ValueError``, ``TypeError``, ...), so code that does
not know of pytracker catches the right thing too.
"""

from __future__ import annotations


def in_words(error: BaseException) -> str:
    """Return an exception of any kind as one text, e.g. for a run that it ended."""
    try:
        text = str(error)
    except Exception:  # a class whose own __str__ raises
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class PytrackerError(Exception):
    """Root of every exception that pytracker raises on purpose."""


class InvalidValueError(PytrackerError, ValueError):
    """An argument has the right type and an impossible value (a negative interval, a scalar of two elements, ...)."""


class InvalidTypeError(PytrackerError, TypeError):
    """An argument has a type that the function cannot use."""


class ParameterError(PytrackerError, ValueError):
    """A parameter or its gradient cannot be tracked: unsupported device, dtype or layout, or a name used twice."""


class ClosedError(PytrackerError, RuntimeError):
    """A tracker or a run was used after it had been closed."""


class SeriesIndexError(PytrackerError, IndexError):
    """A series has no value at that place; the message says which series there are, and what may still come."""


class LayoutError(PytrackerError, RuntimeError):
    """How parameters are spread over ranks cannot be told; the message names the argument that says it."""


class RankMismatchError(PytrackerError, RuntimeError):
    """Ranks disagree about what they record (interval, model or number of steps), or a rank is missing at a drain."""


class StoreError(PytrackerError, OSError):
    """A run on disk cannot be read or written."""


class RunNotFoundError(StoreError, FileNotFoundError):
    """There is no run at the path given."""


class RunFormatError(StoreError):
    """The file is not a run: it is damaged, made by another program, or written by a newer version."""


class RunLockedError(StoreError):
    """Another process is writing this run."""


class MissingExtraError(PytrackerError, ImportError):
    """An optional package is needed; the message says which extra installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        """Say what needs which package, and which extra installs it."""
        super().__init__(f"{what} needs the package {package!r}, not installed: pip install 'pytracker[{extra}]'")
