"""Windows: of a flat gradient that several parameters share (FSDP1), each is measured where it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytracker import reference
from pytracker.columns import SUM_SQ, TOTALS, ZEROS
from pytracker.core import native
from pytracker.errors import ParameterError

PLANS = {"native": native.make_plan, "reference": lambda *given: reference.Plan(*given)}


def rows_of(kind: str, parameter: torch.nn.Parameter, windows: list[tuple[int, int]]) -> np.ndarray:
    names = [str(index) for index in range(len(windows))]
    plan = PLANS[kind]([parameter] * len(windows), names, "gradient", windows)
    (row,) = plan.reduce()
    return row.numpy()[TOTALS:].reshape(len(windows), -1)


@pytest.mark.parametrize("kind", PLANS)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 9), st.sampled_from(["float32", "bfloat16"])
)
def test_each_window_has_its_own_statistics(kind: str, lengths: list[int], rest: int, dtype: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(sum(lengths) + rest, dtype=getattr(torch, dtype)))
    random = torch.Generator().manual_seed(len(parameter))
    parameter.grad = torch.randn(len(parameter), generator=random).round(decimals=1).to(parameter.dtype)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    rows = rows_of(kind, parameter, list(zip(starts, lengths, strict=True)))
    for row, start, length in zip(rows, starts, lengths, strict=True):
        piece = parameter.grad[start : start + length].double().numpy()
        np.testing.assert_allclose(row[SUM_SQ], (piece**2).sum(), rtol=1e-12)
        assert row[ZEROS] == (piece == 0).sum()


@pytest.mark.parametrize("kind", PLANS)
def test_a_window_of_all_reads_all_and_no_gradient_is_missing(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    assert np.isnan(rows_of(kind, parameter, [(0, -1), (1, 2)])).all()
    parameter.grad = torch.arange(5.0)
    assert rows_of(kind, parameter, [(0, -1), (1, 2)])[:, SUM_SQ].tolist() == [30.0, 5.0]


@pytest.mark.parametrize("kind", PLANS)
def test_a_gradient_that_is_not_reduced_yet_is_refused_by_name(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6))
    names, windows = ["first", "second"], [(0, 2), (2, 4)]
    plan = PLANS[kind]([parameter] * 2, names, "gradient", windows)
    parameter.data, parameter.grad = torch.zeros(12), torch.ones(12)
    parameter.data = torch.zeros(6)
    with pytest.raises(ParameterError, match="'first' lies in 12 elements where the rank's shard has 6"):
        plan.reduce()


@pytest.mark.parametrize("kind", PLANS)
def test_what_a_plan_keeps_does_not_tie_a_parameter_to_the_size_that_it_had(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(6))
    plan = PLANS[kind]([parameter] * 2, ["a", "b"], "value", [(0, 2), (2, 4)])
    plan.reduce()
    parameter.data = torch.ones(12)  # as FSDP1 gathers what is sharded
    parameter.flatten().split(6)[0].sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == (12,)
