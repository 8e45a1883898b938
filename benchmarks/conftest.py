"""How the benchmarks are multiplied out: pass by pass, so that every contender meets every mood of the machine."""

from __future__ import annotations

import pytest

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import DTYPES, WORKLOADS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passes", type=int, default=5, help="how often the whole table is gone through")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    chosen = [
        pytest.param((turn, workload, dtype), contender, id=f"{turn}-{workload}-{dtype}-{contender.name}")
        for turn in range(metafunc.config.getoption("passes"))
        for workload in WORKLOADS
        for dtype in DTYPES
        for contender in CONTENDERS
        if dtype in contender.dtypes and (not contender.only or workload in contender.only)
    ]
    metafunc.parametrize(("case", "contender"), chosen, indirect=["case"])
