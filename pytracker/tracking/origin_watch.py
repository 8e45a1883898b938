"""Locates NaN or Inf in the steps after it was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .._checks import wrong_type
from ..control import NonfiniteSearch
from ..diagnostics import Finding
from ..history import History

RULE = "nonfinite_origin"


class OriginWatch:
    """Puts hooks on the model once a drain has brought a gradient that is not finite, for steps until one has that.

    Nothing is added to a step before that, and what runs is the training's own next step: no batch is run again.

    Args:
        model: the modules to look at.
        prefixes: what the names of the series of all, and of players, begin with.
        find: told where it came from, once.

    Raises:
        InvalidTypeError: the model is no module.
    """

    def __init__(self, model: Any, prefixes: Sequence[str], find: Callable[[Finding], None]) -> None:
        if not isinstance(model, torch.nn.Module):
            raise wrong_type("model", model, 'a torch.nn.Module, for on_nonfinite="locate"')
        self._model, self._prefixes, self._find = model, prefixes, find
        self._search: NonfiniteSearch | None = None
        self._seen = -1  # the latest step that was looked at
        self._is_told = False

    def see(self, history: History) -> None:
        """Begin to search where the latest rows have such a gradient."""
        counts = [history.get(f"{prefix}grad_nonfinite") for prefix in self._prefixes]
        known = [each for each in counts if each is not None and len(each)]
        if self._is_told or not known:
            return
        new = [np.nansum(each.values[each.steps > self._seen]) for each in known]
        self._seen = max(int(each.steps[-1]) for each in known)
        if self._search is None and max(new) > 0:
            self._search = NonfiniteSearch(self._model)

    def step(self, step: int) -> None:
        """Take what the search has found in this step."""
        if self._search is None or not self._search.ran:
            return
        origin = self._search.stop()
        self._search = None
        if origin is None:
            return
        self._is_told = True
        stale = bool(origin.bad_parameters)
        self._find(
            Finding(
                rule=RULE,
                severity="critical",
                first_step=step,
                last_step=step,
                evidence=str(origin),
                parameters=origin.bad_parameters,
                cause=(
                    "the weights are not finite any more: an earlier step has spoiled them"
                    if stale
                    else "the batch holds values that are not finite"
                    if origin.phase == "forward" and origin.bad_inputs
                    else "this operation overflows, or divides by zero, or takes a root or a logarithm at zero"
                ),
                action=(
                    "go back to a checkpoint before that, and skip steps whose gradient is not finite: "
                    "tracker.step(clip=...) with a fused optimizer does"
                    if stale
                    else f"look at the batch of step {step}, and run it under pytracker.locate_nonfinite; add an "
                    "epsilon, or compute this part in float32"
                ),
            )
        )

    def close(self) -> None:
        """Take the hooks off."""
        if self._search is not None:
            self._search.stop()
            self._search = None
