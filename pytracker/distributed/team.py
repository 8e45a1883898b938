"""A tracker's other ranks: `Team` where it talks to some, `SingleRank` where this rank has every whole gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from ..core import Rows, TrackedParameters
from ..diagnostics import Finding
from ..errors import InvalidTypeError, LayoutError, RankMismatchError, in_words
from ..history import ParameterInfo
from .merging import MomentMerger, RowMerger
from .noise_scale import GradientNoiseScale, NoiseMerger
from .ranks import RESCUE, Ranks, has_others, is_first_rank
from .replica_drift import ReplicaWatch

Receive: TypeAlias = Callable[[Rows], None]
P = ParamSpec("P")
T = TypeVar("T")


class SingleRank:
    """Nobody to talk to: a single process, or DDP, whose ranks all have the whole gradient."""

    polls = False  # whether rows are merged
    talks = False
    fault: RankMismatchError | None = None  # after which the ranks no longer work together

    def __init__(self, infos: list[ParameterInfo], *, is_first: bool | None = None) -> None:
        self.infos = infos
        self.is_first = is_first_rank() if is_first is None else is_first

    def scalars(self) -> dict[str, Any]:
        """Return what to record on this step besides what the user gives."""
        return {}

    def take(self, rows: Rows, receive: Receive) -> list[Finding]:
        """Hand on rows of this rank, at a drain; return what was found about other ranks."""
        receive(rows)
        return []

    def poll(self, receive: Receive) -> None:
        """Hand on what has been merged. Never waits."""

    def meet(self, steps: int, receive: Receive) -> None:
        """Make sure that every rank has come, with as many steps recorded. Waits."""

    def finish(self, receive: Receive) -> list[Finding]:
        """Hand on everything; return what was found about other ranks. Waits."""
        return []

    def merge_weights(self, step: int, moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[Finding]]:
        """Return the moments of all parameters, [T, 6], of those that this rank has. Waits."""
        return moments, []

    def leave(self, receive: Receive) -> None:
        """Hand on what can be had without waiting for anybody, and give up the rest; so too with all rows to come."""

    def close(self) -> None:
        """Let go of the groups."""


def _together(method: Callable[Concatenate[Team, P], T]) -> Callable[Concatenate[Team, P], T]:
    """Note a fault of what ranks do together, and refuse at once whatever they would do after it."""

    @functools.wraps(method)
    def guarded(team: Team, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if team.fault is not None:
            raise RankMismatchError(
                f"the tracker's ranks no longer work together; close it and make a new one. First fault: {team.fault}"
            ) from team.fault
        try:
            return method(team, *args, **kwargs)
        except RankMismatchError as fault:
            team.fault = fault
            raise
        except BaseException as error:
            if not isinstance(error, Exception):  # ^C while others are waited for: they may be at another collective
                team.fault = RankMismatchError(f"interrupted by {in_words(error)}")
            raise

    return guarded


class Team(SingleRank):
    """Ranks among which the gradients are spread, or whose copies are compared."""

    talks = polls = True

    def __init__(
        self, ranks: Ranks, infos: list[ParameterInfo], merger: RowMerger | None, replicas: ReplicaWatch | None
    ) -> None:
        super().__init__(infos if merger is None else merger.infos)
        self._ranks = ranks
        self._merger = merger
        self._replicas = replicas
        self._left = False
        self.is_first = ranks.is_first

    def scalars(self) -> dict[str, Any]:
        return {} if self._merger is None else self._merger.scalars()

    def take(self, rows: Rows, receive: Receive) -> list[Finding]:
        alone = self._left or self.fault is not None
        if alone or self._merger is None:
            self._receive_alone([*self._given_up(), rows], receive)
        with contextlib.suppress(RankMismatchError):  # `poll` says so: the log would deliver the rows again
            return [] if alone else self._share(rows)
        return []

    @_together
    def _share(self, rows: Rows) -> list[Finding]:
        if self._merger is not None:
            self._merger.start(rows)
        return [] if self._replicas is None else self._told(self._replicas.start("gradient", rows.steps, rows.tensors))

    def _given_up(self) -> list[Rows]:
        """Return the rows that were on their way to the other ranks, and will not be merged."""
        return [] if self._merger is None else self._merger.abandon()

    def _receive_alone(self, rows: list[Rows], receive: Receive) -> None:
        for each in rows:
            whole = each if self._merger is None else self._merger.without_others(each)
            if whole is not None:
                receive(whole)

    @_together
    def poll(self, receive: Receive) -> None:
        if self._merger is not None:
            self._merger.poll(receive)

    @_together
    def meet(self, steps: int, receive: Receive) -> None:
        self.poll(receive)  # what is here is safe, also where a rank is missing below
        failure = f"{self._pending()}not all ranks came to epoch, flush or close after {steps} steps"
        counts = self._ranks.gather_count(steps, lambda: self.poll(receive), failure)
        if len(set(counts)) == 1:
            return
        self._ranks.discard()
        if self._merger is not None:
            with contextlib.suppress(RankMismatchError):
                self._merger.rescue(receive, RESCUE)
        by_rank = dict(zip(self._ranks.members, counts, strict=True))
        raise RankMismatchError(
            f"{self._pending()}the ranks have recorded different numbers of steps, by rank: {by_rank}; every rank must "
            "call step, epoch, flush and close alike"
        )

    def _pending(self) -> str:
        return "" if self._merger is None else self._merger.pending()

    @_together
    def finish(self, receive: Receive) -> list[Finding]:
        if self._merger is not None:
            self._merger.flush(receive)
        return [] if self._replicas is None else self._told(self._replicas.flush())

    @_together
    def merge_weights(self, step: int, moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[Finding]]:
        found = []
        if self._replicas is not None:
            found = self._told(self._replicas.start("weight", np.array([step], np.int64), moments[None]))
        return moments if self._merger is None else self._merger.merge_now(moments), found

    def _told(self, found: list[Finding]) -> list[Finding]:
        return found if self.is_first else []  # all ranks know, and one says it

    def leave(self, receive: Receive) -> None:
        with contextlib.suppress(RankMismatchError):
            self.poll(receive)
        self._left = True
        self._ranks.leave()
        self._receive_alone(self._given_up(), receive)
        if self._replicas is not None:
            self._replicas.abandon()
            self._replicas = None

    def close(self) -> None:
        if self._replicas is not None:
            self._replicas.close()
        self._ranks.close()


def team_of(
    tracked: TrackedParameters,
    infos: list[ParameterInfo],
    *,
    every: int,
    group: dist.ProcessGroup | None,
    check_replicas: bool,
    noise_scale: GradientNoiseScale | None,
    timeout: float,
) -> SingleRank:
    """Return the ranks that a tracker must talk to. A collective where there are some; waits.

    Raises:
        LayoutError: it cannot be told whether other ranks have copies or pieces, or the group leaves some of them out;
            a group was given, and torch.distributed is not initialized; or the noise scale is asked for, of parameters
            that are spread.
        RankMismatchError: the ranks were given different arguments or models, or one does not come.
    """
    spread = tracked.sharded or group is not None
    if noise_scale is not None:
        _check_noise_scale(noise_scale, spread)
        group = noise_scale.group
    if not spread and (group is None or dist.get_world_size(group) < dist.get_world_size()):
        _check_told(tracked)
    members = dist.get_process_group_ranks(group) if group is not None else None
    if members is not None:
        _check_members(tracked, members)
        if len(members) == 1:
            return SingleRank(infos, is_first=True)
    if not spread and noise_scale is None and not (check_replicas and has_others()):
        return SingleRank(infos)
    ranks = Ranks(members, timeout=timeout)
    try:
        ranks.check_settings(
            every=every, check_replicas=check_replicas, noise_scale=noise_scale is not None, spread=spread
        )
        merger: RowMerger | None = None
        if noise_scale is not None:
            merger = NoiseMerger(ranks, infos, noise_scale, every=every)
        elif spread:
            merger = MomentMerger(ranks, tracked.parameters, infos, every=every, watched=check_replicas)
        replicas = ReplicaWatch(ranks, tracked.parameters, every=every, timeout=timeout) if check_replicas else None
        return Team(ranks, infos, merger, replicas)
    except RankMismatchError:  # told to all alike: the next tracker can have the groups; or discarded already
        ranks.close()
        raise
    except BaseException:
        ranks.leave()
        raise


def _check_told(tracked: TrackedParameters) -> None:
    """Make sure that of many ranks every one has the whole gradient."""
    if not has_others():
        return
    for each in tracked.parameters:
        if each.parameter.requires_grad and not each.shard.everywhere:
            raise LayoutError(
                f"parameter {each.name!r} is a plain tensor on one of {dist.get_world_size()} ranks, in no "
                "DistributedDataParallel of all of them, so it cannot be told whether the others have copies of its "
                "gradient, pieces, or other parameters. Give the DistributedDataParallel instead of what is in it; or "
                "process_group=torch.distributed.group.WORLD, where ranks that have one name have copies, and those "
                "that have other names other parameters; or, where this rank trains alone, "
                "process_group=torch.distributed.new_group([rank], use_local_synchronization=True)"
            )


def _check_members(tracked: TrackedParameters, members: list[int]) -> None:
    """Make sure that the ranks which share a parameter are all among those that merge."""
    if dist.get_rank() not in members:
        raise LayoutError(f"rank {dist.get_rank()} is not in process_group, whose ranks are {members}")
    for each in tracked.parameters:
        left_out = sorted(set(each.shard.shard_ranks) - set(members))
        if left_out:
            raise LayoutError(
                f"parameter {each.name!r} is spread over ranks {list(each.shard.shard_ranks)}, and process_group "
                f"leaves out {left_out}; leave process_group away, or give one of all ranks that have a piece of the "
                "model"
            )


def _check_noise_scale(noise_scale: GradientNoiseScale, spread: bool) -> None:
    if not isinstance(noise_scale, GradientNoiseScale):
        raise InvalidTypeError(
            f"noise_scale is {noise_scale!r:.80}; expected a pytracker.GradientNoiseScale(model, ...)"
        )
    if spread:
        raise LayoutError(
            "the noise scale compares whole gradients before and after DDP averages them, and here the parameters are "
            "spread over the ranks; leave noise_scale or process_group out"
        )
