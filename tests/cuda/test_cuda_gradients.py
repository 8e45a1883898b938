"""The CUDA back end through torch: the gradients that a training can have, against a float64 oracle."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from cuda_helpers import DTYPES, SIMULATED, assert_moments, make_plan, moments, parameter, reduce, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

import pytracker
from pytracker.columns import ABS_MAX, SUM_SQ, ZEROS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12), st.integers(0, 10**6), st.integers(0, 9))
def test_moments_of_any_sizes_and_alignments(dtype, sizes, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    values, parameters = [], []
    for size in sizes:
        base = torch.randn(offset + size, generator=generator, dtype=torch.float64).to(dtype)
        tensor = parameter(base[offset:])
        tensor.grad = base.cuda()[offset:]
        values.append(base[offset:])
        parameters.append(tensor)
    totals, rows = reduce(make_plan(parameters))
    for row, value in zip(rows, values, strict=True):
        assert_moments(row, value)
    assert_moments(totals[:6], torch.cat(values))
    np.testing.assert_allclose(totals[6], max(moments(value)[1] for value in values), rtol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_or_inf_reaches_the_norm_and_is_counted(dtype, value):
    values = torch.randn(3000, dtype=torch.float64).to(dtype)
    values[[0, 1500, 2999]] = value
    _, rows = reduce(make_plan([with_gradient(values)]))
    assert_moments(rows[0], values)


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-19, 1e19, 1e30, 1e38])
def test_no_magnitude_of_fp32_overflows_or_vanishes(magnitude):
    values = torch.linspace(-1, 1, 4000).double().mul(magnitude).float()
    _, rows = reduce(make_plan([with_gradient(values)]))
    assert_moments(rows[0], values)


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return views of a [40, 30, 8] tensor, dense and not."""
    return {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(2, 0, 1),
        "every second": base[:, ::2],
        "a corner": base[3:20, 5:9, 1:],
        "a column": base[:, 3, 2],
        "expanded": base[:1].expand(40, 30, 8),
        "a scalar, expanded": base[0, 0, :1].expand(17),
        "0-d": base[1, 2, 3],
        "empty": base[:0],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(views(torch.zeros(40, 30, 8))))
def test_views_are_read_in_place(dtype, name):
    base = torch.randn(40, 30, 8, dtype=torch.float64).to(dtype)
    on_host, on_device = views(base)[name], views(base.cuda())[name]
    tensor = parameter(on_host)
    tensor.grad = on_device
    _, rows = reduce(make_plan([tensor]))
    assert_moments(rows[0], on_host)


def test_a_missing_gradient_is_missing_and_not_zero():
    values = [torch.randn(n) for n in (10, 20000, 10, 30000)]
    parameters = [with_gradient(value) for value in values]
    plan = make_plan(parameters)
    for missing in ((), (0,), (1,), (1, 3), (0, 1, 2, 3), ()):
        for i, (tensor, value) in enumerate(zip(parameters, values, strict=True)):
            tensor.grad = None if i in missing else value.cuda()
        totals, rows = reduce(plan)
        assert np.isnan(rows).all(axis=1).nonzero()[0].tolist() == list(missing)
        present = [value for i, value in enumerate(values) if i not in missing]
        assert_moments(totals[:6], torch.cat(present) if present else torch.zeros(0))


def test_a_sparse_gradient_counts_what_it_does_not_store_as_zeros():
    indices, stored = torch.tensor([[0, 7, 100]]), torch.randn(3, 16)
    tensor = parameter(torch.zeros(1000, 16))
    if SIMULATED:  # no kernel of torch runs that checks the indices or coalesces
        tensor.grad = torch.sparse_coo_tensor(
            indices.cuda(), stored.cuda(), (1000, 16), is_coalesced=True, check_invariants=False
        )
    else:
        tensor.grad = torch.sparse_coo_tensor(indices.repeat(1, 2).cuda(), (stored / 2).repeat(2, 1).cuda(), (1000, 16))
    dense = torch.zeros(1000, 16)
    dense[indices[0]] = stored
    _, rows = reduce(make_plan([tensor]))
    assert_moments(rows[0], dense)


def test_dtypes_mix_in_one_launch_and_may_change_between_steps():
    plan = None
    parameters = [parameter(torch.zeros(300)) for _ in DTYPES]
    for shift in range(3):
        values = [torch.randn(300, dtype=torch.float64).to(DTYPES[(i + shift) % 6]) for i in range(6)]
        for tensor, value in zip(parameters, values, strict=True):
            tensor.data = torch.empty(300, dtype=value.dtype, device="cuda")
            tensor.grad = value.cuda()
        plan = plan or make_plan(parameters)
        _, rows = reduce(plan)
        for row, value in zip(rows, values, strict=True):
            assert_moments(row, value)


