"""torch.ops.pytracker.*: registered as torch wants its operators, and usable inside torch.compile."""

from __future__ import annotations

import math

import pytest
import torch

import pytracker.core.native  # defines the operators
from pytracker.core import operators
from pytracker.errors import InvalidValueError

moments = torch.ops.pytracker.gradient_moments
scale = torch.ops.pytracker.scale_gradients_
update = torch.ops.pytracker.meter_update_

SAMPLES = {
    "moments": (moments, lambda: ([torch.randn(5), torch.randn(2, 3, dtype=torch.float64)],)),
    "moments scaled": (moments, lambda: ([torch.randn(7)], torch.tensor(2.0))),
    "moments of what needs a gradient": (moments, lambda: ([torch.randn(5, requires_grad=True)],)),
    "scale": (scale, lambda: ([torch.randn(5), torch.randn(3)], torch.tensor(0.5, dtype=torch.float64))),
    "meters": (
        update,
        lambda: (
            torch.zeros(2, 4, dtype=torch.float64),
            [torch.tensor(1.0), torch.tensor([2])],
            [torch.tensor(1), torch.tensor(3.0)],
        ),
    ),
}


@pytest.mark.parametrize(("operator", "arguments"), SAMPLES.values(), ids=SAMPLES)
def test_an_operator_keeps_the_rules_of_torch(operator, arguments) -> None:
    torch.library.opcheck(operator.default, arguments())


def test_an_operator_does_not_break_a_compiled_graph() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.sin()
        row = moments([y, x])
        scale([y], (1.0 / row[1].sqrt()).clamp(max=1.0))
        return y * 2, row

    x = torch.randn(100)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x), step(x), strict=True):
        assert torch.equal(got, expected)


def test_a_meter_takes_values_by_weight_and_sets_nan_aside() -> None:
    state = torch.zeros(3, 4, dtype=torch.float64)
    for values in ([1.0, 5.0, math.nan], [2.0, math.inf, 7.0]):
        update(state, [torch.tensor(value) for value in values], [torch.tensor(n) for n in (1, 2.0, 3)])
    assert state.tolist() == [[2.0, 3.0, 2.0, 0.0], [math.inf, math.inf, 4.0, 0.0], [7.0, 21.0, 3.0, 1.0]]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_meter_takes_any_dtype(dtype: torch.dtype) -> None:
    state = torch.zeros(1, 4, dtype=torch.float64)
    update(state, [torch.ones((), dtype=dtype)], [torch.tensor(4.0)])
    assert state.tolist() == [[1.0, 4.0, 4.0, 0.0]]
    update(state, [torch.tensor(4.0)], [torch.ones((), dtype=dtype)])
    assert state.tolist() == [[4.0, 8.0, 5.0, 0.0]]


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_a_weight_of_zero_adds_nothing_to_a_meter(value: float) -> None:
    state = torch.tensor([[7.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    for operator in (update, operators.meter_update_):
        operator(state, [torch.tensor(value)], [torch.tensor(0)])
        assert state[0, 0].item() == pytest.approx(value, nan_ok=True)
        assert state[0, 1:].tolist() == [3.0, 2.0, 0.0]


def test_a_weight_that_is_nan_is_seen_in_the_sum() -> None:
    state = torch.zeros(1, 4, dtype=torch.float64)
    update(state, [torch.tensor(1.0)], [torch.tensor(math.nan)])
    assert state[0, 1:3].isnan().all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: scale([torch.ones(2)], torch.tensor(0.5)), "float64"),
        (
            lambda: scale([torch.ones(1).expand(3)], torch.tensor(0.5, dtype=torch.float64)),
            r"gradients\[0\] is expanded",
        ),
        (lambda: update(torch.zeros(1, 3), [torch.ones(())], [torch.ones(())]), r"shape \[K, 4\]"),
        (lambda: update(torch.zeros(1, 4, dtype=torch.float64), [torch.ones(())], []), "1 values with 0 weights"),
        (lambda: update(torch.zeros(1, 4, dtype=torch.float64), [torch.ones(2)], [torch.ones(())]), r"values\[0\]"),
        (lambda: update(torch.zeros(1, 4, dtype=torch.float64), [torch.ones(())], [torch.ones(2)]), r"weights\[0\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, named: str) -> None:
    if pytracker.core.native.load()[0] is None:
        pytest.skip("the reference does not check what the native core checks")
    with pytest.raises((InvalidValueError, RuntimeError, NotImplementedError), match=named):
        call()
