"""What this rank holds of each parameter, read from the modules and the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LayoutError, ParameterError

_WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)  # FSDP1, checkpointing, torch.compile
_REPLICATING_WRAPPERS = ("DistributedDataParallel", "DataParallel")  # hold the model as an attribute `module`
_ALL = (0, -1)


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a parameter, in words that other ranks understand."""

    is_counted: bool = True  # this rank's piece is added; False on the replicas of a rank that adds the same
    replicated: bool = True  # every rank that has the name has the whole gradient
    shard_ranks: tuple[int, ...] = ()  # all ranks over which this parameter is sharded; another set holds a copy
    replica_ranks: tuple[int, ...] = ()  # those that hold the same piece of a sharded parameter, this rank among them
    everywhere: bool = False  # a wrapper says that all ranks of the training have the whole gradient


@dataclass(frozen=True)
class ParameterLayout:
    """What there is to know of a parameter of which this rank holds all or a shard; keeps no tensor alive."""

    name: str  # in the model, without the wrappers around it
    shape: tuple[int, ...]  # of the whole parameter
    shard: Shard = Shard()
    window: tuple[int, int] = _ALL  # offset and length in a gradient that holds several parameters; length -1: all
    groups: tuple[str, ...] = ()  # names of those over which, one after another, the pieces add up to the whole

    @property
    def is_flat(self) -> bool:
        """Whether it is sharded as a part of a flat tensor, as by FSDP1."""
        return bool(self.groups) and self.window[1] >= 0


@dataclass(frozen=True)
class LocalParameter(ParameterLayout):
    """A parameter as this rank holds it."""

    parameter: Tensor = field(kw_only=True)  # has the gradient

    @property
    def layout(self) -> ParameterLayout:
        """All but the tensor."""
        return ParameterLayout(self.name, self.shape, self.shard, self.window, self.groups)


def parameters_of_module(model: torch.nn.Module) -> list[LocalParameter]:
    """Return every parameter of a model as this rank holds it; one that occurs twice counts once.

    Raises:
        LayoutError: a layout cannot be told.
    """
    for module in model.modules():
        if _is_a(module, ("FSDPModule",)):  # FSDP2: after a forward its root holds the whole parameters in their place
            module.reshard()  # type: ignore[operator]
    replicas = {
        f"{path}.".lstrip("."): module for path, module in model.named_modules() if _is_a(module, _REPLICATING_WRAPPERS)
    }
    flattened = [each for path, module in model.named_modules() for each in _of_fsdp1(path, module)]
    known = {id(each.parameter) for each in flattened}
    others = [
        _of_ddp(local_parameter(name, parameter), replicas)
        for name, parameter in model.named_parameters()
        if id(parameter) not in known
    ]
    return [replace(each, name=_plain_name(each.name, list(replicas))) for each in flattened + others]


def _is_a(module: torch.nn.Module, names: Iterable[str]) -> bool:
    """Tell whether a module is of a class of these names, or derived from one; torch may lack them."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _of_ddp(each: LocalParameter, replicas: dict[str, torch.nn.Module]) -> LocalParameter:
    """Return a parameter with what a DistributedDataParallel around it says: it is reduced over the wrapper's ranks."""
    for prefix, wrapper in replicas.items():
        inside = each.name.removeprefix(f"{prefix}module.")
        group: Any = getattr(wrapper, "process_group", None)
        if each.shard.replicated and inside != each.name and group is not None:
            ignored: Any = getattr(wrapper, "parameters_to_ignore", ())
            if inside not in ignored and dist.get_world_size(group) == dist.get_world_size():
                return replace(each, shard=replace(each.shard, everywhere=True))
    return each


