"""tracker.step(clip=...) and tracker.clip(): beside torch's clip, against float64, and what is recorded of it."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch
from torch import nn

import pytracker
from pytracker import MaxNorm, Tracker, reference
from pytracker.core import native
from pytracker.errors import ClosedError, InvalidTypeError, InvalidValueError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "reference"])
def core(request, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(native, "_core_for", lambda tensors: reference)
    return request.param


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def give_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)


def exact_norm(model: nn.Module, order: float) -> float:
    elements = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return torch.linalg.vector_norm(elements, order).item()


def clip_within(tracker: Tracker, max_norm: float, order: float | str) -> None:
    tracker.step(loss=0.0, clip=MaxNorm(max_norm, order))


def clip_after(tracker: Tracker, max_norm: float, order: float | str) -> torch.Tensor:
    tracker.step(loss=0.0)
    return tracker.clip(max_norm, order)


@pytest.mark.parametrize("how", [clip_within, clip_after])
@pytest.mark.parametrize("order", [2.0, "inf", 1.0, 3.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula_and_close_to_torchs(core: str, dtype, order, how) -> None:
    ours, torchs = network(dtype), network(dtype)
    norms = []
    with Tracker(ours, every=2, diagnosis=None) as tracker:
        for step, max_norm in enumerate([0.5, 1e6, 0.01]):
            give_gradients(ours, step)
            give_gradients(torchs, step)
            gradients = [p.grad.clone() for p in ours.parameters()]
            norms.append(exact_norm(ours, float(order)))
            returned = how(tracker, max_norm, order)
            expected = nn.utils.clip_grad_norm_(torchs.parameters(), max_norm, order)
            if how is clip_after:
                assert returned.dtype == torch.promote_types(dtype, torch.float32)
                assert returned.item() == pytest.approx(norms[-1], rel=1e-6)
                assert returned.item() == pytest.approx(expected.item(), rel=2e-2 if dtype.itemsize == 2 else 1e-6)
            factor = min(1.0, max_norm / (norms[-1] + 1e-6))
            for p, q, gradient in zip(ours.parameters(), torchs.parameters(), gradients, strict=True):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                formula = (gradient.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype)
                torch.testing.assert_close(p.grad, formula, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0)
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6 if dtype.itemsize > 2 else 2e-2, atol=1e-9)
    assert tracker.history["grad_norm"][:] == pytest.approx([exact_norm_of(seed) for seed in range(3)], rel=1e-2)
    factors = [min(1.0, limit / (norm + 1e-6)) for limit, norm in zip([0.5, 1e6, 0.01], norms, strict=True)]
    assert tracker.history["clip_factor"][:] == pytest.approx(factors, rel=1e-6)
    assert tracker.history["clip_factor"].steps.tolist() == [0, 1, 2]
    assert "step_skipped" not in tracker.history


def exact_norm_of(seed: int) -> float:
    model = network()
    give_gradients(model, seed)
    return exact_norm(model, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_those_of_the_formula_to_the_last_bit(dtype) -> None:
    model = network(dtype)
    give_gradients(model, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    factor = 0.5 / (math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients)) + 1e-6)
    with Tracker(model, diagnosis=None) as tracker:
        tracker.step(clip=0.5)
    assert tracker.history["clip_factor"][:] == pytest.approx([factor], rel=1e-15)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, (gradient.float() * torch.tensor(factor).float()).to(dtype))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_where_no_clip_is_due_no_gradient_is_written() -> None:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)  # writing here would end the process
    parameter = nn.Parameter(torch.zeros(1024))
    parameter.grad = torch.from_numpy(np.frombuffer(page, np.float32))
    with Tracker([parameter], diagnosis=None) as tracker:
        tracker.step(clip=1.0)
        tracker.clip(1.0)
    assert tracker.history["clip_factor"][0] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_to_the_gradients_what_torch_does(core: str, value: float) -> None:
    ours, torchs = network(), network()
    for model in (ours, torchs):
        give_gradients(model, 0)
        model[0].weight.grad[0, 0] = value
    with Tracker(ours, diagnosis=None) as tracker:
        tracker.step(clip=1.0)
    nn.utils.clip_grad_norm_(torchs.parameters(), 1.0)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_every_row_has_its_factor_whenever_it_is_clipped_and_drained(core: str, every: int) -> None:
    model = network()
    with Tracker(model, every=every, diagnosis=None) as tracker:
        for step in range(9):
            give_gradients(model, step)
            tracker.step(loss=float(step))
            if step % 3 != 1:
                tracker.clip(1.0)
            if step == 4:
                tracker.flush()
    history = tracker.history
    assert history["grad_norm"].steps.tolist() == list(range(9))
    assert history["clip_factor"].steps.tolist() == [0, 2, 3, 5, 6, 8]
    norms = np.array(history["grad_norm"][:])[[0, 2, 3, 5, 6, 8]]
    np.testing.assert_allclose(history["clip_factor"][:], 1 / (norms + 1e-6), rtol=1e-12)


def test_a_clip_after_the_row_has_left_is_recorded_all_the_same() -> None:
    model = network()
    with Tracker(model, diagnosis=None) as tracker:
        give_gradients(model, 0)
        tracker.step()
        tracker.flush()
        norm = tracker.clip(0.5)
    assert tracker.history["clip_factor"][:] == [0.5 / (tracker.history["grad_norm"][0] + 1e-6)]
    assert norm.item() == pytest.approx(tracker.history["grad_norm"][0])


def test_the_norm_is_that_of_the_unscaled_gradients_and_the_scaled_ones_are_clipped_alike() -> None:
    model = network(torch.float64)
    give_gradients(model, 0, size=1024.0)
    expected = [p.grad.clone() for p in model.parameters()]
    norm = exact_norm(model, 2) / 1024
    with Tracker(model, diagnosis=None) as tracker:
        tracker.step(grad_scale=1024.0, clip=0.5)
        give_gradients(model, 0, size=1024.0)
        tracker.step(grad_scale=torch.tensor(1024.0), clip=MaxNorm(0.5, 1.0))
        assert tracker.clip(1e9, 1.0).item() == pytest.approx(0.5, rel=1e-6)
    assert tracker.history["grad_norm"][:] == pytest.approx([norm, norm])
    for p, gradient in zip(model.parameters(), expected, strict=True):
        norm_1 = sum(g.abs().sum().item() for g in expected) / 1024
        torch.testing.assert_close(p.grad, gradient * 0.5 / (norm_1 + 1e-6), rtol=1e-9, atol=0)


def test_gradients_that_were_set_anew_between_step_and_clip_are_scaled_where_they_are() -> None:
    model = network()
    give_gradients(model, 0)
    with Tracker(model, diagnosis=None) as tracker:
        tracker.step()
        for p in model.parameters():
            p.grad = p.grad.clone()
        model[0].bias.grad = None
        tracker.clip(0.5)
    factor = tracker.history["clip_factor"][0]
    fresh = network()
    give_gradients(fresh, 0)
    torch.testing.assert_close(model[0].weight.grad, fresh[0].weight.grad * factor)
    assert model[0].bias.grad is None


def test_a_tracker_and_torch_train_alike_for_200_steps(core: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 8, dtype=torch.float64)
    y = (x.sum(1, keepdim=True) * 3) ** 2
    ours, torchs = network(torch.float64), network(torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (ours, torchs)]
    clipped = 0
    with Tracker(ours, optimizer=optimizers[0], every=7, diagnosis=None) as tracker:
        for _ in range(200):
            for model, optimizer in zip((ours, torchs), optimizers, strict=True):
                optimizer.zero_grad()
                loss = (model(x) - y).abs().mean()
                loss.backward()
                if model is ours:
                    tracker.step(loss=loss, clip=1.0)
                else:
                    clipped += nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() > 1
                optimizer.step()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert clipped > 0
    assert sum(np.array(tracker.history["clip_factor"][:]) < 1) == clipped


def test_what_cannot_be_clipped_by_is_refused_before_the_step_counts() -> None:
    model = network()
    give_gradients(model, 0)
    tracker = Tracker(model, diagnosis=None)
    with pytest.raises(InvalidValueError, match="none: call step"):
        tracker.clip(1.0)
    for wrong in ("high", [1.0], object()):
        with pytest.raises(InvalidTypeError, match="clip is"):
            tracker.step(clip=wrong)
    for wrong in (-1.0, math.nan):
        with pytest.raises(InvalidValueError, match=r"clip is .*; expected the largest norm allowed"):
            tracker.step(clip=wrong)
    tracker.step()
    with pytest.raises(InvalidTypeError, match="norm_type is 'high'"):
        tracker.clip(1.0, "high")
    with pytest.raises(InvalidValueError, match="'clip_factor' is recorded by pytracker itself"):
        tracker.step(clip_factor=1.0)
    assert tracker.steps == 2
    tracker.close()
    with pytest.raises(ClosedError):
        tracker.clip(1.0)


def test_a_step_that_cannot_be_read_is_not_clipped_either() -> None:
    model = network()
    give_gradients(model, 0)
    model[0].bias.grad = torch.ones(16).to_sparse()
    model[2].weight = nn.Parameter(torch.zeros(16, dtype=torch.int8), requires_grad=False)
    tracker = Tracker([("w", model[0].weight), ("b", model[0].bias)], diagnosis=None)
    before = model[0].weight.grad.clone()
    with pytest.raises(InvalidTypeError):
        tracker.step(loss="text", clip=1e-3)
    assert torch.equal(model[0].weight.grad, before)
    tracker.step(clip=1e-3)
    assert model[0].bias.grad.is_sparse
    assert model[0].weight.grad.norm() < 1.1e-3
    tracker.close()


def test_parameters_without_gradients_and_no_parameters_at_all_have_nothing_to_clip() -> None:
    tracker = Tracker(network(), diagnosis=None)
    tracker.step(clip=1.0)
    assert tracker.clip(1.0).item() == 0.0
    with pytest.warns(RuntimeWarning, match="no parameter had a gradient"):
        tracker.close()
    with Tracker([], diagnosis=None) as tracker:
        tracker.step(clip=1.0)
        assert tracker.clip(1.0).item() == 0.0


def test_a_clipped_step_leaves_the_compiled_part_of_a_training_whole() -> None:
    model = network()
    tracker = Tracker(model, diagnosis=None)
    compiled = torch.compile(lambda x: model(x).sum(), backend="eager", fullgraph=True)
    compiled(torch.ones(2, 8)).backward()
    tracker.step(clip=1e-3)
    assert exact_norm(model, 2) == pytest.approx(1e-3, rel=1e-3)
    tracker.close()


def test_a_copy_of_clip_grad_norm_and_the_tracker_agree_to_the_bit() -> None:
    ours, other = network(), network()
    give_gradients(ours, 3)
    give_gradients(other, 3)
    with Tracker(ours, diagnosis=None) as tracker:
        tracker.step(clip=0.3)
    pytracker.clip_grad_norm_(other.parameters(), 0.3)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), other.parameters(), strict=True))
