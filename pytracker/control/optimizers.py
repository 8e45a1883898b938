"""Recognises optimizers that take a factor and a flag: torch's fused ones, made for a GradScaler."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("pytracker")

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer within wrappers such as those of accelerate and Lightning, which keep it as an attribute."""
    for _ in range(4):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer


class FusedOptimizer:
    """An optimizer whose kernel divides the gradients by ``grad_scale``, and does nothing where ``found_inf`` is 1.

    So a clip costs no pass over the gradients of its own, and they are left as they are; and a step whose gradients are
    not finite is skipped without the host knowing. A GradScaler multiplies its scale to the ``grad_scale`` that it
    finds, and takes its own ``found_inf``, which says the same of the same gradients.

    Args:
        optimizer: one that ``reason_against`` has nothing against.
        device: where factor and flag lie.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self._optimizer = unwrapped(optimizer)
        self.grad_scale = torch.ones((), dtype=torch.float32, device="cpu").to(device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device="cpu").to(device)
        self._hook = self._optimizer.register_step_post_hook(self._detach)

    @property
    def attributes(self) -> dict[str, Tensor]:
        """What the optimizer is to have."""
        return {"grad_scale": self.grad_scale, "found_inf": self.found_inf}

    def attach(self) -> None:
        """Let the optimizer's next step, and only that, take what is decided."""
        for name, tensor in self.attributes.items():
            setattr(self._optimizer, name, tensor)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # beside another hook torch 2.13 loses that they are deleted
    def _detach(self, optimizer: Any, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is self.found_inf:  # else a GradScaler is at work, and cleans up
            for name in self.attributes:
                delattr(optimizer, name)

    def remove(self) -> None:
        """Leave the optimizer as it was found."""
        self._hook.remove()
        self._detach(self._optimizer)


def reason_against(optimizer: Any, trained: Iterable[Tensor]) -> str:
    """Return why an optimizer cannot take the factor for these parameters; "" where it can."""
    if optimizer is None:
        return "there is no optimizer"
    inner = unwrapped(optimizer)
    if not isinstance(inner, _FUSED):
        return f"{type(inner).__name__} takes none"
    if not all(group.get("fused") for group in inner.param_groups):
        return f"the {type(inner).__name__} is not a fused one"
    theirs = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    ours = {id(parameter) for parameter in trained}
    if ours - theirs:
        return f"{len(ours - theirs)} parameters are not in the {type(inner).__name__}"
    if theirs - ours:
        return f"the {type(inner).__name__} has {len(theirs - ours)} other parameters besides"
    return ""
