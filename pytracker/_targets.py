"""From what the user points at (a module, parameters, named parameters) to a plan, made once and kept."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _ops
from .errors import InvalidTypeError, LayoutError, ParameterError

Target: TypeAlias = "torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]"

_KEPT_LISTS = 4  # plans of the latest lists of parameters; a training has one or two
_module_plans: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_list_plans: list[Any] = []


def named_parameters(target: Target) -> tuple[list[str], list[Tensor]]:
    """Return the names and the parameters of a target; a parameter that occurs twice counts once.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name.
        LayoutError: the module is sharded in a way that cannot be read (FSDP1).
    """
    if isinstance(target, torch.nn.Module):
        for module in target.modules():
            if type(module).__name__ == "FullyShardedDataParallel":  # its flat parameters don't say what they are of
                raise LayoutError(
                    f"the model holds a FullyShardedDataParallel ({type(module).__module__}), whose parameters do not "
                    "tell which pieces of which tensors they are; shard with torch.distributed.fsdp.fully_shard instead"
                )
        named: list[tuple[str, Tensor]] = list(target.named_parameters())
    elif isinstance(target, Tensor):
        named = [("0", target)]
    else:
        named = _named(target)
    unique = list({id(parameter): (name, parameter) for name, parameter in reversed(named)}.values())[::-1]
    counts = Counter(name for name, _ in unique)
    for name, count in counts.items():
        if count > 1:
            raise ParameterError(f"the name {name!r} is used for {count} parameters; give each its own")
    return [name for name, _ in unique], [parameter for _, parameter in unique]


def _named(target: Any) -> list[tuple[str, Tensor]]:
    try:
        items = list(target)
    except TypeError:
        raise InvalidTypeError(
            f"the target is {target!r:.80}, of type {type(target).__name__}; "
            "give a module, an iterable of parameters, or an iterable of (name, parameter) pairs"
        ) from None
    named = []
    for index, item in enumerate(items):
        name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(index), item)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise InvalidTypeError(
                f"element {index} of the target is {item!r:.80}, of type {type(item).__name__}; "
                "expected a parameter or a (name, parameter) pair"
            )
        named.append((name, parameter))
    return named


def norms_of_known(target: Target) -> tuple[float, float] | None:
    """Return the two norms of a module whose plan is at hand and fits, by the shortest way; else None. Waits."""
    known = _module_plans.get(target) if isinstance(target, torch.nn.Module) else None
    norms: tuple[float, float] | None = None if known is None else known[1].norm_and_max_of(known[0], target)
    return norms


def plan_for(target: Target) -> Any:
    """Return the plan of a target; the same one again while the parameters are the same.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name, or one has no data.
    """
    if isinstance(target, torch.nn.Module):
        known = _module_plans.get(target)
        if known is not None and known[0].unchanged(target):
            return known[1]
        names, parameters = named_parameters(target)
        plan = _ops.make_plan(parameters, names)
        _module_plans[target] = (_ops.watch_module(target), plan)
        return plan
    items = target if isinstance(target, (list, tuple)) else list(_iterable(target))
    for plan in _list_plans:
        if plan.is_for(items):
            return plan
    names, parameters = named_parameters(items)
    plan = _ops.make_plan(parameters, names)
    if plan.is_for(items):  # not so for named pairs, whose names may differ next time
        _list_plans.insert(0, plan)
        del _list_plans[_KEPT_LISTS:]
    return plan


def _iterable(target: Any) -> Iterable[Any]:
    return [target] if isinstance(target, Tensor) or not hasattr(target, "__iter__") else target
