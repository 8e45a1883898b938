"""Columns on request: what a tracker records of them, against the gradients themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytracker import Run, Tracker, load_run
from pytracker.cli import main
from pytracker.errors import InvalidTypeError, InvalidValueError

BOUNDS = {"subnormal": (-126, -14, -6), "near_max": (126, 14, 7)}
SHARES = [f"{kind}_{name}" for kind in BOUNDS for name in ("bf16", "fp16", "e4m3")]
SERIES = {"l1": ["grad_l1"], "exponents": [f"grad_{name}_fraction" for name in SHARES]}
FIELDS = {"l1": ["l1_mean"], "exponents": [f"{name}_fraction" for name in SHARES]}


def expected(gradient: torch.Tensor) -> list[float]:
    """Return the L1 norm and the counts of one gradient."""
    size = gradient.double().abs().numpy()
    low = [((size > 0) & (size < 2.0**power)).sum() for power in BOUNDS["subnormal"]]
    return [size.sum(), *low, *((size >= 2.0**power).sum() for power in BOUNDS["near_max"])]


@settings(deadline=None, max_examples=25)
@given(
    asked=st.lists(st.sampled_from(["l1", "exponents"]), unique=True),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    every=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_what_is_asked_for_is_recorded_and_nothing_else(asked, sizes, every, seed, data):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    rows = []
    with Tracker(parameters, every=every, diagnosis=None, columns=asked) as tracker:
        for _ in range(7):
            for parameter in parameters:
                powers = torch.randint(-130, 127, parameter.shape, generator=generator)
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 2.0 ** powers.float()
                if data.draw(st.booleans()):
                    parameter.grad = None
            tracker.step()
            rows.append([[math.nan] * 7 if p.grad is None else expected(p.grad) for p in parameters])
    found, there = np.array(rows), ~np.isnan(np.array(rows)[:, :, 0])
    history, elements = tracker.history, np.array(sizes)
    for request in SERIES:
        assert {name in history for name in SERIES[request]} == {request in asked}
        for name, field in zip(SERIES[request], FIELDS[request], strict=True):
            column = [*SERIES["l1"], *SERIES["exponents"]].index(name)
            if request not in asked:
                assert np.isnan(history.parameters.field(field)).all()
                continue
            values = found[:, :, column]
            whole = np.nansum(values, axis=1) / (1 if column == 0 else np.maximum((there * elements).sum(axis=1), 1))
            np.testing.assert_allclose(history[name].values, np.where(there.any(axis=1), whole, np.nan), rtol=1e-12)
            each = values if column == 0 else values / elements
            first, last = history.parameters.first_step, history.parameters.last_step
            for index, (begin, end) in enumerate(zip(first, last, strict=True)):
                seen = there[begin : end + 1].sum(axis=0)
                means = np.nansum(each[begin : end + 1], axis=0) / np.where(seen > 0, seen, np.nan)
                np.testing.assert_allclose(history.parameters.field(field)[index], means, rtol=1e-6)


def test_exponents_are_those_in_memory_and_norms_those_without_the_scale():
    parameter = nn.Parameter(torch.zeros(3))
    with Tracker([parameter], diagnosis=None, columns=["l1", "exponents"]) as tracker:
        parameter.grad = torch.tensor([2.0**-15, 2.0**-13, 4.0])
        tracker.step()
        parameter.grad *= 2.0**12
        tracker.step(grad_scale=2.0**12)
    assert tracker.history["grad_l1"][:] == pytest.approx([4 + 2.0**-13 + 2.0**-15] * 2)
    assert tracker.history["grad_subnormal_fp16_fraction"][:] == pytest.approx([1 / 3, 0])
    assert tracker.history["grad_near_max_fp16_fraction"][:] == pytest.approx([0, 1 / 3])


def test_players_have_each_their_own():
    parts = {name: nn.Parameter(torch.zeros(2)) for name in "GD"}
    with Tracker({name: [part] for name, part in parts.items()}, diagnosis=None, columns=["l1"]) as tracker:
        for step in range(3):
            for name, part in parts.items():
                part.grad = torch.tensor([1.0 + step, -2.0 if name == "G" else 5.0])
                tracker.step(only=name)
        tracker.step()
    assert tracker.history["G/grad_l1"][:] == [3.0, 4.0, 5.0, 5.0]
    assert tracker.history["D/grad_l1"][:] == [6.0, 7.0, 8.0, 8.0]
    assert tracker.history["grad_l1"][:] == [13.0]


def test_they_are_on_disk_and_in_what_is_exported(tmp_path):
    parameter = nn.Parameter(torch.zeros(4))
    with Tracker([("w", parameter)], run=Run(tmp_path, name="a"), every=2, diagnosis=None, columns=["exponents"]) as t:
        for step in range(6):
            parameter.grad = torch.tensor([0.0, 2.0**-20, 1.0, 2.0**10]) * 2.0**step
            t.step()
    history = load_run(tmp_path / "a").history
    np.testing.assert_array_equal(history["grad_near_max_e4m3_fraction"].values, [0.25] * 6)
    np.testing.assert_array_equal(history.parameters.field("subnormal_fp16_fraction")[:, 0], [0.25, 0.25, 0.25])
    assert np.isnan(history.parameters.field("l1_mean")).all()
    result = CliRunner().invoke(main, ["export", str(tmp_path / "a"), "--parameters", "-o", str(tmp_path / "p.csv")])
    assert result.exit_code == 0, result.output
    assert "subnormal_fp16_fraction" in (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[0]


def test_more_scalars_and_another_interval_leave_them_as_they_are():
    parameter = nn.Parameter(torch.zeros(2))
    with Tracker([parameter], every=3, diagnosis=None, columns=["l1"]) as tracker:
        for step in range(8):
            parameter.grad = torch.tensor([float(step), 1.0])
            tracker.step(**{f"s{index}": 1.0 for index in range(4 * step)})
            if step == 4:
                tracker.every = 2
    assert tracker.history["grad_l1"][:] == [step + 1.0 for step in range(8)]


def test_a_model_without_parameters_has_a_norm_of_zero():
    with Tracker([], diagnosis=None, columns=["l1", "exponents"]) as tracker:
        tracker.step(loss=1.0)
    assert tracker.history["grad_l1"][:] == [0.0]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("l1", InvalidTypeError, "columns is 'l1'"),
        (["l2"], InvalidValueError, "columns is 'l2'; expected one of 'l1', 'exponents'"),
        ([1], InvalidTypeError, "columns is 1"),
        (None, InvalidTypeError, "columns is None"),
    ],
)
def test_columns_that_there_are_not_are_refused_before_anything_begins(tmp_path, columns, error, message):
    with pytest.raises(error, match=message):
        Tracker(nn.Linear(2, 1), run=tmp_path, columns=columns)
    assert not list(tmp_path.iterdir())


def test_each_gradient_by_itself_has_no_columns_on_request():
    with pytest.raises(InvalidValueError, match="in_backward"):
        Tracker(nn.Linear(2, 1), in_backward=True, columns=["l1"])


def test_their_names_are_taken_only_where_they_are_asked_for():
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(grad_l1=2.0)
    assert tracker.history["grad_l1"][:] == [2.0]
    with Tracker([], diagnosis=None, columns=["l1"]) as tracker, pytest.raises(InvalidValueError, match="grad_l1"):
        tracker.step(grad_l1=2.0)
