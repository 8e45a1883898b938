"""Trainings of the kinds that users have, healthy and troubled alike: small, quick, and on real data where it matters.

None of them set a threshold of a rule. ``HEALTHY`` must be silent (a warning is wrong); each of ``TROUBLED`` says which
rules may rightly name it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from . import data as data_sets
from . import models
from .fit import Change, Trained, fit

Training = Callable[[Change], Trained]


@dataclass(frozen=True)
class Kind:
    """A kind of training, and the rules that may rightly name what is wrong with it; none for a healthy one."""

    name: str
    train: Training
    right: frozenset[str] = frozenset()


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = data_sets.load("digits")
    return data.x, data.y, data.x_val, data.y_val


def _batches(x: Tensor, y: Tensor, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        picked = torch.randint(0, len(x), (size,), generator=torch.Generator().manual_seed(step))
        return x[picked], y[picked]

    return batch


def _adam(model: nn.Module, **options: float) -> Callable[[float], torch.optim.Optimizer]:
    return lambda lr: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, **options)


def _sgd(model: nn.Module, **options: float) -> Callable[[float], torch.optim.Optimizer]:
    return lambda lr: torch.optim.SGD(model.parameters(), lr, **options)


def _classify(model: nn.Module, make: Callable[[float], torch.optim.Optimizer], change: Change, **options) -> Trained:
    """Train a classifier of digits; what is not said in ``options`` is usual."""
    x, y, x_val, y_val = options.pop("data", None) or _digits()
    batch = _batches(x, y, options.pop("batch", 32))
    criterion = options.pop("criterion", F.cross_entropy)

    def batch_loss(step: int) -> Tensor:
        inputs, targets = batch(step)
        return criterion(model(inputs), targets)

    def evaluate() -> dict[str, float]:
        out = model(x_val)
        return {
            "val_loss": F.cross_entropy(out, y_val).item(),
            "val_accuracy": (out.argmax(1) == y_val).double().mean().item(),
        }

    return fit(
        model,
        make,
        batch_loss,
        options.pop("steps", 300),
        change,
        evaluate=evaluate,
        merit=lambda: 1.0 - evaluate()["val_accuracy"],
        **options,
    )


def _warm_up_then_cosine(share: float) -> float:
    return min(1.0, share / 0.1 + 0.01) * 0.5 * (1 + math.cos(math.pi * share))


# ---- healthy ----------------------------------------------------------------------------------------------------


def transformer(change: Change) -> Trained:
    model = models.Transformer(64, 10, width=32)
    make = lambda lr: torch.optim.AdamW(model.parameters(), lr)  # noqa: E731
    return _classify(model, make, change, lr=3e-3, clip=1.0, schedule=_warm_up_then_cosine)


def transformer_clipped_by_habit(change: Change) -> Trained:
    model = models.Transformer(64, 10, width=32)
    return _classify(model, _adam(model), change, lr=2e-3, clip=0.05)


def one_cycle(change: Change) -> Trained:
    model = models.mlp(64, 10, width=64)

    def schedule(share: float) -> float:
        return share / 0.3 if share < 0.3 else max(1e-4, (1.0 - share) / 0.7)

    return _classify(model, _sgd(model, momentum=0.9), change, lr=0.1, schedule=schedule)


def big_steps(change: Change) -> Trained:
    """A small network that learns well with steps that are long beside its weights."""
    model = models.mlp(64, 10, width=16)
    return _classify(model, _adam(model), change, lr=2e-2)


def accumulation(change: Change) -> Trained:
    model = models.CNN(64, 10)
    return _classify(model, _sgd(model), change, lr=0.1, batch=8, accumulate=4, steps=200)


def batches_of_one(change: Change) -> Trained:
    model = models.mlp(64, 10)
    return _classify(model, _sgd(model), change, lr=0.01, batch=1, steps=600)


def frozen_backbone(change: Change) -> Trained:
    model = models.mlp(64, 10, width=64)
    for layer in list(model)[:-1]:
        layer.requires_grad_(False)
    return _classify(model, _adam(model), change, lr=1e-2)


class _LoRA(nn.Module):
    """A frozen linear layer and a pair of thin ones, of which the second begins at zero."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / inner.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