def local_parameter(name: str, parameter: Tensor) -> LocalParameter:
    """Return a parameter as this rank holds it, judged by itself.

    Raises:
        LayoutError: it is a DTensor that is a partial sum, or belongs to an FSDP1 module.
        ParameterError: it is a parameter of a lazy module and has no shape yet.
    """
    if getattr(parameter, "_fsdp_flattened", False):
        raise LayoutError(
            f"parameter {name!r} belongs to a FullyShardedDataParallel, and does not tell by itself which piece of it "
            "this rank holds; give the model instead of its parameters"
        )
    if torch.nn.parameter.is_lazy(parameter):
        raise ParameterError(f"parameter {name!r} has no shape yet; run the model once before it is measured")
    if parameter.is_nested:  # its parts differ in shape
        return LocalParameter(name, (parameter.numel(),), parameter=parameter)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return LocalParameter(name, tuple(parameter.shape), parameter=parameter)
    coordinate = mesh.get_coordinate()
    counts = coordinate is not None
    same: list[Any] = []
    for dimension, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise LayoutError(
                f"parameter {name!r} is a DTensor with placement {placement}: a partial sum has no moments of its own; "
                "redistribute it to Shard or Replicate before it is tracked"
            )
        if coordinate is not None:
            counts &= not placement.is_replicate() or coordinate[dimension] == 0
            same.append(slice(None) if placement.is_replicate() else coordinate[dimension])
    shard = Shard(
        is_counted=counts,
        replicated=False,
        shard_ranks=tuple(mesh.mesh.flatten().tolist()),
        replica_ranks=tuple(mesh.mesh[tuple(same)].flatten().tolist()) if coordinate is not None else (),
    )
    spread = [d for d, each in enumerate(parameter.placements) if not each.is_replicate() and mesh.size(d) > 1]  # type: ignore[attr-defined]
    groups = tuple(mesh.get_group(d).group_name for d in spread) if coordinate is not None else ()
    return LocalParameter(name, tuple(parameter.shape), shard, groups=groups, parameter=parameter)


def _of_fsdp1(path: str, module: torch.nn.Module) -> Iterable[LocalParameter]:
    """Return what a FullyShardedDataParallel has flattened and sharded; nothing for any other module.

    FSDP1 says it in attributes of its own only (torch 2.10 to 2.14), so another version may end in an error.
    """
    handle: Any = getattr(module, "_handle", None)
    if not _is_a(module, ("FullyShardedDataParallel",)) or handle is None:
        return []
    try:
        flat, sharded = handle.flat_param, handle.uses_sharded_strategy
        ranks = tuple(dist.get_process_group_ranks(handle.process_group))
        other_shards = getattr(module, "_inter_node_pg", None)  # of the hybrid strategies: this piece's copies
        copies = tuple(dist.get_process_group_ranks(other_shards)) if other_shards else (dist.get_rank(),)
        unsharded = Shard(everywhere=len(ranks) == dist.get_world_size())
        shard = Shard(replicated=False, shard_ranks=ranks, replica_ranks=copies) if sharded else unsharded
        groups = (handle.process_group.group_name,) if sharded else ()
        found = []
        described = zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)
        for index, (name, shape, within) in enumerate(described):
            if handle._use_orig_params:
                parameter = flat._params[index]
                window = (0, parameter.numel()) if sharded else _ALL
            else:
                parameter = flat
                window = (within.offset_in_shard, within.numel_in_shard) if within.in_shard else (0, 0)
            full_name = f"{path}.{name}".lstrip(".")
            found.append(LocalParameter(full_name, tuple(shape), shard, window, groups, parameter=parameter))
    except AttributeError as error:
        raise LayoutError(
            f"module {path or 'model'!r} is a FullyShardedDataParallel of a torch that pytracker cannot read "
            f"(torch {torch.__version__}: {error}); shard with torch.distributed.fsdp.fully_shard instead"
        ) from error
    return found


def _plain_name(name: str, replicas: list[str]) -> str:
    """Return a parameter's name without the wrappers: that of the same model on one device, so that runs compare.

    >>> _plain_name("module.block._orig_mod.weight", [""])
    'block.weight'
    """
    for prefix in sorted(replicas, key=len, reverse=True):
        if name.startswith(f"{prefix}module."):
            name = prefix + name[len(prefix) + len("module.") :]
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
