"""The native core is what the types of the seam say; mypy says the same of the reference."""

from __future__ import annotations

import inspect
import re

import pytest

from pytracker import contract
from pytracker.core import native

CLASSES = ("Plan", "StepReader", "StepLog", "ModuleWatch")
CORE, _reason = native.load()


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.skipif(CORE is None, reason=f"there is no native core: {_reason}")
@pytest.mark.parametrize("name", CLASSES)
def test_the_native_core_has_just_what_the_contract_has(name: str) -> None:
    promised, native_class = getattr(contract, name), getattr(CORE, name)
    assert public(native_class) == public(promised)
    for member in public(promised):
        expected, found = inspect.getattr_static(promised, member), inspect.getattr_static(native_class, member)
        if isinstance(expected, property):
            assert isinstance(found, property), member
            continue
        arguments = re.match(r"\w+\((.*)\) ->", found.__doc__).group(1)
        names = re.findall(r"(\w+): ", re.sub(r"\[[^\]]*\]", "", arguments))
        assert names == list(inspect.signature(expected).parameters), member
