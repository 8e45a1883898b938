"""From what the user points at (a module, parameters, named parameters) to a plan, made once and kept."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import wrong_type
from ..errors import InvalidTypeError, ParameterError
from . import native
from .shards import LocalParameter, local_parameter, parameters_of_module

Target: TypeAlias = "torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]"

_KEPT_LISTS = 4  # plans of the latest lists of parameters; a training has one or two


@dataclass(frozen=True)
class TrackedParameters:
    """The parameters of a target as this rank holds them, and the plan that reduces their gradients."""

    parameters: list[LocalParameter]
    plan: Any

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether this rank has only a piece of some gradient."""
        return any(each.groups for each in self.parameters)

    @functools.cached_property
    def rewritten(self) -> bool:
        """Whether a wrapper may exchange the parameters of the modules as it goes: FSDP does so."""
        return any(each.window[1] >= 0 or each.shard.shard_ranks for each in self.parameters)


_module_plans: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, Any, TrackedParameters]] = (
    weakref.WeakKeyDictionary()
)
_list_plans: list[TrackedParameters] = []


def parameters_of(target: Target) -> list[LocalParameter]:
    """Return the parameters of a target as this rank holds them; one that occurs twice counts once.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name.
        LayoutError: it cannot be told which piece of a parameter this rank holds.
    """
    if isinstance(target, torch.nn.Module):
        found = parameters_of_module(target)
    else:
        named = [("0", target)] if isinstance(target, Tensor) else _named(target)
        unique = {id(parameter): (name, parameter) for name, parameter in reversed(named)}
        found = [local_parameter(name, parameter) for name, parameter in reversed(unique.values())]
    for name, count in Counter(each.name for each in found).items():
        if count > 1:
            raise ParameterError(f"the name {name!r} is used for {count} parameters; give each its own")
    return found


def make_plan(parameters: list[LocalParameter], source: str = "gradient") -> Any:
    """Return a plan that reduces the gradients of these parameters, or with ``source="value"`` the parameters."""
    windows = [each.window for each in parameters]
    return native.make_plan(
        [each.parameter for each in parameters],
        [each.name for each in parameters],
        source,
        windows if any(length >= 0 for _, length in windows) else [],
    )


def _named(target: Any) -> list[tuple[str, Tensor]]:
    named = []
    for index, item in enumerate(_iterable(target)):
        name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(index), item)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise wrong_type(f"element {index} of the target", item, "a parameter or a (name, parameter) pair")
        named.append((name, parameter))
    return named


def norms_of_known(target: Target) -> tuple[float, float] | None:
    """Return the two norms of a module whose plan is at hand and fits, by the shortest way; else None. Waits."""
    known = _module_plans.get(target) if isinstance(target, torch.nn.Module) else None
    norms: tuple[float, float] | None = None if known is None else known[1].norm_and_max_of(known[0], target)
    return norms


def plan_for(target: Target) -> TrackedParameters:
    """Return the parameters of a target and their plan; the same again while the parameters are the same.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name, or one has no data.
        LayoutError: it cannot be told which piece of a parameter this rank holds.
    """
    if isinstance(target, torch.nn.Module):
        known = _module_plans.get(target)
        if known is not None and known[0].unchanged(target):
            return known[2]
        tracked = _tracked(parameters_of(target))
        _module_plans[target] = (native.watch_module(target), tracked.plan, tracked)
        return tracked
    items = target if isinstance(target, (list, tuple)) else list(_iterable(target))
    for tracked in _list_plans:
        if tracked.plan.is_for(items):
            return tracked
    tracked = _tracked(parameters_of(items))
    if tracked.plan.is_for(items):  # not so for named pairs, whose names may differ next time
        _list_plans.insert(0, tracked)
        del _list_plans[_KEPT_LISTS:]
    return tracked


def plan_for_gradients(target: Target) -> TrackedParameters:
    """Return what ``plan_for`` does; where the tensors of a target are gradients themselves, a plan that reads those.

    Gradients are new tensors on each call, so a plan for them isn't kept. None among them, which
    ``torch.autograd.grad(..., allow_unused=True)`` returns, is left out.
    """
    if isinstance(target, torch.nn.Module):
        return plan_for(target)
    items = target if isinstance(target, (list, tuple)) else list(_iterable(target))
    if not are_gradients(items):
        return plan_for(items)
    named = [(str(index), item) for index, item in enumerate(items) if item is not None]
    parameters = parameters_of([item if isinstance(item, tuple) else (name, item) for name, item in named])
    return TrackedParameters(parameters, make_plan(parameters, "value"))


def watchable(target: Target) -> Target:
    """Return a target whose parameters have other gradients on each step; an iterator as the list of what it gives.

    Raises:
        InvalidTypeError: it is nothing of the kind, or its tensors are gradients themselves.
    """
    if isinstance(target, torch.nn.Module):
        return target
    items = target if isinstance(target, (list, tuple)) else list(_iterable(target))
    if are_gradients(items):
        raise InvalidTypeError(
            f"the target is {len(items)} tensors that are gradients, or have none in .grad and require none: what is "
            "measured on each step is the .grad of parameters. Give the module or its parameters; "
            "gradient_stats(gradients) measures gradients once"
        )
    return items


def are_gradients(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether the tensors of a target are gradients, as from ``torch.autograd.grad``, and not what has some in .grad.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> are_gradients(torch.autograd.grad(weight.sum(), [weight])), are_gradients([weight])
    (True, False)
    """
    found = False
    for item in items:
        tensor = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if tensor is None and not isinstance(item, tuple):
            continue
        if not isinstance(tensor, Tensor) or isinstance(tensor, torch.nn.Parameter):
            return False
        if tensor.requires_grad or tensor.grad is not None if tensor.is_leaf else tensor.retains_grad:
            return False
        found = True
    return found


def _tracked(parameters: list[LocalParameter]) -> TrackedParameters:
    return TrackedParameters(parameters, make_plan(parameters))


def _iterable(target: Any) -> Iterable[Any]:
    if isinstance(target, Tensor):
        return [target]
    if not hasattr(target, "__iter__"):
        raise wrong_type("the target", target, "a module, its parameters, or (name, parameter) pairs")
    items: Iterable[Any] = target
    return items
