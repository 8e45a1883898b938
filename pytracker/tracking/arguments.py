"""The arguments of a tracker, checked before anything is opened or another rank is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from .._checks import function, seconds, wrong_type
from ..diagnostics import Diagnosis
from ..errors import InvalidValueError
from ..sinks import SINKS, check_sinks


def check_arguments(
    optimizer: Any, diagnosis: Any, on_finding: Any, sinks: Any, meta: Any, process_group: Any, rank_timeout: Any
) -> None:
    """Make sure that a tracker can be made of these: a mistake leaves no run behind that was begun for nothing.

    Raises:
        InvalidTypeError: one is of the wrong type; the message has its name and value, and what is expected.
        InvalidValueError: ``rank_timeout`` isn't a number of seconds above 0, or this rank isn't in ``process_group``.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise wrong_type("optimizer", optimizer, "one with param_groups")
    if diagnosis is not None and not isinstance(diagnosis, Diagnosis) and diagnosis != "default":
        raise wrong_type("diagnosis", diagnosis, "a Diagnosis, or None for none")
    if on_finding is not None:
        function("on_finding", on_finding)
    check_sinks(sinks, SINKS)
    if meta is not None and not (isinstance(meta, Mapping) and all(isinstance(name, str) for name in meta)):
        raise wrong_type("meta", meta, 'a dictionary of names, as {"clip_threshold": 1.0}')
    seconds("rank_timeout", rank_timeout)
    if process_group is None:
        return
    if dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidValueError(
            "process_group is one that this rank is not in (new_group gives GroupMember.NON_GROUP_MEMBER there); give "
            "it the group of the ranks that it shares the model with, and make no tracker where there is none"
        )
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise wrong_type("process_group", process_group, "a torch.distributed.ProcessGroup, as new_group returns")
