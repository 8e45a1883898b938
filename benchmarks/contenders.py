"""What is timed: each contender prepares itself on a model and returns one call, whose result can be checked.

The cheapest way to use each is measured: parameters are listed once, before the clock starts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import pytracker

Call = Callable[[], float | torch.Tensor | None]

NEVER_CLIPS = 1e30


def original_loop(model: torch.nn.Module) -> Call:
    """Every parameter's norm with `.item()`, as in the loop that pytracker replaces."""

    def call() -> float:
        total_norm, max_norm = 0.0, 0.0
        for _name, param in model.named_parameters():
            if param.grad is not None:
                param_norm = param.grad.data.norm(2).item()
                total_norm += param_norm**2
                max_norm = max(max_norm, param_norm)
        return total_norm**0.5

    return call


def get_total_norm(model: torch.nn.Module) -> Call:
    """`torch.nn.utils.get_total_norm(...).item()`: the total only."""
    gradients = [p.grad for p in model.parameters()]
    return lambda: torch.nn.utils.get_total_norm(gradients).item()


def clip_grad_norm(model: torch.nn.Module) -> Call:
    """`torch.nn.utils.clip_grad_norm_` under a threshold that is never reached."""
    parameters = list(model.parameters())
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, NEVER_CLIPS)


def numpy_norms(model: torch.nn.Module) -> Call:
    """`numpy.linalg.norm` of every gradient."""
    gradients = [p.grad.numpy().ravel() for p in model.parameters()]
    return lambda: math.sqrt(sum(float(np.linalg.norm(gradient)) ** 2 for gradient in gradients))


def torch_sum(model: torch.nn.Module) -> Call:
    """`torch.sum` of every gradient: the yardstick of how fast memory can be read. Not a norm, so not checked."""
    gradients = [p.grad for p in model.parameters()]

    def call() -> None:
        for gradient in gradients:
            torch.sum(gradient)

    return call


def two_norms(model: torch.nn.Module) -> Call:
    """Two calls of `p.grad.norm(2).item()`: what Tracker.step on the small MLP is held against. Not checked."""
    first, second = list(model.parameters())[:2]

    def call() -> None:
        first.grad.norm(2).item()
        second.grad.norm(2).item()

    return call


def pytracker_compute(model: torch.nn.Module) -> Call:
    """`pytracker.compute_gradient_stats(model)`: the original's two numbers as floats."""
    return lambda: pytracker.compute_gradient_stats(model)["grad_norm"]


def pytracker_stats(model: torch.nn.Module) -> Call:
    """`pytracker.gradient_stats(model)`: all six columns of every parameter."""
    return lambda: pytracker.gradient_stats(model).total_norm


def pytracker_clip(model: torch.nn.Module) -> Call:
    """`pytracker.clip_grad_norm_` under a threshold that is never reached."""
    parameters = list(model.parameters())
    return lambda: pytracker.clip_grad_norm_(parameters, NEVER_CLIPS)


def tracker_step(model: torch.nn.Module, columns: Sequence[str] = ()) -> Call:
    """`Tracker.step(loss=...)`: all columns, or more, and a scalar into the log, drains included. Returns no norm.

    Without the rules, which take what time they may (2 %, and a few ms at each of the first 50 drains).
    """
    tracker = pytracker.Tracker(model, diagnosis=None, columns=columns)
    losses = itertools.cycle(torch.rand(256, generator=torch.Generator().manual_seed(0)).unbind())
    return lambda: tracker.step(loss=next(losses))


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    prepare: Callable[[torch.nn.Module], Call]
    tolerance: float | None = None  # relative, on the total norm; None: the call returns no norm
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    only: tuple[str, ...] = ()  # workloads; none: all


# torch adds fp32 squares in fp32, and is off by 1.1 % at 1e8 elements; bf16 norms carry three digits.
TORCH = 2e-2
OURS = 1e-6
BF16 = 4e-3  # clip_grad_norm_ returns the norm in the gradients' dtype, as torch's does
CONTENDERS = [
    Contender("original loop", original_loop, TORCH),
    Contender("get_total_norm + item", get_total_norm, TORCH),
    Contender("torch clip_grad_norm_", clip_grad_norm, TORCH),
    Contender("numpy norms", numpy_norms, TORCH, dtypes=("fp32",)),
    Contender("torch.sum of each", torch_sum),
    Contender("2 x norm(2).item()", two_norms, only=("MLP, 8 parameters",)),
    Contender("compute_gradient_stats", pytracker_compute, OURS),
    Contender("gradient_stats", pytracker_stats, OURS),
    Contender("pytracker clip_grad_norm_", pytracker_clip, BF16),
    Contender("Tracker.step", tracker_step),
    Contender("Tracker.step, all columns", partial(tracker_step, columns=("l1", "exponents"))),
]
