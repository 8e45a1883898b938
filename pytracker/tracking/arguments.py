"""The arguments of a tracker, checked before anything is opened or another rank is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .._checks import flag, function, items, kind_of, seconds, shown, text, whole_number, wrong_type, wrong_value
from .._json import encode
from .._warn import warn_user
from ..columns import REQUESTS
from ..core import LocalParameter
from ..diagnostics import Diagnosis
from ..distributed import GradientNoiseScale
from ..errors import InvalidTypeError, InvalidValueError
from ..sinks import SINKS, check_sinks


def check_arguments(
    diagnosis: Any,
    on_finding: Any,
    sinks: Any,
    meta: Any,
    process_group: Any,
    noise_scale: Any,
    gradient: Any,
    grad_scaler: Any,
    flags: Mapping[str, Any],
) -> None:
    """Make sure that a tracker can be made of these: a mistake leaves no run behind that was begun for nothing.

    Raises:
        InvalidTypeError: one is of the wrong type; the message has its name and value, and what is expected.
        InvalidValueError: a value of ``meta`` can't be written, or this rank isn't in ``process_group``.
    """
    if not (
        diagnosis is None or isinstance(diagnosis, Diagnosis) or (isinstance(diagnosis, str) and diagnosis == "default")
    ):
        raise wrong_type("diagnosis", diagnosis, "a Diagnosis, or None for none")
    if on_finding is not None:
        function("on_finding", on_finding)
    check_sinks(sinks, SINKS)
    if meta is not None and not (isinstance(meta, Mapping) and all(isinstance(name, str) for name in meta)):
        raise wrong_type("meta", meta, 'a dictionary of names, as {"clip_threshold": 1.0}')
    for name, value in (meta or {}).items():
        encode(value, f"meta {name!r}")
    for name, value in flags.items():
        flag(name, value)
    if gradient is not None:
        function("gradient", gradient)
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise wrong_type("grad_scaler", grad_scaler, "a torch.amp.GradScaler")
    if noise_scale is not None:
        kind_of("noise_scale", noise_scale, GradientNoiseScale, "a GradientNoiseScale(model, batch_size)")
    if process_group is None:
        return
    outside = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None  # an integer, or an object of its own
    if process_group is outside or (type(process_group) is type(outside) is int and process_group == outside):
        raise InvalidValueError(
            "process_group is one that this rank is not in (new_group gives GroupMember.NON_GROUP_MEMBER there); give "
            "it the group of the ranks that it shares the model with, and make no tracker where there is none"
        )
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise wrong_type("process_group", process_group, "a torch.distributed.ProcessGroup, as new_group returns")


def check_choices(
    rank_timeout: Any, on_nonfinite: Any, weights_every: Any, columns: Any, in_backward: bool
) -> tuple[str, ...]:
    """Make sure that what a tracker is told to do can be done, before anything is opened too.

    Returns:
        The further columns that ``columns`` asks for.

    Raises:
        InvalidTypeError, InvalidValueError: ``rank_timeout`` isn't a number of seconds above 0, ``on_nonfinite`` not
            "locate", ``weights_every`` no number of steps, or ``columns`` not what there is.
    """
    seconds("rank_timeout", rank_timeout)
    if on_nonfinite not in (None, "locate"):
        raise wrong_value("on_nonfinite", on_nonfinite, 'None or "locate"')
    if weights_every is not None:
        whole_number("weights_every", weights_every, low=1)
    asked = [text("columns", name) for name in items("columns", columns, "names")]
    for name in asked:
        if name not in REQUESTS:
            raise wrong_value("columns", name, f"one of {', '.join(map(repr, REQUESTS))}")
    if asked and in_backward:
        raise InvalidValueError(
            f"columns is {shown(asked)}, and in_backward reads each gradient by itself as it comes; leave one out"
        )
    return tuple(column for name in REQUESTS if name in asked for column in REQUESTS[name])


def checked_state(state: Any) -> tuple[int, int, list[str]]:
    """Return what ``state_dict`` has told: the steps, the epochs, and the names of the steps' scalars.

    Raises:
        InvalidTypeError, InvalidValueError: it is something else.
    """
    if not isinstance(state, Mapping) or not {"steps", "epochs"} <= set(state):
        raise wrong_value("state", state, "what Tracker.state_dict() returned")
    steps, epochs = (whole_number(f"state[{name!r}]", state[name]) for name in ("steps", "epochs"))
    names = items("state['scalars']", state.get("scalars", []), "names")
    return steps, epochs, [text("a name of state['scalars']", name) for name in names]


def explain_scalars(scalars: Mapping[str, Any]) -> None:
    """Say more of scalars that could not be recorded, where it is known what was meant.

    Raises:
        InvalidTypeError: a GradScaler was given in place of its scale, or a dictionary in place of its items.
    """
    for name, value in scalars.items():
        if name == "grad_scale" and hasattr(value, "get_scale"):
            raise InvalidTypeError(
                f"grad_scale is a {type(value).__name__}; give its scale, scaler.get_scale(), which waits for the "
                "device, or call scaler.unscale_(optimizer) before step() and leave grad_scale out"
            )
        if isinstance(value, Mapping):
            raise wrong_type(repr(name), value, f"a number; give those of a dictionary by name: **{name}")


def warn_of_untrained(parameters: Sequence[LocalParameter], optimizer: Any) -> None:
    """Warn of parameters that require a gradient and are not in the optimizer, or of one for another model."""
    groups: Any = [] if optimizer is None else optimizer.param_groups
    known = {id(tensor) for group in groups if isinstance(group, Mapping) for tensor in group.get("params", ())}
    trained = [each for each in parameters if each.parameter.requires_grad]
    strangers = [each.name for each in trained if id(each.parameter) not in known]
    if not known or not strangers:
        return
    if len(strangers) == len(trained):
        warn_user(
            "the optimizer has none of the parameters that are tracked, so its learning rates say nothing of them: "
            "give the optimizer that was made for this model, after it was wrapped or sharded. (One that trains "
            "copies of the parameters in another precision is fine.)"
        )
        return
    warn_user(
        f"{len(strangers)} of {len(trained)} parameters that require a gradient are in no group of the optimizer, "
        f"which does not train them: {', '.join(map(repr, strangers[:5]))}{', ...' if len(strangers) > 5 else ''}; "
        "add them with optimizer.add_param_group, or set requires_grad to False"
    )
