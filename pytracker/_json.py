"""Encodes whatever a config holds as JSON that any program can read. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Final

from ._checks import shown, writable
from .errors import InvalidValueError

_NAMES_OF = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

DEEPEST: Final = 64
"""Levels of lists and dictionaries in a document: enough for any config, and far from the limits of recursion."""

LONGEST: Final = 16 * 2**20
"""Characters of a document."""

_BITS: Final = 1024  # of an integer; Python doesn't print those of more than 4300 digits


def encode(value: Any, name: str = "value") -> str:
    """Return strict JSON. NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".

    Mappings, dataclasses, ``argparse.Namespace``, sequences, sets and numpy scalars keep their content; anything else
    becomes its ``str``. A lone surrogate, as in a path that is not UTF-8, is escaped.

    Raises:
        InvalidValueError: the value contains itself, is too deep or too long, or has something without a text.

    >>> encode({"lr": 0.1, "clip": float("inf"), "layers": (1, 2)})
    '{"lr": 0.1, "clip": "Infinity", "layers": [1, 2]}'
    """
    encoded = json.dumps(_plain(value, _NAMES_OF, name, DEEPEST), allow_nan=False, ensure_ascii=False)
    if len(encoded) > LONGEST:
        raise InvalidValueError(f"{name} has {len(encoded)} characters as JSON; at most {LONGEST} can be kept")
    return encoded


def decode(text: str) -> Any:
    """Return what ``encode`` was given, as plain dicts, lists, strings and numbers.

    Raises:
        ValueError: it is not JSON, or deeper than ``encode`` writes.
    """
    if not isinstance(text, str):
        raise ValueError(f"a document is {shown(text)}, of type {type(text).__name__}")
    try:
        return _with_floats(json.loads(text), DEEPEST)
    except RecursionError:
        raise ValueError(_too_deep("a document")) from None


def jsonable(value: Any) -> Any:
    """Return ``value`` for a program that reads JSON: as ``encode``, but with None for NaN and infinities.

    >>> jsonable({"loss": float("nan"), "shape": (2, 3)})
    {'loss': None, 'shape': [2, 3]}
    """
    return _plain(value, {}, "value", DEEPEST)


def _plain(value: Any, nonfinite: Mapping[str, str], name: str, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, int):
        if value.bit_length() > _BITS:
            raise InvalidValueError(f"{name} has an integer of {value.bit_length()} bits; at most {_BITS} can be kept")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else nonfinite.get(str(float(value)))
    return _plain_parts(value, nonfinite, name, levels)


def _plain_parts(value: Any, nonfinite: Mapping[str, str], name: str, levels: int) -> Any:
    if levels == 0:
        raise InvalidValueError(_too_deep(name))
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_text(key, name): _plain(item, nonfinite, name, levels - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, nonfinite, name, levels - 1) for item in value]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        item = value.item()
        return _text(value, name) if type(item) is type(value) else _plain(item, nonfinite, name, levels - 1)
    return _text(value, name)


def _text(value: Any, name: str) -> str:
    try:
        return writable(str(value))
    except Exception as error:  # a __str__ of the user's
        raise InvalidValueError(
            f"{name} has {shown(value)}, of type {type(value).__name__}, whose text can't be had: {error!r:.80}"
        ) from error


def _too_deep(name: str) -> str:
    return f"{name} contains itself, or has more than {DEEPEST} levels"


def _with_floats(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return _NAMES[value] if value in _NAMES else writable(value)
    if isinstance(value, (dict, list)) and levels == 0:
        raise ValueError(_too_deep("a document"))
    if isinstance(value, dict):
        return {writable(key): _with_floats(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item, levels - 1) for item in value]
    return value