@pytest.mark.parametrize("count", [1, 300, 301, 302, 3840, 5000])
def test_any_number_of_tensors(count):
    values = [torch.full((1 + i % 50,), float(i)) for i in range(count)]
    flat = torch.cat(values)
    totals, rows = reduce(make_plan([with_gradient(value) for value in values]))
    assert_moments(totals[:6], flat)
    for i in {0, count // 2, count - 1}:
        assert_moments(rows[i], values[i])


def test_the_scale_of_a_grad_scaler_divides_the_statistics():
    values = torch.randn(5000)
    plan = make_plan([with_gradient(values * 4096)])
    for scale in (torch.tensor(4096.0), torch.tensor(4096.0).cuda(), torch.tensor(4096.0, dtype=torch.float64).cuda()):
        _, rows = reduce(plan, scale)
        assert_moments(rows[0], values)


def test_the_original_keys_come_back_as_floats():
    values = [torch.randn(1000), torch.randn(70000)]
    stats = pytracker.compute_gradient_stats([with_gradient(value) for value in values])
    norms = [value.double().norm().item() for value in values]
    assert stats == pytest.approx({"grad_norm": math.hypot(*norms), "grad_max": max(norms)}, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [0.01, 10.0])
def test_clipping_scales_as_torch_does_and_leaves_what_is_within_bounds(dtype, factor):
    values = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (1, 999, 20000)]
    parameters = [with_gradient(value) for value in values]
    norm = math.sqrt(sum(value.double().norm().item() ** 2 for value in values))
    got = pytracker.clip_grad_norm_(parameters, max_norm=norm * factor)
    epsilon, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert got.dtype == torch.promote_types(dtype, torch.float32)  # halves could not hold it
    assert got.item() == pytest.approx(norm, rel=max(epsilon, 1e-7))
    scale = min(1.0, norm * factor / (norm + 1e-6))
    for tensor, value in zip(parameters, values, strict=True):
        want = value if scale == 1 else value.double() * scale
        tolerance = max(4 * epsilon, 1e-14)  # the factor is as exact as the norm: 1e-14 for float64
        torch.testing.assert_close(tensor.grad.cpu().double(), want.double(), rtol=tolerance, atol=tiny)


def test_a_meter_takes_a_value_of_any_dtype_and_leaves_a_nan_out():
    meter = pytracker.AverageMeter()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64):
        meter.update(torch.tensor(2, dtype=dtype).cuda(), n=3)
    meter.update(torch.tensor(math.nan).cuda())
    assert (meter.sum, meter.count, meter.avg, meter.nans) == (30, 15, 2, 1)
    assert math.isnan(meter.val)


def test_a_meter_takes_a_weight_that_lies_on_the_device():
    meter = pytracker.AverageMeter("Loss", ":.2f")
    for val, n in ((torch.tensor(2.0).cuda(), torch.tensor(3).cuda()), (4.0, torch.tensor(1.0).cuda()), (4.0, 2)):
        meter.update(val, n)
    meter.update(torch.tensor(math.inf).cuda(), torch.tensor(0).cuda())
    meter.update(torch.tensor(math.nan).cuda(), 0)
    assert (meter.sum, meter.count, meter.avg, meter.nans) == (18, 6, 3, 0)
    twin = copy.deepcopy(meter)
    meter.update(torch.tensor(3.0).cuda())
    meter.count = 2
    assert (meter.sum, meter.avg, twin.avg) == (21, 10.5, 3)
    assert str(meter) == "Loss 3.00 (10.50)"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gradients_on_two_devices_and_the_host_are_reduced_where_they_are():
    values = [torch.randn(3000) for _ in range(6)]
    devices = ["cuda:0", "cuda:1", "cpu"] * 2
    parameters = [with_gradient(value, device) for value, device in zip(values, devices, strict=True)]
    stats = pytracker.compute_gradient_stats(parameters)
    assert stats["grad_norm"] == pytest.approx(torch.cat(values).double().norm().item(), rel=1e-7)
    rows = make_plan(parameters).reduce(None)
    assert [str(row.device) for row in rows] == ["cuda:0", "cuda:1", "cpu"]
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tracker_of_a_model_on_two_devices_and_the_host_has_the_statistics_of_one():
    devices = ["cuda:0", "cuda:1", "cpu"] * 2
    values = [[torch.randn(900 + 7 * index) for index in range(len(devices))] for _ in range(5)]
    for step in values:
        for value in step:
            value[::9] = 0
    named = [
        (f"p{index}", torch.nn.Parameter(value.to(device)))
        for index, (value, device) in enumerate(zip(values[0], devices, strict=True))
    ]
    with pytracker.Tracker(named, every=2, diagnosis=None) as tracker:
        for step, gradients in enumerate(values):
            for (_, tensor), gradient in zip(named, gradients, strict=True):
                tensor.grad = gradient.to(tensor.device)
            tracker.step(loss=step)
    expected = np.array([[moments(gradient) for gradient in step] for step in values])
    steps, rows = tracker.history.parameters.rows()
    assert steps.tolist() == tracker.history["loss"][:] == list(range(5))
    np.testing.assert_allclose(rows[:, :, SUM_SQ:], expected[:, :, SUM_SQ:], rtol=1e-6)
    sizes = np.array([[gradient.abs().sum().item() for gradient in step] for step in values])
    assert (np.abs(rows[:, :, 0] - expected[:, :, 0]) <= 1e-7 * sizes).all()  # of a sum whose terms cancel
    totals = {
        "grad_norm": np.sqrt(expected[:, :, SUM_SQ].sum(axis=1)),
        "grad_max": np.sqrt(expected[:, :, SUM_SQ].max(axis=1)),
        "grad_abs_max": expected[:, :, ABS_MAX].max(axis=1),
        "grad_zero_fraction": expected[:, :, ZEROS].sum(axis=1) / sum(map(len, values[0])),
    }
    for name, exact in totals.items():
        np.testing.assert_allclose(tracker.history[name].values, exact, rtol=1e-6, err_msg=name)
    weights = [value.double().norm().item() for value in values[0]]
    np.testing.assert_allclose(tracker.history.parameters.field("weight_norm")[0], weights, rtol=1e-6)
