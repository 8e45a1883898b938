"""Gradients that an optimizer in the backward takes, and frees, as they come: each is read before that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import moments
from ..columns import ABS_MAX, COLUMNS, SUM, SUM_SQ, TOTALS
from ..core import DeviceLog, LocalParameter, make_plan
from ..errors import InvalidValueError, LayoutError
from .loss_scale import LossScale
from .sources import GradientSource


class ReadInBackward:
    """Stands in for ``Steering``: one launch for each gradient as it is accumulated, and one row a step of them all.

    Where several backward passes come before a step, its row is of the last gradient of each parameter.

    Args:
        log: has the rows.
        plan: of all parameters.
        parameters: those of the plan.
        scale: what the gradients are multiplied by where a GradScaler is given.
        source: says which parameters are read.

    Raises:
        LayoutError: a parameter is a part of a flat one (FSDP1), whose gradients no hook is told of.
    """

    def __init__(
        self, log: DeviceLog, plan: Any, parameters: Sequence[LocalParameter], scale: LossScale, source: GradientSource
    ) -> None:
        if any(each.window[1] >= 0 for each in parameters):
            raise LayoutError("in_backward: a FullyShardedDataParallel keeps its gradients until all are there")
        self._log, self._plan, self._scale, self._source = log, plan, scale, source
        own = {id(each) for each in source.parameters}
        self._read: dict[int, Tensor] = {}  # of each parameter that has a gradient, its row
        self._handles = [
            _before_others(each.parameter, partial(self._take, index, make_plan([each])))
            for index, each in enumerate(parameters)
            if id(each.parameter) in own and each.parameter.requires_grad
        ]

    def _take(self, index: int, plan: Any, parameter: Tensor) -> None:
        (self._read[index],) = plan.reduce(self._scale.of_gradients())

    def step(self, append: Callable[..., None], step: int, scalars: dict[str, Any], asked: Any, gradients: Any) -> None:
        """Append a row of what was read since the last step."""
        if gradients is not None:
            raise InvalidValueError("gradients: the tracker reads them in the backward; make it without in_backward")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InvalidValueError("step() is captured in a CUDA graph; make the tracker without in_backward for that")
        divisor, read, self._read = scalars.get("grad_scale"), self._read, {}
        with self._source.given([None] * len(self._source.parameters)):
            append(step, scalars, hold=True)
        devices = zip(self._plan.members, self._plan.devices, strict=True)
        self._log.fill([self._part(read, members, device, divisor) for members, device in devices])
        self._log.settle()

    @staticmethod
    def _part(read: dict[int, Tensor], members: Sequence[int], device: torch.device, divisor: Any) -> Tensor:
        """Return totals and moments of a device's parameters, as a row begins with."""
        missing = torch.full((len(COLUMNS),), torch.nan, dtype=torch.float64, device=device)
        found = [read[index][TOTALS:] if index in read else missing for index in members]
        tensors = torch.stack([missing, *found])[1:]  # there may be no parameter
        if divisor is not None:
            for column, factor in ((SUM, divisor), (ABS_MAX, divisor), (SUM_SQ, divisor * divisor)):
                tensors[:, column] /= factor  # one by one: an index of several would be copied to the device
        return torch.cat([moments.totals(tensors), tensors.flatten()])

    def ask(self, *_: Any) -> NoReturn:
        """Refuse a clip.

        Raises:
            InvalidValueError: always.
        """
        raise InvalidValueError(
            "a clip goes by the norm of all gradients, and with in_backward the first are gone before the last is there"
        )

    clip = ask

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no rule."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _before_others(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Register a hook that is called before those that are registered already, which may free the gradient."""
    known: Any = parameter
    handle = known.register_post_accumulate_grad_hook(hook)
    hooks = known._post_accumulate_grad_hooks
    others = [(key, hooks.pop(key)) for key in [*hooks] if key != handle.id]
    hooks.update(others)  # put in anew: autograd goes by the order in which they came
    return handle
