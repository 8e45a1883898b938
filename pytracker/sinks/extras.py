"""The optional packages that sinks mirror to."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingExtraError


def need(what: str, package: str, extra: str) -> None:
    """Make sure that an optional package is installed; it is imported when it is used.

    Raises:
        MissingExtraError: it is not; the message says what to install.
    """
    if find_spec(package) is None:
        raise MissingExtraError(what, package, extra)
