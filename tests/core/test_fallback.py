"""Without the native core the package does the same work, and says once why it is slower."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytracker import reference
from pytracker.core import native

WITHOUT = """
import json, sys, warnings
sys.modules["pytracker._C"] = None  # importing it raises ImportError
import torch, pytracker
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Embedding(4, 2, sparse=True))
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.arange(p.numel()).view(p.shape) / 7)
(model[0](torch.ones(2, 3)).square().sum() + model[1](torch.tensor([1, 1])).square().sum()).backward()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    stats = [pytracker.compute_gradient_stats(model) for _ in range(2)][0]
    meter = pytracker.GradientMeter(model)
    meter.update()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytracker.Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for step in range(5):
            tracker.step(loss=step, late=step if step > 2 else None)
    clipped = pytracker.clip_grad_norm_(model[0], 1.0).item()
    state = torch.zeros(1, 4, dtype=torch.float64)
    torch.ops.pytracker.meter_update_(state, [torch.tensor(2.0)], [torch.tensor(3.0)])
    print(json.dumps({"stats": stats, "meter": meter.compute()["grad_norm"]["mean"], "clipped": clipped,
        "series": tracker.history.to_dict(), "state": state.flatten().tolist(),
        "after": pytracker.compute_gradient_stats(model[0]),
        "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]}))
"""


def run(source: str) -> dict:
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_without_the_native_core_everything_gives_the_same_numbers_and_one_warning() -> None:
    without = run(WITHOUT)
    (warning,) = without.pop("warnings")
    assert "runs without its native core" in warning
    if native.load()[0] is None:
        pytest.skip(f"there is nothing to compare with: {native.load()[1]}")
    with_core = run(WITHOUT.replace('sys.modules["pytracker._C"] = None', ""))
    assert with_core.pop("warnings") == []
    series, expected = without.pop("series"), with_core.pop("series")
    assert list(series) == list(expected)
    for name, values in expected.items():
        assert series[name] == pytest.approx(values, rel=1e-12), name
    for name, value in with_core.items():
        assert without[name] == pytest.approx(value, rel=1e-6), name


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    dtype=st.sampled_from(reference.DTYPES),
    special=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    scale=st.sampled_from([None, 2.0, 1024.0]),
    seed=st.integers(0, 2**31),
)
def test_the_reference_and_the_native_core_agree(
    lengths, dtype, special: float, scale: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    parameters = []
    for length in lengths:
        parameter = nn.Parameter(torch.zeros(length, dtype=dtype))
        if length != 13:  # some have no gradient
            gradient = torch.randn(length, dtype=wide, generator=generator).to(dtype)
            gradient[: length // 5] = special
            parameter.grad = gradient
        parameters.append(parameter)
    names = [str(index) for index in range(len(parameters))]
    divisor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    (fast,) = native.make_plan(parameters, names).reduce(divisor)
    (plain,) = reference.Plan(parameters, names).reduce(divisor)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12, equal_nan=True)