def lora(change: Change) -> Trained:
    x, y, x_val, y_val = _digits()
    model = models.mlp(64, 10, width=64)
    first = torch.optim.Adam(model.parameters(), 3e-3)
    batch = _batches(x, y % 5, 32)
    for step in range(100):  # the task before
        inputs, targets = batch(step)
        first.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        first.step()
    adapted = nn.Sequential(*(_LoRA(layer) if isinstance(layer, nn.Linear) else layer for layer in model))
    return _classify(adapted, _adam(adapted), change, lr=1e-2, data=(x, y, x_val, y_val))


def curriculum(change: Change) -> Trained:
    x, y, x_val, y_val = _digits()
    model = models.mlp(64, 10, width=64)
    known = [torch.nonzero(y < limit).squeeze(1) for limit in (2, 5, 10)]

    def batch_loss(step: int) -> Tensor:
        pool = known[min(2, step // 150)]
        picked = pool[torch.randint(0, len(pool), (32,), generator=torch.Generator().manual_seed(step))]
        return F.cross_entropy(model(x[picked]), y[picked])

    return fit(
        model,
        _adam(model),
        batch_loss,
        600,
        change,
        lr=2e-3,
        merit=lambda: (model(x_val).argmax(1) != y_val).double().mean().item(),
    )


def contrastive(change: Change) -> Trained:
    x, _, x_val, _ = _digits()
    model = models.mlp(64, 16, width=64)

    def info_nce(inputs: Tensor, seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        one, two = (
            F.normalize(model(inputs + 0.3 * torch.randn(inputs.shape, generator=noise)), dim=1) for _ in range(2)
        )
        return F.cross_entropy(one @ two.T / 0.2, torch.arange(len(inputs)))

    batch = _batches(x, x, 64)
    return fit(
        model,
        _adam(model),
        lambda step: info_nce(batch(step)[0], step),
        300,
        change,
        lr=1e-3,
        evaluate=lambda: {"val_loss": info_nce(x_val[:64], 0).item()},
        merit=lambda: info_nce(x_val[:64], 0).item(),
    )


class _VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = models.mlp(64, 16, width=64), models.mlp(8, 64, width=64)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, spread = self.encode(x).chunk(2, dim=1)
        out = self.decode(mean + noise * spread.exp())
        kl = 0.5 * (mean**2 + (2 * spread).exp() - 2 * spread - 1).sum(1).mean()
        return ((out - x) ** 2).sum(1).mean() + kl


def vae(change: Change) -> Trained:
    x, _, x_val, _ = _digits()
    model, batch = _VAE(), _batches(x, x, 64)
    fixed = torch.randn(len(x_val), 8, generator=torch.Generator().manual_seed(0))
    return fit(
        model,
        _adam(model),
        lambda step: model(batch(step)[0], torch.randn(64, 8)),
        300,
        change,
        lr=2e-3,
        evaluate=lambda: {"val_loss": model(x_val, fixed).item()},
        merit=lambda: model(x_val, fixed).item(),
    )


def gaussian_nll(change: Change) -> Trained:
    """A likelihood that becomes negative, with gradients that grow as it gets better."""
    x = torch.rand(512, 4, generator=torch.Generator().manual_seed(1))
    y = torch.sin(3 * x.sum(1, keepdim=True))
    model, batch = models.mlp(4, 2, width=32), _batches(x, y, 64)

    def nll(inputs: Tensor, targets: Tensor) -> Tensor:
        mean, spread = model(inputs).chunk(2, dim=1)
        return (0.5 * ((targets - mean) * (-spread).exp()) ** 2 + spread).mean()

    return fit(
        model, _adam(model), lambda step: nll(*batch(step)), 600, change, lr=3e-3, merit=lambda: nll(x, y).item()
    )


def gan(change: Change) -> Trained:
    """A generator on a ring of points; its discriminator trains beside it."""
    angle = torch.rand(2048, generator=torch.Generator().manual_seed(2)) * 2 * math.pi
    real = torch.stack([angle.cos(), angle.sin()], 1)
    generator, critic = models.mlp(4, 2, width=32), models.mlp(2, 1, width=32)
    of_critic = torch.optim.Adam(critic.parameters(), 1e-3 * change.lr, betas=(0.5, 0.9))
    batch, latest = _batches(real, real, 64), {"d_loss": 1.4}

    def batch_loss(step: int) -> Tensor:
        fake = generator(torch.randn(64, 4))
        loss = F.softplus(-critic(batch(step)[0])).mean() + F.softplus(critic(fake.detach())).mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        latest["d_loss"] = loss.item()
        return F.softplus(-critic(fake)).mean()

    return fit(
        generator,
        _adam(generator),
        batch_loss,
        500,
        change,
        lr=1e-3,
        extra=lambda: latest,
        merit=lambda: (generator(torch.randn(512, 4)).norm(dim=1) - 1).abs().mean().item(),
    )


def policy_gradient(change: Change) -> Trained:
    """REINFORCE on contextual bandits: a loss that moves around zero, beside rewards that rise."""
    x, y, x_val, y_val = _digits()
    model, batch, latest = models.mlp(64, 10, width=32), _batches(x, y, 64), {"reward": 0.1}

    def batch_loss(step: int) -> Tensor:
        inputs, targets = batch(step)
        choice = torch.distributions.Categorical(logits=model(inputs))
        action = choice.sample()
        reward = (action == targets).float()
        latest["reward"] = reward.mean().item()
        return -(choice.log_prob(action) * (reward - reward.mean())).mean()

    return fit(
        model,
        _adam(model),
        batch_loss,
        500,
        change,
        lr=5e-3,
        extra=lambda: latest,
        merit=lambda: (model(x_val).argmax(1) != y_val).double().mean().item(),
    )


def dqn(change: Change) -> Trained:
    """Q-learning on a chain of 8 states, with a target network that is copied every 50 steps."""
    model = models.mlp(8, 2, width=32)
    target, states = copy.deepcopy(model), torch.eye(8)

    def batch_loss(step: int) -> Tensor:
        if step % 50 == 0:
            target.load_state_dict(model.state_dict())
        state, action = torch.randint(0, 8, (32,)), torch.randint(0, 2, (32,))
        after = (state + 2 * action - 1).clamp(0, 7)
        reward = (after == 7).float()
        with torch.no_grad():
            value = reward + 0.9 * target(states[after]).max(1).values
        return F.mse_loss(model(states[state]).gather(1, action[:, None]).squeeze(1), value)

    return fit(
        model,
        _adam(model),
        batch_loss,
        600,
        change,
        lr=1e-3,
        merit=lambda: (model(states).argmax(1) != 1).double().mean().item(),
    )


# ---- troubled ---------------------------------------------------------------------------------------------------


def missing_zero_grad(change: Change) -> Trained:
    model = models.mlp(64, 10, width=64)
    return _classify(model, _sgd(model), change, lr=0.05, zero_grad=False)


def optimizer_of_a_copy(change: Change) -> Trained:
    model = models.mlp(64, 10, width=64)
    return _classify(model, _adam(copy.deepcopy(model)), change, lr=3e-3)


def head_only(change: Change) -> Trained:
    """Only the head is in the optimizer, and nothing is frozen."""
    model = models.CNN(64, 10)
    return _classify(model, _adam(model.head), change, lr=1e-2)


def dropout_of_nine_tenths(change: Change) -> Trained:
    model = models.mlp(64, 10, width=16, depth=4, dropout=0.9)
    return _classify(model, _adam(model), change, lr=1e-3)


def batch_norm_of_two(change: Change) -> Trained:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    return _classify(model, _sgd(model), change, lr=0.1, batch=2)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), self.right(x).relu().detach()], dim=1))


