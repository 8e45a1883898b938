"""Adaptive rules: their limits against the formulas in plain Python, their state, and trainings that they save."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from pytracker import AGC, AutoClip, ClipRule, MaxNorm, Tracker, ZClip
from pytracker.errors import InvalidTypeError, InvalidValueError

NORMS = st.lists(st.floats(1e-3, 1e3) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=60)


def limits_of(rule: ClipRule, norms: list[float]) -> list[float]:
    return [float(rule.limit(torch.tensor([norm], dtype=torch.float64))) for norm in norms]


def zclip_by_hand(norms: list[float], alpha: float, z: float, warmup: int) -> list[float]:
    """The algorithm of the paper with lists and floats; not for norms that rounding alone puts above the threshold."""
    warm: list[float] = []
    mean = variance = 0.0
    limits = []
    for norm in norms:
        limit = math.inf
        if len(warm) >= warmup:
            score = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if math.isfinite(norm):  # the limit jumps there, by z * 1e-6, and what follows depends on it
                assume(abs(norm - mean - z * (math.sqrt(variance) + 1e-6)) > 1e-9 * max(norm, *warm))
            if score > z:
                limit = mean + math.sqrt(variance) * z * z / score
        limits.append(limit)
        taken = min(norm, limit)
        if not math.isfinite(norm):
            continue
        if len(warm) < warmup:
            warm.append(norm)
            mean, variance = float(np.mean(warm)), float(np.var(warm))
        else:
            mean = alpha * mean + (1 - alpha) * taken
            variance = alpha * variance + (1 - alpha) * (taken - mean) ** 2
    return limits


@given(norms=NORMS, alpha=st.floats(0.5, 0.99), z=st.floats(0.5, 4), warmup=st.integers(2, 12))
def test_zclip_limits_are_those_of_the_paper(norms, alpha: float, z: float, warmup: int) -> None:
    expected = zclip_by_hand(norms, alpha, z, warmup)
    got = limits_of(ZClip(alpha, z, warmup), norms)
    for norm, ours, wanted in zip(norms, got, expected, strict=True):
        if math.isfinite(norm):
            assert ours == pytest.approx(wanted, rel=1e-6) or min(ours, wanted) >= norm * (1 - 1e-6)


@given(norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12), z=st.floats(0.5, 4), ulps=st.integers(-3, 3))
def test_zclip_at_its_threshold_clips_by_the_epsilon_of_the_paper_or_not_at_all(norms, z: float, ulps: int) -> None:
    norm = np.mean(norms) + z * (np.std(norms) + 1e-6)
    norm += ulps * np.spacing(norm)
    limit = limits_of(ZClip(z=z, warmup=len(norms)), [*norms, norm])[-1]
    assert limit == math.inf or norm - limit == pytest.approx(z * 1e-6, rel=1e-3)


@given(norms=NORMS, percentile=st.sampled_from([0.0, 10.0, 37.5, 100.0]), window=st.integers(1, 20))
def test_autoclip_limits_are_percentiles_of_the_latest_norms(norms, percentile: float, window: int) -> None:
    got = limits_of(AutoClip(percentile, window), norms)
    for step, limit in enumerate(got):
        known = [norm for norm in norms[: step + 1] if math.isfinite(norm)][-window:]
        if known:
            assert limit == pytest.approx(np.percentile(known, percentile), rel=1e-9)
        else:
            assert limit == math.inf


@given(seed=st.integers(0, 2**31), clipping=st.sampled_from([1e-3, 0.01, 0.5]))
def test_agc_brings_each_gradient_down_to_a_share_of_its_weight(seed: int, clipping: float) -> None:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(5, 3) * size) for size in (0.0, 1e-6, 1.0, 100.0)]
    for p in parameters[1:]:
        p.grad = torch.randn(5, 3)
    parameters[0].grad = torch.full((5, 3), 1.0)
    parameters.append(nn.Parameter(torch.ones(2)))  # has no gradient
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    with Tracker(parameters, diagnosis=None) as tracker:
        tracker.step(clip=AGC(clipping))
    factors = []
    for p, gradient in zip(parameters, before, strict=True):
        if gradient is None:
            assert p.grad is None
            continue
        allowed = clipping * max(p.detach().double().norm().item(), 1e-3)
        factors.append(min(1.0, allowed / gradient.double().norm().item()))
        torch.testing.assert_close(p.grad, gradient * factors[-1], rtol=1e-5, atol=0)
    assert tracker.history["clip_factor"][:] == pytest.approx([min(factors)], rel=1e-9)


@pytest.mark.parametrize("rule", [ZClip(warmup=3), AutoClip(50, window=4)])
def test_a_rule_goes_on_from_its_state(rule: ClipRule) -> None:
    norms = [1.0, 2.0, 1.5, 1.2, 9.0, 1.3, 8.0]
    kind = type(rule)
    whole = kind(**{"warmup": 3} if kind is ZClip else {"percentile": 50, "window": 4})
    expected = limits_of(whole, norms)
    first = limits_of(rule, norms[:4])
    other = kind(**{"warmup": 3} if kind is ZClip else {"percentile": 50, "window": 4})
    other.load_state_dict(rule.state_dict())
    assert first + limits_of(other, norms[4:]) == pytest.approx(expected)
    with pytest.raises(InvalidTypeError, match="state is"):
        MaxNorm(1.0).load_state_dict(rule.state_dict())


@pytest.mark.parametrize("load_first", [True, False])
def test_a_training_that_resumes_clips_as_if_it_had_not_stopped(load_first: bool) -> None:
    def gradient(step: int) -> torch.Tensor:
        size = 50.0 if step % 9 == 8 else 1.0
        return size * (1 + 0.1 * torch.rand(4, generator=torch.Generator().manual_seed(step)))

    def steps(tracker: Tracker, p: nn.Parameter, rule: ClipRule, begin: int, end: int) -> None:
        for step in range(begin, end):
            p.grad = gradient(step)
            tracker.step(clip=rule)

    p = nn.Parameter(torch.zeros(4))
    with Tracker([p], diagnosis=None) as tracker:
        steps(tracker, p, ZClip(warmup=4), 0, 20)
    whole = tracker.history["clip_factor"][:]
    assert min(whole) < 0.1
    with Tracker([p], diagnosis=None) as tracker:
        steps(tracker, p, ZClip(warmup=4), 0, 11)
        state = tracker.state_dict()
    rule = ZClip(warmup=4)
    with Tracker([p], diagnosis=None) as tracker:
        if not load_first:
            tracker.step(clip=rule)  # what comes before the checkpoint is loaded is not of this training
        tracker.load_state_dict(state)
        steps(tracker, p, rule, 11, 20)
        tracker.flush()
        assert tracker.history["clip_factor"][-9:] == pytest.approx(whole[11:])


def test_a_rule_of_ones_own_is_asked_for_each_limit() -> None:
    class Halving(ClipRule):
        def limit(self, norm: torch.Tensor) -> torch.Tensor:
            state = self.remember(norm.device, 8.0)
            state /= 2
            return state.clone()

    p = nn.Parameter(torch.zeros(4))
    rule = Halving()
    with Tracker([p], diagnosis=None) as tracker:
        for step in range(4):
            p.grad = torch.full((4,), 2.0 + step)
            tracker.step(clip=rule)
    norms = [2.0 * (2.0 + step) for step in range(4)]
    expected = [min(1.0, limit / (norm + 1e-6)) for limit, norm in zip([4, 2, 1, 0.5], norms, strict=True)]
    assert tracker.history["clip_factor"][:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ZClip(alpha=1.5), InvalidValueError),
        (lambda: ZClip(z=0), InvalidValueError),
        (lambda: ZClip(warmup=1), InvalidValueError),
        (lambda: ZClip(warmup=2.5), InvalidTypeError),
        (lambda: AutoClip(percentile=101), InvalidValueError),
        (lambda: AutoClip(window=0), InvalidValueError),
        (lambda: AGC(clipping=0), InvalidValueError),
        (lambda: AGC(eps=-1.0), InvalidValueError),
        (lambda: MaxNorm("much"), InvalidTypeError),
        (lambda: MaxNorm(-1), InvalidValueError),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, error) -> None:
    with pytest.raises(error):
        make()


# A network with a few broken batches among good ones, trained at a learning rate that is fine for the good ones.


def loss_after_training(clip: object) -> float:
    """Train for 300 steps; 8 batches have targets a million times too large. Return the loss on clean data at the end.

    Without a clip such a batch throws the weights so far out that tanh is saturated, and nothing is learned any more.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(64, 6, generator=generator)
        return x, x[:, :1] * x[:, 1:2] + x[:, 2:3].sin()

    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        for step in range(300):
            x, y = batch()
            if step >= 40 and step % 33 == 7:
                y = y * 1e6
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            tracker.step(loss=loss, clip=clip)
            optimizer.step()
    with torch.no_grad():
        x, y = batch()
        return (model(x) - y).square().mean().item()


@pytest.mark.parametrize("clip", ["zclip", AutoClip(percentile=75), AGC(0.04)], ids=["zclip", "autoclip", "agc"])
def test_a_training_that_diverges_without_the_rule_is_saved_by_it(clip) -> None:
    without = loss_after_training(None)
    assert math.isnan(without) or without > 100
    assert loss_after_training(clip) < 0.1
