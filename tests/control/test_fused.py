"""Fused optimizers take the clip's factor by themselves, and skip what is not finite: beside torch's clip and step."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

from pytracker import AGC, Tracker

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return x.to(dtype), ((x.sum(1, keepdim=True) * 2) ** 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_are_those_of_torchs_clip_and_step(name: str, dtype) -> None:
    ours, torchs = network(dtype), network(dtype)
    exact = network(torch.float64)
    models = (ours, torchs, exact)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    with Tracker(ours, optimizer=optimizers[0], every=13, diagnosis=None) as tracker:
        for step in range(200):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                x, y = batch(step, next(model.parameters()).dtype)
                loss = (model(x) - y).abs().mean()
                loss.backward()
                if model is ours:
                    before = [p.grad.clone() for p in model.parameters()]
                    tracker.step(loss=loss, clip=1.0)
                    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
                else:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    assert sum(factor < 1 for factor in tracker.history["clip_factor"][:]) > 50
    assert set(tracker.history["step_skipped"][:]) == {0.0}
    size = max(p.abs().max().item() for p in exact.parameters())
    for p, q, e in zip(ours.parameters(), torchs.parameters(), exact.parameters(), strict=True):
        of_torch = (q - e).abs().max().item()
        assert (p - e).abs().max().item() <= 2 * of_torch + 1e-5 * size


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_recorded_as_skipped(name: str, value: float) -> None:
    model, without = network(), network()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](without.parameters())
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        for step in range(6):
            x, y = batch(step)
            optimizer.zero_grad()
            (model(x) - y).abs().mean().backward()
            if step == 3:
                model[2].bias.grad[0] = value
                before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
            tracker.step(clip=1.0)
            optimizer.step()
            if step == 3:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True))
                for key, values in optimizer.state_dict()["state"].items():
                    assert all(torch.equal(v, before[1][key][n]) for n, v in values.items() if v is not None), key
                continue
            other.zero_grad()
            (without(x) - y).abs().mean().backward()
            nn.utils.clip_grad_norm_(without.parameters(), 1.0)
            other.step()
    assert tracker.history["step_skipped"][:] == [0, 0, 0, 1, 0, 0]
    assert tracker.history["grad_nonfinite"][3] == 1
    for p, q in zip(model.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_without_a_limit_only_steps_that_are_not_finite_are_touched() -> None:
    model, plain = network(), network()
    optimizer, other = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        for step in range(5):
            for each, its in ((model, optimizer), (plain, other)):
                its.zero_grad()
                x, y = batch(step)
                (each(x) - y).square().mean().backward()
                if each is model:
                    tracker.step(clip=math.inf)
                its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert "clip_factor" not in tracker.history
    assert set(tracker.history["step_skipped"][:]) == {0.0}


def test_the_factor_serves_one_step_and_is_gone() -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    tracker = Tracker(model, optimizer=optimizer, diagnosis=None)
    (model(batch(0)[0])).mean().backward()
    tracker.step(clip=1e-4)
    assert optimizer.grad_scale.item() > 1
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    tracker.step(clip=1e-4)
    tracker.close()
    assert not hasattr(optimizer, "grad_scale")
    optimizer.step()


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_grad_scaler_keeps_its_own_flag_and_nothing_is_divided_twice(unscaled_before: bool) -> None:
    model, plain = network(), network()
    optimizer, other = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4) for _ in range(2)]
    with Tracker(model, optimizer=optimizer, every=3, diagnosis=None) as tracker:
        for step in range(20):
            x, y = batch(step)
            for each, its, scaler in ((model, optimizer, scalers[0]), (plain, other, scalers[1])):
                its.zero_grad()
                loss = (each(x) - y).abs().mean()
                scaler.scale(loss).backward()
                if step == 7:
                    each[0].weight.grad[1, 1] = math.inf
                if each is model and not unscaled_before:
                    tracker.step(loss=loss, grad_scale=scaler.get_scale(), clip=1.0)
                else:
                    scaler.unscale_(its)
                    if each is model:
                        tracker.step(loss=loss, clip=1.0)
                    else:
                        nn.utils.clip_grad_norm_(each.parameters(), 1.0)
                scaler.step(its)
                scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert [step for step, skipped in enumerate(tracker.history["step_skipped"][:]) if skipped] == [7]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "cannot take the factor" in record.getMessage()]


def reasons() -> list[tuple[str, object]]:
    model, more = network(), nn.Linear(2, 2)
    return [
        ("the AdamW is not a fused one", torch.optim.AdamW(model.parameters())),
        ("RMSprop takes none", torch.optim.RMSprop(model.parameters())),
        ("the SGD has 2 other parameters besides", OPTIMIZERS["SGD"]([*model.parameters(), *more.parameters()])),
        ("2 parameters are not in the SGD", OPTIMIZERS["SGD"](model[0].parameters())),
    ]


@pytest.mark.filterwarnings("ignore:2 of 4 parameters that require a gradient")
@pytest.mark.parametrize("index", range(4), ids=["plain", "another", "more", "fewer"])
def test_another_optimizer_gets_scaled_gradients_and_it_is_said_once(index: int, caplog) -> None:
    reason, optimizer = reasons()[index]
    model_parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tracked = model_parameters[:4] if index != 3 else [*model_parameters, *network()[2].parameters()]
    with caplog.at_level(logging.INFO, "pytracker"), Tracker(tracked, optimizer=optimizer, diagnosis=None) as tracker:
        for _ in range(3):
            for p in tracked:
                p.grad = torch.ones_like(p)
            tracker.step(clip=1e-3)
    assert told(caplog) == [f"a clip scales the gradients, since the optimizer cannot take the factor: {reason}"]
    assert sum((p.grad**2).sum() for p in tracked).sqrt() == pytest.approx(1e-3, rel=1e-3)
    assert "step_skipped" not in tracker.history


def test_a_rule_with_factors_of_their_own_scales_the_gradients_of_a_fused_optimizer_too() -> None:
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        (1000 * model(batch(0)[0])).mean().backward()
        tracker.step(clip=AGC())
        assert not hasattr(optimizer, "grad_scale")
    for p in model.parameters():
        assert p.grad.norm() <= 0.01 * p.norm() * (1 + 1e-5)