def detached_branch(change: Change) -> Trained:
    model = _Branches()
    return _classify(model, lambda lr: torch.optim.Adam(model.parameters(), lr), change, lr=3e-3)


def softmax_twice(change: Change) -> Trained:
    model = nn.Sequential(models.mlp(64, 10, width=32, depth=4, activation=nn.Sigmoid), nn.Softmax(dim=1))
    return _classify(model, _sgd(model), change, lr=0.05)


def shuffled_labels(change: Change) -> Trained:
    x, y, x_val, y_val = _digits()
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]
    model = models.mlp(64, 10, width=128)
    return _classify(model, _adam(model), change, lr=3e-3, data=(x, shuffled, x_val, y_val), steps=500)


def unnormalised_inputs(change: Change) -> Trained:
    x, y, x_val, y_val = _digits()
    model = models.mlp(64, 10, width=64)
    return _classify(model, _sgd(model), change, lr=0.1, data=(255 * x, y, 255 * x_val, y_val))


def no_warm_up(change: Change) -> Trained:
    model = models.Transformer(64, 10, width=64)
    return _classify(model, _adam(model), change, lr=0.3)


def diverged(change: Change) -> Trained:
    model = models.mlp(64, 10, width=64)
    return _classify(model, _sgd(model), change, lr=20.0)


