"""What the step path asks of the device: counted by the simulator."""

from __future__ import annotations

import pytest
import torch
from cuda_helpers import DTYPES, assert_moments, make_plan, with_gradient

import pytracker

cudasim = pytest.importorskip("cudasim")
pytestmark = pytest.mark.simulated

STEPS = 20


def small_model() -> torch.nn.Module:
    """Return an MLP on the device with gradients; no kernel of torch runs for it."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).cuda()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).cuda()
    return model


def test_a_step_of_the_tracker_is_one_launch_and_nothing_else():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, correct = torch.tensor(0.5).cuda(), torch.tensor(31).cuda()
    with pytracker.Tracker(model, optimizer=optimizer, every=1000, diagnosis=None) as tracker:
        tracker.step(loss=loss, accuracy=correct, n=32)
        for _ in range(STEPS):
            with cudasim.expect(launches=1, blocking=0, h2d=0, d2h=0, allocations=0, kernels={"gradients_kernel": 1}):
                tracker.step(loss=loss, accuracy=correct, n=32)


def test_the_tracker_copies_once_for_each_interval_and_never_waits():
    model = small_model()
    loss = torch.tensor(0.5).cuda()
    with pytracker.Tracker(model, every=5, diagnosis=None) as tracker:
        for _ in range(10):
            tracker.step(loss=loss)
        torch.cuda.synchronize()
        with cudasim.expect(launches=STEPS, blocking=0, h2d=0, d2h=STEPS // 5, allocations=0):
            for _ in range(STEPS):
                tracker.step(loss=loss)
    assert len(tracker.history["loss"]) == 10 + STEPS


def test_an_update_of_a_gradient_meter_is_one_launch_and_nothing_else():
    meter = pytracker.GradientMeter(small_model(), every=1000)
    meter.update()
    with cudasim.expect(launches=STEPS, blocking=0, h2d=0, d2h=0, allocations=0):
        for _ in range(STEPS):
            meter.update()


def test_an_update_of_an_average_meter_is_one_launch_and_nothing_else():
    meter, loss = pytracker.AverageMeter(), torch.tensor(0.5).cuda()
    meter.update(loss)
    with cudasim.expect(launches=STEPS, blocking=0, h2d=0, d2h=0, allocations=0):
        for _ in range(STEPS):
            meter.update(loss, n=8)


def test_a_weight_on_the_device_is_used_there():
    meter, loss, tokens = pytracker.AverageMeter(), torch.tensor(0.5).cuda(), torch.tensor(8).cuda()
    meter.update(loss, tokens)
    with cudasim.expect(launches=2 * STEPS, blocking=0, h2d=0, d2h=0, allocations=0):
        for _ in range(STEPS):
            meter.update(loss, tokens)
            meter.update(0.5, tokens)


def test_clipping_is_two_launches_and_no_wait():
    parameters = list(small_model().parameters())
    pytracker.clip_grad_norm_(parameters, 1.0)
    with cudasim.expect(blocking=0, h2d=0, d2h=0, kernels={"gradients_kernel": 1, "scale_kernel": 1}):
        pytracker.clip_grad_norm_(parameters, 1.0)


def test_gradients_that_move_appear_and_vanish_cost_nothing():
    model = small_model()
    plan = make_plan(list(model.parameters()))
    spare = [torch.randn(p.shape).cuda() for p in model.parameters()]
    plan.reduce(None)
    for parameter, other in zip(model.parameters(), spare, strict=True):
        for gradient in (None, other):
            parameter.grad = gradient
            with cudasim.expect(launches=1, blocking=0, h2d=0, d2h=0, allocations=0):
                row = plan.reduce(None)
            del row


def sparse_gradient(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a gradient on the device with values in so many rows of 1,000, and the same on the host, dense."""
    indices, values = torch.arange(rows)[None] * 2, torch.randn(rows, 16)
    dense = torch.zeros(1000, 16)
    dense[indices[0]] = values
    sparse = torch.sparse_coo_tensor(indices.cuda(), values.cuda(), (1000, 16), is_coalesced=True)
    return sparse, dense


def test_sparse_gradients_whose_number_of_values_changes_cost_one_small_copy():
    tensors = [torch.nn.Parameter(torch.empty(1000, 16, device="cuda")), with_gradient(torch.randn(5000))]
    plan = make_plan(tensors)
    other = tensors[1].grad.cpu()
    counts = [100, 130, 7, 200, 33, 0, 211, 64, 180, 1, 90, 222]
    gradients = [sparse_gradient(count) for count in counts]
    rows = []
    for turn, (sparse, _) in enumerate(gradients):
        tensors[0].grad = sparse
        if turn < 4:  # the tables grow, and torch keeps pinned memory
            rows += plan.reduce(None)
            torch.cuda.synchronize()
            continue
        with cudasim.count(synchronize=False) as counted:
            rows += plan.reduce(None)
        assert counted["launch_calls"] == 1
        assert not counted["blocking"]
        assert sum(copy["count"] for copy in counted["memcpy"].values()) == 1
        assert not [name for name in counted["calls"] if name.startswith(("cudaMalloc", "cudaMemset"))]
    for row, (_, dense) in zip(rows, gradients, strict=True):  # none of which had run
        got = row.cpu().numpy()[7:].reshape(-1, 6)
        assert_moments(got[0], dense)
        assert_moments(got[1], other)


def test_compute_gradient_stats_is_one_launch_and_one_copy_to_the_host():
    model = small_model()
    pytracker.compute_gradient_stats(model)
    with cudasim.expect(launches=1, h2d=0, d2h=1, allocations=0):
        pytracker.compute_gradient_stats(model)


@pytest.mark.parametrize(("tensors", "launches"), [(1, 1), (2000, 1), (3840, 1), (5000, 2), (10000, 3)])
def test_launches_grow_only_beyond_3840_tensors(tensors, launches):
    plan = make_plan([with_gradient(torch.ones(8)) for _ in range(tensors)])
    plan.reduce(None)
    with cudasim.expect(launches=launches, blocking=0, h2d=0, d2h=0, allocations=0):
        plan.reduce(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_once(dtype):
    numel = 64 * 2**20 // dtype.itemsize
    plan = make_plan([with_gradient(torch.ones(numel, dtype=dtype))])
    plan.reduce(None)
    with cudasim.count() as counted:
        plan.reduce(None)
    (kernel,) = (counts for name, counts in counted["kernels"].items() if "gradients_kernel" in name)
    assert kernel["global_load_bytes"] <= 1.02 * numel * dtype.itemsize
    assert 32 * kernel["global_load_sectors"] <= 1.02 * numel * dtype.itemsize
    assert kernel["local_load_bytes"] == kernel["local_store_bytes"] == 0  # no spills
    budget = {torch.float32: 10.2, torch.bfloat16: 8, torch.float16: 8}
    assert kernel["thread_instructions"] <= budget.get(dtype, 100) * numel


def test_a_factor_of_one_reads_no_gradient():
    numel = 2**20
    plan = make_plan([with_gradient(torch.ones(numel))])
    factor = torch.ones((), dtype=torch.float64).cuda()
    plan.scale(factor)
    with cudasim.count() as counted:
        plan.scale(factor)
    (kernel,) = counted["kernels"].values()
    assert kernel["global_load_bytes"] < numel
    assert kernel["global_store_bytes"] == 0
