"""Does the optimizer train what the model computes?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..evidence import Finding, View, rule

_NAMED = 20  # parameters named in a finding at most


@rule
def not_in_optimizer(view: View, steps: int = 20, patience: int = 50) -> Iterator[Finding]:
    """Parameters that get a gradient and are in no group of the optimizer: nothing trains them.

    All of them: the optimizer was given the parameters of another model, such as a copy. Some: a layer was added after
    the optimizer was made, or left out. Nothing is said of all of them while the loss falls: an optimizer may train
    copies in another precision, and copy them back.

    Args:
        view: what to judge.
        steps: how long a gradient must have been there.
        patience: losses before it is said of all of them.
    """
    infos = view.layout.infos
    if not view.meta.get("optimizer") or view.interval_stop == 0:
        if infos:
            view.cannot_judge("the optimizer isn't known")
        return
    last, first = view.parameters.last_step, view.parameters.first_step
    if int(last[view.interval_stop - 1]) - int(first[0]) + 1 < steps:
        return
    norms = view.field("norm_mean", 3)
    alive = (norms > 0).all(axis=0) & ~view.frozen
    left_out = np.flatnonzero(alive & ~view.layout.grouped)
    if not len(left_out):
        return
    names = tuple(infos[place].name for place in left_out[:_NAMED])
    everything = len(left_out) == int(alive.sum()) and not view.layout.grouped.any()
    if everything and view.learns:  # the optimizer has copies in another precision, which are copied back
        view.withdraw("the loss falls: the optimizer trains copies of them")
        return
    if everything and len(view.loss) < patience:
        return
    yield view.finding(
        "critical" if everything else "warning",
        f"{len(left_out)} of {int(alive.sum())} parameters with a gradient ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}) are in no group of the optimizer",
        first_step=int(first[0]),
        last_step=int(last[view.interval_stop - 1]),
        parameters=names,
        cause=(
            "the optimizer was made for the parameters of another model: a copy, or the model before it was wrapped"
            if everything
            else "they were added after the optimizer was made, or left out of its groups"
        ),
        action=(
            "make the optimizer from the parameters of the model that is trained"
            if everything
            else "add them to a group; freeze them (requires_grad_(False)) if they are meant to stay"
        ),
        numbers={"left_out": float(len(left_out)), "parameters": float(len(infos))},
    )
