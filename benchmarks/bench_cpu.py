"""Times every contender on every workload, with pytest-benchmark: `make bench`.

The machine may be shared and its speed may drift, so no contender runs all its rounds at once: the whole table is gone
through several times (`--passes`), and table.py joins the rounds of all passes.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders import Call, Contender
from benchmarks.workloads import DTYPES, ELEMENTS, WORKLOADS, Model, exact_norm

SECONDS_PER_CONTENDER = 0.15  # of one pass
SECONDS_PER_ROUND = 0.002  # a round shorter than that would measure the clock
PATIENCE = 3.0  # seconds to wait for others to leave the processor alone


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, str, torch.nn.Module, float]:
    """Return a workload's name, its dtype's name, the model, and the exact norm of its gradients."""
    _pass, workload, dtype = request.param
    model = Model(WORKLOADS[workload], DTYPES[dtype])
    return workload, dtype, model, exact_norm(model)


def idle_share(seconds: float = 0.1) -> float:
    """Return how much of the machine's processors was idle in the next moment."""

    def ticks() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return values[3] + values[4], sum(values[:8])

    idle, total = ticks()
    time.sleep(seconds)
    idle_later, total_later = ticks()
    return (idle_later - idle) / max(1, total_later - total)


def wait_for_quiet() -> None:
    """Wait until next to nobody else uses the processors, though not for ever."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and idle_share() < 0.9:
        pass


def rounds_and_iterations(call: Call) -> tuple[int, int]:
    """Return how often to call: a warm-up tells how long one call takes."""
    call()
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    iterations = max(1, math.ceil(SECONDS_PER_ROUND / seconds))
    return min(30, max(2, round(SECONDS_PER_CONTENDER / (seconds * iterations)))), iterations


def test_speed(
    benchmark: BenchmarkFixture, case: tuple[str, str, torch.nn.Module, float], contender: Contender
) -> None:
    """Check the contender's result, then time it."""
    workload, dtype, model, expected = case
    call = contender.prepare(model)
    result = call()
    if contender.tolerance is not None:
        assert float(result) == pytest.approx(expected, rel=contender.tolerance)
    benchmark.extra_info.update(
        workload=workload,
        dtype=dtype,
        contender=contender.name,
        bytes=ELEMENTS[workload] * DTYPES[dtype].itemsize,
        tensors=len(WORKLOADS[workload]),
    )
    wait_for_quiet()
    rounds, iterations = rounds_and_iterations(call)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
