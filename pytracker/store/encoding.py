"""JSON that any program can read, of whatever a config holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

_NAMES_OF = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> str:
    """Return strict JSON. NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".

    Mappings, dataclasses, ``argparse.Namespace``, sequences, sets and numpy scalars keep their content; anything else
    becomes its ``str``.

    >>> encode({"lr": 0.1, "clip": float("inf"), "layers": (1, 2)})
    '{"lr": 0.1, "clip": "Infinity", "layers": [1, 2]}'
    """
    return json.dumps(_plain(value, _NAMES_OF), allow_nan=False, ensure_ascii=False)


def decode(text: str) -> Any:
    """Return what ``encode`` was given, as plain dicts, lists, strings and numbers."""
    return _with_floats(json.loads(text))


def jsonable(value: Any) -> Any:
    """Return ``value`` for a program that reads JSON: as ``encode``, but with None for NaN and infinities.

    >>> jsonable({"loss": float("nan"), "shape": (2, 3)})
    {'loss': None, 'shape': [2, 3]}
    """
    return _plain(value, {})


def _plain(value: Any, nonfinite: Mapping[str, str]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return nonfinite.get(str(float(value)))
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, nonfinite) for item in value]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _plain(value.item(), nonfinite)
    return str(value)


def _with_floats(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return value