def underflow_in_half(change: Change) -> Trained:
    """Gradients as float16 holds them, of a loss that is scaled down."""
    model = models.mlp(64, 10, width=32, depth=3)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())
    return _classify(model, _sgd(model), change, lr=0.1, criterion=lambda out, y: 3e-6 * F.cross_entropy(out, y))


def memorised(change: Change) -> Trained:
    x, y, x_val, y_val = _digits()
    noisy = y[:60].clone()
    noisy[::3] = (noisy[::3] + 1) % 10
    model = models.mlp(64, 10, width=128)
    return _classify(model, _adam(model), change, lr=3e-3, data=(x[:60], noisy, x_val, y_val), steps=500)


HEALTHY = [
    Kind(train.__name__, train)
    for train in (
        transformer,
        transformer_clipped_by_habit,
        one_cycle,
        big_steps,
        accumulation,
        batches_of_one,
        frozen_backbone,
        lora,
        curriculum,
        contrastive,
        vae,
        gaussian_nll,
        gan,
        policy_gradient,
        dqn,
    )
]

_RIGHT: dict[Training, str] = {
    missing_zero_grad: "gradients_add_up gradient_exploding loss_oscillating loss_diverged update_ratio",
    optimizer_of_a_copy: "not_in_optimizer loss_not_decreasing",
    head_only: "not_in_optimizer gradients_add_up",
    dropout_of_nine_tenths: "loss_not_decreasing",
    batch_norm_of_two: "loss_not_decreasing loss_oscillating",
    detached_branch: "dead_parameter",
    softmax_twice: "loss_not_decreasing gradient_vanishing",
    shuffled_labels: "overfitting loss_not_decreasing",
    unnormalised_inputs: "gradient_exploding loss_oscillating loss_diverged update_ratio dead_parameter",
    no_warm_up: "loss_oscillating loss_not_decreasing loss_diverged update_ratio dead_parameter gradient_exploding",
    diverged: "loss_diverged loss_oscillating update_ratio gradient_nonfinite gradient_exploding dead_parameter",
    underflow_in_half: "dead_parameter loss_not_decreasing",
    memorised: "overfitting",
}

TROUBLED = [Kind(train.__name__, train, frozenset(rules.split())) for train, rules in _RIGHT.items()]
