"""The troubles that are planted, what each must be called, and what else may truly be said of it.

A trouble acts on a ``Plan`` before the training is built, or on the ``Loop`` at a step. ``expected`` rules must be
found: those of observed.py where it did happen, the others always. ``consequences`` are rules that observed.py doesn't
know and that describe the same planted trouble in other words (a learning rate 100 times too high kills ReLUs): they
count neither for nor against, except in the strict score.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import models

if TYPE_CHECKING:
    from .training import Loop, Plan

TORN = frozenset(
    {"update_ratio", "gradient_nonfinite", "dead_parameter", "layer_imbalance", "constant", "loss_diverged"}
)
"""What a few steps that are far too long do to a network."""


@dataclass(frozen=True)
class Trouble:
    """What is planted and what must be said of it."""

    expected: frozenset[str]
    consequences: frozenset[str] = frozenset()
    prepare: Callable[[Plan], None] = lambda plan: None
    build: Callable[[Loop], None] = lambda loop: None
    models: tuple[str, ...] = ("mlp", "cnn", "rnn", "transformer")
    datasets: tuple[str, ...] = ("digits", "breast_cancer", "diabetes", "wine")
    optimizers: tuple[str, ...] = ("SGD", "Adam", "AdamW")
    at: Callable[[Loop, int], bool] = field(default=lambda loop, step: False)  # True where it corrupted a batch
    onset: float = 0.0  # share of the training after which the trouble exists


def _scale_lr(factor: float) -> Callable[[Plan], None]:
    def prepare(plan: Plan) -> None:
        plan.lr *= factor

    return prepare


def _never_step(loop: Loop) -> None:
    loop.steps_optimizer = False


def _overfit(plan: Plan) -> None:
    plan.data = plan.data.first(40)
    plan.weight_decay = plan.dropout = 0.0
    plan.steps = int(plan.steps * 1.5)


def _deep_sigmoid(plan: Plan) -> None:
    def make(features: int, outputs: int) -> nn.Module:
        net = models.mlp(features, outputs, depth=20, activation=nn.Sigmoid)
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.1)
        return net

    plan.make_model = make


def _exploding(plan: Plan) -> None:
    """Make a recurrent net that amplifies 100,000-fold over its sequence, or a deep tanh net in the chaotic regime."""
    name, length = plan.model, models.sequence_length(plan.data.x.shape[1])

    def make(features: int, outputs: int) -> nn.Module:
        if name == "rnn":
            net = models.RNN(features, outputs, cell="ReLU")
            nn.init.orthogonal_(net.cell.weight_hh_l0, gain=10.0 ** (5.0 / length))
            return net
        deep = models.mlp(features, outputs, depth=16, activation=nn.Tanh)
        for layer in deep[:-1]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=4.0 / layer.in_features**0.5)
        return deep

    plan.make_model = make


def _nan_in_one_gradient(loop: Loop) -> None:
    """Put one NaN (or Inf, for odd seeds) into the gradient of one parameter, chosen by the seed, at a known step."""
    names = [name for name, parameter in loop.model.named_parameters() if parameter.requires_grad]
    name = names[(7 * loop.plan.seed + 3) % len(names)]
    loop.truth = {
        "parameter": name,
        "step": loop.plan.steps // 2,
        "value": float("inf" if loop.plan.seed % 2 else "nan"),
    }

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if loop.step != loop.truth["step"]:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = loop.truth["value"]
        return poisoned

    dict(loop.model.named_parameters())[name].register_hook(poison)


def _dead_relu(loop: Loop) -> None:
    """Push one ReLU layer so far below zero that it never answers again."""
    layer = loop.model.conv2 if isinstance(loop.model, models.CNN) else loop.model[2 if loop.plan.dropout == 0 else 3]
    layer.bias.data.fill_(-1e4)


def _zero_labels(loop: Loop) -> None:
    """One-hot labels that a broken pipeline has zeroed: the cross entropy is zero times something."""
    classes = loop.plan.data.outputs
    loop.criterion = lambda output, target: nn.functional.cross_entropy(output, torch.zeros(len(target), classes))


def _constant_loss(loop: Loop) -> None:
    """A loss cut off from the model, plus a zero that keeps backward() from failing."""
    loop.criterion = lambda output, target: (output * 0.0).sum() + 0.6931


def _corrupt_batches(loop: Loop, step: int) -> bool:
    """A few single batches hold inputs 30 times too large and targets of other samples."""
    steps = loop.plan.steps
    if step not in (steps // 2, int(steps * 0.65), int(steps * 0.8)):
        return False
    loop.x = loop.x * 30.0
    loop.y = -4.0 * loop.y + 8.0 if loop.plan.data.regression else (loop.y + 1) % loop.plan.data.outputs
    return True


def _deeper(plan: Plan) -> None:
    """Make an MLP deep enough to have a middle, with an initialisation that lets it learn at once."""

    def make(features: int, outputs: int) -> nn.Module:
        deep = models.mlp(features, outputs, depth=5)
        for layer in deep:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        return deep

    if plan.model == "mlp":
        plan.make_model = make


def _imbalanced(loop: Loop) -> None:
    """A wrong gradient multiplier on one hidden weight matrix: 10,000 times too small, or too large for odd seeds."""
    weights = [parameter for parameter in loop.model.parameters() if parameter.ndim == 2]
    factor = 1e4 if loop.plan.seed % 2 and loop.plan.optimizer != "SGD" else 1e-4
    weights[len(weights) // 2].register_hook(lambda gradient: gradient * factor)


def _clip_hard(plan: Plan) -> None:
    plan.clip = 1e-3


def _forgotten_schedule(plan: Plan) -> None:
    plan.scheduler = "never stepped"


def _never_zero(loop: Loop) -> None:
    """zero_grad() is forgotten."""
    loop.optimizer.zero_grad = lambda set_to_none=True: None


def _optimizer_of_a_copy(loop: Loop) -> None:
    """The optimizer was made for a copy of the model, which nobody trains."""
    copy = deepcopy(loop.model)
    loop.optimizer = type(loop.optimizer)(copy.parameters(), loop.plan.lr)


def _lr_jump(loop: Loop, step: int) -> bool:
    if step == loop.plan.steps // 2:
        for group in loop.optimizer.param_groups:
            group["lr"] *= 30.0
    return False


def rules(*names: str) -> frozenset[str]:
    return frozenset(names)


HEALTHY = Trouble(rules())

TROUBLES: dict[str, Trouble] = {
    "healthy": HEALTHY,
    "lr_too_high": Trouble(rules("loss_oscillating"), TORN, prepare=_scale_lr(100.0)),
    "steps_too_long": Trouble(
        rules("update_ratio"), TORN | rules("loss_oscillating"), prepare=_scale_lr(20.0), optimizers=("Adam", "AdamW")
    ),
    "lr_too_low": Trouble(rules("loss_not_decreasing"), rules("update_ratio"), prepare=_scale_lr(0.01)),
    "never_steps": Trouble(rules("loss_not_decreasing"), build=_never_step),
    "overfit": Trouble(
        rules("overfitting"), prepare=_overfit, datasets=("digits", "breast_cancer", "diabetes"), onset=0.1
    ),
    "deep_sigmoid": Trouble(
        rules("gradient_vanishing"),
        rules("layer_imbalance", "dead_parameter", "update_ratio"),
        prepare=_deep_sigmoid,
        models=("mlp",),
    ),
    "exploding": Trouble(rules("gradient_exploding"), TORN, prepare=_exploding, models=("rnn", "mlp")),
    "nan": Trouble(rules("gradient_nonfinite"), rules("constant"), build=_nan_in_one_gradient, onset=0.5),
    "dead_relu": Trouble(
        rules("dead_parameter"), rules("layer_imbalance", "constant"), build=_dead_relu, models=("mlp", "cnn")
    ),
    "zeroed_labels": Trouble(
        rules("constant"),
        rules("dead_parameter", "update_ratio"),  # weight decay is the only force left
        build=_zero_labels,
        datasets=("digits", "breast_cancer", "wine"),
    ),
    "constant_loss": Trouble(rules("constant"), rules("dead_parameter", "update_ratio"), build=_constant_loss),
    "corrupted_batches": Trouble(rules("loss_spike"), TORN, at=_corrupt_batches, onset=0.5),
    "imbalanced": Trouble(
        rules("layer_imbalance"),
        rules("update_ratio"),
        prepare=_deeper,
        build=_imbalanced,
        models=("mlp", "transformer"),
    ),
    "clipped": Trouble(rules("always_clipped"), rules("update_ratio"), prepare=_clip_hard),
    "forgotten_schedule": Trouble(rules("learning_rate"), prepare=_forgotten_schedule),
    "lr_jump": Trouble(rules("learning_rate"), TORN, at=_lr_jump, onset=0.5),
    "copied": Trouble(
        rules("not_in_optimizer"),
        TORN | rules("loss_not_decreasing", "gradients_add_up", "gradient_exploding"),
        build=_optimizer_of_a_copy,
    ),
    "never_zeroed": Trouble(
        rules("gradients_add_up"),
        TORN | rules("loss_not_decreasing", "always_clipped"),
        build=_never_zero,
    ),
}
