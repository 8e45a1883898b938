"""Things that the tests of the record share."""

from __future__ import annotations

import numpy as np
import pytest

from pytracker.parameters import ParameterInfo

NAMES = ("conv.weight", "conv.bias", "head.weight")


@pytest.fixture
def infos() -> list[ParameterInfo]:
    """Three parameters of a small network."""
    shapes = ((8, 1, 3, 3), (8,), (10, 8))
    return [
        ParameterInfo(name, shape, "float32", "0", int(np.prod(shape)))
        for name, shape in zip(NAMES, shapes, strict=True)
    ]
