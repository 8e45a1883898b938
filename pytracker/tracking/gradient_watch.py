"""Warns of rows that cannot be what the user meant: no gradients, the same ones again, or those of one rank alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from .._warn import warn_user
from ..columns import SUM_SQ
from ..core import LocalParameter, Rows
from ..moments import is_missing

_USUAL: Final = (
    "call tracker.step() after loss.backward() and before optimizer.zero_grad(); a loss that was detached, or "
    "gradients that torch.autograd.grad returned, leave none in .grad"
)


class GradientWatch:
    """Warns, once each, of steps without any gradient, of steps that repeat the one before, and of steps in no_sync.

    Args:
        model: what the user gave; a module says more of itself than its parameters do.
        parameters: those that are tracked.
        models: those of players.
    """

    def __init__(self, model: object, parameters: list[LocalParameter], models: Mapping[str, object]) -> None:
        self._model, self._parameters = model, parameters
        self._warned_of_none = self._warned_of_same = not parameters
        self._last: tuple[int, bytes] = (-1, b"")
        self._syncing = {name: _syncing(each) for name, each in {"": model, **models}.items()}

    def look(self, step: int, player: str) -> None:
        """Look at the model whose step is made: its gradients may be those of this rank alone, or still to come."""
        for module in self._syncing.get(player, ()):
            if not getattr(module, "require_backward_grad_sync", True):
                what = (
                    "within no_sync(), so its gradients are those of this rank's micro-batch, and recorded as they are"
                )
            elif _keeps_apart(module):
                what = (
                    "without gradient sync, so FSDP2 keeps its gradients apart, and .grad, if any, is of an earlier one"
                )
            else:
                continue
            self._syncing = {}
            warn_user(
                f"step {step} is made {what}; call tracker.step() once for each optimizer.step(), or "
                "tracker.step(when=...) on each micro-batch"
            )
            return

    def check(self, rows: Rows) -> None:
        """Look at rows that have arrived."""
        if not self._warned_of_none:
            none = rows.steps[is_missing(rows.tensors).all(axis=1)]
            if len(none):
                self._warned_of_none = True
                span = f"step {none[0]}" if len(none) == 1 else f"steps {none[0]} to {none[-1]}"
                warn_user(f"no parameter had a gradient in {span}; {self._likely_cause()}")
        if not self._warned_of_same:
            self._check_change(rows)

    def _check_change(self, rows: Rows) -> None:
        given = [values for name, (_, values) in rows.scalars.items() if not name.startswith("lr")]
        given = [values for values in given if len(values) == len(rows.steps)]
        if not given:  # the same gradients with nothing beside them may be meant
            return
        recorded = np.column_stack([rows.totals, *given])
        for step, row in zip(rows.steps.tolist(), recorded, strict=True):
            before, same = self._last
            self._last = step, row.tobytes()
            if self._last[1] == same and np.isfinite(row).all() and row[SUM_SQ] > 0:
                self._warned_of_same = True
                warn_user(
                    f"steps {before} and {step} have the same gradients and values, bit for bit; call tracker.step() "
                    "once after each backward()"
                )
                return

    def _likely_cause(self) -> str:
        """Say where the gradients may be, as far as the parameters show it."""
        tensors: list[Any] = [each.parameter for each in self._parameters]
        if any(getattr(tensor, "main_grad", None) is not None for tensor in tensors):
            return "they are in .main_grad, as Megatron keeps them: give gradient=lambda p: p.main_grad"
        if any(hasattr(tensor, "ds_tensor") for tensor in tensors):
            return "DeepSpeed ZeRO-3 holds them (ds_tensor), and .grad stays empty"
        if any(getattr(tensor, "_post_accumulate_grad_hooks", None) for tensor in tensors):
            return (
                "a hook that was registered with register_post_accumulate_grad_hook takes each as it comes, as an "
                "optimizer in the backward does: give in_backward=True, and call tracker.step() after each backward()"
            )
        if not any(tensor.requires_grad for tensor in tensors):
            return "all of them are frozen (requires_grad is False)"
        modules = self._model.modules() if isinstance(self._model, torch.nn.Module) else ()
        if any(kind.__name__ == "FSDPModule" for module in modules for kind in type(module).__mro__):
            return f"FSDP2 keeps those of a step without gradient sync apart; or {_USUAL}"
        return _USUAL


def _syncing(model: object) -> list[Any]:
    """Return the modules of DDP in a model, and the outermost of FSDP2 that has parameters."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    kinds = [{kind.__name__ for kind in type(each).__mro__} for each in modules]
    ddp = [each for each, names in zip(modules, kinds, strict=True) if "DistributedDataParallel" in names]
    return (
        ddp
        + [each for each, names in zip(modules, kinds, strict=True) if "FSDPModule" in names and _groups_of(each)][:1]
    )


def _keeps_apart(module: Any) -> bool:
    """Whether a module of FSDP2 was told by ``set_requires_gradient_sync(False)`` to reduce no gradients."""
    return any(getattr(group, "reduce_grads", True) is False for group in _groups_of(module))


def _groups_of(module: Any) -> list[Any]:
    """Return the groups of parameters that a module of FSDP2 has; torch 2.10 knows one at most."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
