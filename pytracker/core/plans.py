"""Makes plans from the user's target (modules, parameters, named parameters), once for each."""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import wrong_type
from ..contract import ModuleWatch, Plan
from ..errors import InvalidTypeError, ParameterError
from . import native
from .shards import LocalParameter, ParameterLayout, local_parameter, parameters_of_module

Target: TypeAlias = "torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[torch.nn.Module]"

_KEPT_LISTS = 4  # plans of the latest lists of parameters; a training has one or two


@dataclass(frozen=True)
class PlannedParameters:
    """A plan that reduces gradients, and what is known of each parameter. Keeps no parameter alive by itself."""

    parameters: Sequence[ParameterLayout]
    plan: Plan
    worked_out: dict[str, Any] = field(default_factory=dict, compare=False, kw_only=True)  # from these, by others

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether this rank has only a piece of some gradient."""
        return any(each.groups for each in self.parameters)


@dataclass(frozen=True)
class TrackedParameters(PlannedParameters):
    """The parameters of a target as this rank holds them, and the plan that reduces their gradients."""

    parameters: list[LocalParameter]

    @functools.cached_property
    def rewritten(self) -> bool:
        """Whether a wrapper may exchange the parameters of the modules as it goes: FSDP does so."""
        return any(each.window[1] >= 0 or each.shard.shard_ranks for each in self.parameters)


# What was planned for targets that were looked at: with the plans let go of their parameters, so that looking at a
# model limits neither how long it lives nor what may be done with it.
_module_plans: weakref.WeakKeyDictionary[torch.nn.Module, tuple[ModuleWatch, PlannedParameters]] = (
    weakref.WeakKeyDictionary()
)
_list_plans: list[PlannedParameters] = []
_pair_plans: list[PlannedParameters] = []  # of (name, parameter) pairs


def parameters_of(target: Target) -> list[LocalParameter]:
    """Return the parameters of a target as this rank holds them; one that occurs twice counts once.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name.
        LayoutError: it cannot be told which piece of a parameter this rank holds.
    """
    target = _in_one(target)
    if isinstance(target, torch.nn.Module):
        found = parameters_of_module(target)
        if isinstance(target, torch.nn.ModuleList):
            found = _named_in_their_parts(found)
    else:
        named = _named(target)
        unique = {id(parameter): (name, parameter) for name, parameter in reversed(named)}
        found = [local_parameter(name, parameter) for name, parameter in reversed(unique.values())]
    for name, count in Counter(each.name for each in found).items():
        if count > 1:
            raise ParameterError(f"the name {name!r} is used for {count} parameters; give each its own")
    return found


def _in_one(target: Any) -> Any:
    """Return a module, several as one, or the list of what is in any other target."""
    if isinstance(target, torch.nn.Module):
        return target
    if not isinstance(target, Tensor) and not hasattr(target, "__iter__"):
        raise wrong_type("the target", target, "a module, modules, parameters, or (name, parameter) pairs")
    items: Any = [target] if isinstance(target, Tensor) else target
    items = items if isinstance(items, (list, tuple)) else list(items)
    are_modules = bool(items) and all(isinstance(item, torch.nn.Module) for item in items)
    return torch.nn.ModuleList(items) if are_modules else items


def _named_in_their_parts(found: list[LocalParameter]) -> list[LocalParameter]:
    """Return the parameters of a list of modules by their names there, unless two have the same.

    The parts of a model that a rank of a pipeline has have other numbers in its list than in the model.
    """
    inside = [replace(each, name=re.sub(r"^\d+\.", "", each.name)) for each in found]
    return inside if len({each.name for each in inside}) == len(inside) else found


def make_plan(parameters: list[LocalParameter], source: str = "gradient") -> Plan:
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
    for index, item in enumerate(target):
        name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(index), item)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise wrong_type(
                f"element {index} of the target", item, "a parameter or a (name, parameter) pair, or modules alone"
            )
        named.append((name, parameter))
    return named


def norms_of_known(target: Target) -> tuple[float, float] | None:
    """Return the two norms of a module whose plan is at hand and fits, by the shortest way; else None. Waits."""
    if not isinstance(target, torch.nn.Module) or target not in _module_plans:
        return None
    watch, known = _module_plans[target]
    return known.plan.norm_and_max_of(watch, target)


def track(target: Target) -> TrackedParameters:
    """Return the parameters of a target and a plan of their own, which holds them.

    Raises:
        InvalidTypeError: the target is nothing of the kind.
        ParameterError: two parameters have the same name, or one has no data.
        LayoutError: it cannot be told which piece of a parameter this rank holds.
    """
    parameters = parameters_of(target)
    return TrackedParameters(parameters, make_plan(parameters))


@contextlib.contextmanager
def planned(target: Target) -> Iterator[PlannedParameters]:
    """Plan for one look at a target; within the block the plan holds its parameters.

    The plan is kept for the next look, and is the same again while the parameters are the same.

    Raises:
        InvalidTypeError, ParameterError, LayoutError: as for ``track``.
    """
    target = _in_one(target)
    known = _of_module(target) if isinstance(target, torch.nn.Module) else _of_list(target)
    try:
        yield known
    finally:
        known.plan.release()


def _of_module(target: torch.nn.Module) -> PlannedParameters:
    if target in _module_plans:
        watch, known = _module_plans[target]
        if known.plan.hold_of(watch, target):
            return known
    tracked = track(target)
    watch = native.watch_module(target)
    if not watch.covers(tracked.plan):  # FSDP1 keeps parameters where no walk over the modules finds them
        tracked.plan.hold()
    known = PlannedParameters([each.layout for each in tracked.parameters], tracked.plan)
    _module_plans[target] = (watch, known)
    return known


def _of_list(items: Any) -> PlannedParameters:
    are_pairs = len(items) > 0 and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items
    )
    names, parameters = map(list, zip(*items, strict=True)) if are_pairs else (None, items)
    kept = _pair_plans if are_pairs else _list_plans
    for known in kept:
        if (names is None or names == [each.name for each in known.parameters]) and known.plan.hold_for(parameters):
            return known
    tracked = track(items)
    known = PlannedParameters([each.layout for each in tracked.parameters], tracked.plan)
    if tracked.plan.hold_for(parameters):  # not where one occurs twice
        tracked.plan.release()
        kept.insert(0, known)
        del kept[_KEPT_LISTS:]
    return known


@contextlib.contextmanager
def planned_gradients(target: Target) -> Iterator[PlannedParameters]:
    """Plan as ``planned`` does; where the tensors of a target are gradients themselves, a plan that reads those.

    Gradients are new tensors on each call, so a plan for them isn't kept. None among them, which
    ``torch.autograd.grad(..., allow_unused=True)`` returns, is left out.

    Raises:
        InvalidTypeError: parameters and gradients are mixed, or the target is nothing of the kind.
        ParameterError, LayoutError: as for ``track``.
    """
    items = _in_one(target)
    if isinstance(items, torch.nn.Module) or not are_gradients(items):
        if not isinstance(items, torch.nn.Module) and (found := [*_named_gradients(items)]):
            raise InvalidTypeError(
                f"{_some(name for name, _ in found)} of the target: no parameter, and nothing in .grad, so taken for a "
                "gradient, among parameters whose .grad is measured; give gradients and parameters in calls of their "
                "own, and leave frozen tensors out"
            )
        with planned(items) as known:
            yield known
        return
    named = [(str(index), item) for index, item in enumerate(items) if item is not None]
    parameters = parameters_of([item if isinstance(item, tuple) else (name, item) for name, item in named])
    yield PlannedParameters([each.layout for each in parameters], make_plan(parameters, "tensor"))


def watchable(target: Target) -> Any:
    """Return a target whose parameters have other gradients on each step; modules as one, an iterator as a list.

    A frozen tensor among them is one without a gradient. What was computed from others never has one.

    Raises:
        InvalidTypeError: it is nothing of the kind, or some of its tensors are gradients themselves.
    """
    items: Any = _in_one(target)
    if isinstance(items, torch.nn.Module):
        return items
    advice = (
        "what is measured on each step is the .grad of parameters. Give the module or its parameters; "
        "gradient_stats(gradients) measures gradients once"
    )
    if are_gradients(items):
        raise InvalidTypeError(
            f"the target holds gradients, or tensors that have none in .grad and require none; {advice}"
        )
    computed = [name for name, tensor in _named_gradients(items) if not tensor.is_leaf]
    if computed:
        raise InvalidTypeError(
            f"{_some(computed)} of the target: computed from other tensors, so that no backward fills its .grad; "
            f"{advice}"
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
        if not _is_gradient(tensor):
            return False
        found = True
    return found


def _is_gradient(item: Any) -> bool:
    """Whether it is a tensor that is no parameter, and that no backward gives a gradient."""
    if type(item) is torch.nn.Parameter or not isinstance(item, Tensor) or isinstance(item, torch.nn.Parameter):
        return False
    return not (item.requires_grad or item.grad is not None if item.is_leaf else item.retains_grad)


def _named_gradients(items: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients among the items of a target, by name or by place."""
    for index, item in enumerate(items):
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (index, item)
        if _is_gradient(tensor):
            yield (f"element {name}" if isinstance(name, int) else repr(name)), tensor


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
