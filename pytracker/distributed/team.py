"""A tracker's other ranks: `Team` where it talks to some, `SingleRank` where this rank has every whole gradient."""

from __future__ import annotations

import contextlib
import enum
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from .._checks import wrong_value
from .._warn import warn_user
from ..collectives import MEETING, RESCUE, Ranks, by_value, has_others, is_first_rank
from ..core import Rows, TrackedParameters
from ..diagnostics import Finding
from ..errors import InvalidTypeError, LayoutError, RankMismatchError, in_words
from ..history import ParameterInfo
from .moment_merger import MomentMerger
from .noise_scale import GradientNoiseScale, NoiseMerger
from .pace import Intervals
from .replica_drift import ReplicaWatch
from .row_merger import DisagreementError, Receive, RowMerger

T = TypeVar("T")
OnRankFault: TypeAlias = Literal["warn", "raise"]


class SingleRank:
    """Nobody to talk to: a single process, or DDP, whose ranks all have the whole gradient."""

    talks = False
    error: str | None = None

    def __init__(self, infos: list[ParameterInfo], receive: Receive, *, is_first: bool | None = None) -> None:
        self.infos = infos
        self.is_first = is_first_rank() if is_first is None else is_first
        self.take = receive.take

    def merge_weights(self, step: int, moments: NDArray[np.float64]) -> NDArray[np.float64]:
        return moments

    def scalars(self) -> dict[str, Any]:
        return {}

    def is_due(self, step: int) -> bool:
        return False

    def poll(self) -> None:
        return

    def meet(self, steps: int) -> None:
        return

    def finish(self) -> None:
        return

    def leave(self, reason: str) -> None:
        return

    def close(self) -> None:
        return


class State(enum.Enum):
    """How a tracker's ranks stand with each other."""

    TOGETHER = enum.auto()
    SEARCHING = enum.auto()  # a collective has failed, and a thread asks who is missing
    APART = enum.auto()  # there was a fault: nothing more is asked of the others
    LEFT = enum.auto()  # this rank has left: by an exception of the training, or at the end


class Team:
    """Ranks among which the gradients are spread, or whose copies are compared.

    A fault between ranks ends their work together, and never waits on a step: what needs no other rank goes on being
    handed on. It is raised, or a warning, once it is known.

    Args:
        ranks: the ranks.
        infos: what this rank's parameters are.
        merger: merges rows; None where every rank has whole ones.
        replicas: compares copies; None where that is not asked for.
        intervals: cuts this rank's rows as the others cut theirs.
        receive: takes rows that are ready.
        find: takes what was found about other ranks.
        mark: takes a fault in words, for the run.
        on_fault: whether a fault is raised or a warning.
    """

    talks = True

    def __init__(
        self,
        ranks: Ranks,
        infos: list[ParameterInfo],
        merger: RowMerger | None,
        replicas: ReplicaWatch | None,
        intervals: Intervals,
        *,
        receive: Receive,
        find: Callable[[Finding], None],
        mark: Callable[[str], None],
        on_fault: OnRankFault,
    ) -> None:
        self.infos = infos if merger is None else merger.infos
        self.is_first = ranks.is_first
        self.fault: RankMismatchError | None = None
        self._ranks, self._merger, self._replicas, self._intervals = ranks, merger, replicas, intervals
        self._receive, self._find, self._mark, self._on_fault = receive, find, mark, on_fault
        self._state = State.TOGETHER
        self._held: list[Rows] = []  # until it is known who is missing
        self._search: threading.Thread | None = None
        self._is_reported = False

    @property
    def error(self) -> str | None:
        """The fault that ends the run as failed, in words; None where there is none, or a warning was enough."""
        return in_words(self.fault) if self.fault and self._on_fault == "raise" else None

    def scalars(self) -> dict[str, Any]:
        """Return what to record on this step besides what the user gives."""
        return {} if self._merger is None else self._merger.scalars()

    def take(self, rows: Rows) -> None:
        """Take this rank's rows of a drain, and hand on what needs no other rank. Never waits for one, nor raises."""
        if self._state is State.SEARCHING and self._merger is not None:
            self._held.append(self._merger.without_others(rows))  # those before it come first
        elif self._merger is None or self._state is not State.TOGETHER:
            self._receive_alone([rows])
        if self._state is not State.TOGETHER:
            return
        if self._merger is not None and self._intervals.is_full:
            rows = self._merger.leave_out(rows)
        self._intervals.add(rows)
        self._try("a drain was not begun", self._go_on)

    def _go_on(self) -> None:
        """Begin with the intervals whose rows are all here."""
        while (rows := self._intervals.next()) is not None:
            self._start(rows)

    def _start(self, rows: Rows) -> None:
        if self._merger is not None:
            self._merger.start(rows, self._receive)
        if self._replicas is not None:
            self._found(self._replicas.start("gradient", rows.steps, rows.tensors))

    def _try(self, failure: str, act: Callable[[], None]) -> None:
        try:
            act()
        except RankMismatchError as fault:
            self._part(fault)
        except RuntimeError as error:  # gloo's, of a rank that is gone
            self._ask_who_is_missing(self._pending() or failure, error)

    def is_due(self, step: int) -> bool:
        """Tell whether the rows up to ``step`` should be brought to the host: an interval ends with it."""
        try:
            return self._state is State.TOGETHER and self._intervals.is_due(step)
        except RuntimeError:  # a rank is gone: `poll` meets it again
            return False

    def poll(self) -> None:
        """Hand on what has been merged, and say what is wrong between the ranks. Never waits.

        Raises:
            RankMismatchError: the ranks no longer work together, and that is to be raised.
        """
        if self._state is State.TOGETHER:
            self._try("a drain was not merged", self._poll_merger)
        if self._search is not None and not self._search.is_alive():
            self._end_search()
        self._report()

    def meet(self, steps: int) -> None:
        """Make sure that every rank has come, with as many steps recorded. Waits.

        Raises:
            RankMismatchError: one has not, and that is to be raised.
        """
        self.poll()  # what is here is safe, even if a rank is missing below
        self._together(lambda: self._check_steps(steps))

    def _check_steps(self, steps: int) -> None:
        failure = f"{self._pending()}not all ranks came to epoch, flush or close after {steps} steps"
        tallied = self._ranks.tally(steps, failure, doing=MEETING, meanwhile=self._poll_merger)
        if len(tallied) == 1:
            return
        if self._merger is not None:
            self._merger.rescue(self._receive, RESCUE)
        raise RankMismatchError(
            f"{self._pending()}the ranks have recorded different numbers of steps: {by_value(tallied)}; every rank "
            "must call step, epoch, flush and close alike"
        )

    def _poll_merger(self) -> None:
        self._go_on()
        if self._merger is not None:
            self._merger.poll(self._receive)

    def _pending(self) -> str:
        return "" if self._merger is None else self._merger.pending()

    def finish(self) -> None:
        """Hand on everything. Waits.

        Raises:
            RankMismatchError: the ranks no longer work together, and that is to be raised.
        """
        self._together(self._flush)

    def _flush(self) -> None:
        while self._intervals.count:
            self._ranks.wait(self._intervals.is_known, f"{self._pending()}the pace was not told", self._poll_merger)
            rows = self._intervals.next(to_the_end=True)
            if rows is not None:
                self._start(rows)
        if self._merger is not None:
            self._agree(partial(self._merger.flush, self._receive))
        if self._replicas is not None:
            self._found(self._replicas.flush())

    def merge_weights(self, step: int, moments: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weights' moments [T, 6] of all parameters on the first rank; those of copies are compared. Waits.

        Raises:
            RankMismatchError: the ranks no longer work together, and that is to be raised.
        """
        merged = moments if self._merger is None else np.full((len(self.infos), moments.shape[1]), np.nan)

        def merge() -> None:
            nonlocal merged
            if self._replicas is not None:
                self._found(self._replicas.start("weight", np.array([step], np.int64), moments[None]))
            if isinstance(self._merger, MomentMerger):
                merged = self._agree(partial(self._merger.merge_now, moments))

        if not isinstance(self._merger, MomentMerger):
            merged = moments
        self._together(merge)
        return merged

    def _agree(self, act: Callable[[], T]) -> T:
        """Do something of which the first rank alone sees the result, and let all know where that is wrong."""
        result, fault = None, None
        try:
            result = act()
        except DisagreementError as error:
            fault = error
        verdicts = self._ranks.tally("" if fault is None else str(fault), "what was merged is not known", doing=MEETING)
        if fault is not None:
            raise fault
        for verdict in filter(None, verdicts):
            raise RankMismatchError(verdict)
        return cast(T, result)

    def _together(self, act: Callable[[], None]) -> None:
        """Do something with the other ranks, and note where that fails."""
        if self._search is not None:
            self._search.join()
            self._end_search()
        if self._state is State.TOGETHER:
            try:
                act()
            except RankMismatchError as fault:
                self._part(fault)
            except RuntimeError as error:  # gloo's, of a rank that is gone
                self._part(self._ranks.missing(f"{self._pending()}not all ranks came", error))
            except BaseException as error:
                if not isinstance(error, Exception):  # ^C while others are waited for: they may be somewhere else
                    self._part(RankMismatchError(f"interrupted by {in_words(error)}"))
                    self._is_reported = True
                raise
        self._report()

    def _found(self, findings: list[Finding]) -> None:
        for finding in findings if self.is_first else ():  # all ranks know, and one says it
            self._find(finding)

    def _ask_who_is_missing(self, failure: str, error: RuntimeError) -> None:
        """Find out beside the training who is missing: that takes some seconds."""
        self._state = State.SEARCHING

        def ask() -> None:
            self.fault = self._ranks.missing(failure, error)

        self._search = threading.Thread(target=ask, daemon=True)
        self._search.start()

    def _end_search(self) -> None:
        self._search = None
        if self.fault is not None:
            self._part(self.fault)

    def _part(self, fault: RankMismatchError) -> None:
        """End the work with the others, tell them why, and hand on what this rank knows by itself."""
        self.fault = RankMismatchError(str(fault))
        self._leave(str(fault), at_once=True)
        self._state = State.APART

    def _leave(self, reason: str, *, at_once: bool = False) -> None:
        self._ranks.leave(reason, at_once=at_once)
        if self._replicas is not None:
            self._replicas.abandon()
        if self._merger is not None:
            self._receive_alone([*self._merger.abandon(), *self._intervals.abandon(), *self._held])
            self._held.clear()

    def _receive_alone(self, rows: list[Rows]) -> None:
        for each in rows:
            self._receive.take(each if self._merger is None else self._merger.without_others(each))

    def _report(self) -> None:
        """Say what is wrong between the ranks: at each call where it is to be raised, or once in a warning."""
        if self.fault is None or self._state is not State.APART:
            return
        first, self._is_reported = not self._is_reported, True
        if first:
            self._mark(str(self.fault))
        if self._on_fault == "raise" and first:
            raise self.fault
        if self._on_fault == "raise":
            raise RankMismatchError(
                f"the tracker's ranks no longer work together; close it and make a new one. First fault: {self.fault}"
            ) from self.fault
        if first:
            warn_user(
                f"the tracker's ranks no longer work together: the training goes on, and of what it records only what "
                f"needs no other rank is kept. {self.fault}"
            )

    def leave(self, reason: str) -> None:
        """Leave the others, who may not know of it, and hand on what needs none of them. Waits for nobody."""
        if self._state is State.TOGETHER:
            with contextlib.suppress(RuntimeError):  # a fault at the end adds nothing
                self._poll_merger()
        if self._state in (State.TOGETHER, State.SEARCHING):
            self._leave(reason)
        self._state = State.LEFT

    def close(self) -> None:
        """Let go of the groups."""
        self._state = State.LEFT
        self._ranks.close()


def team_of(
    tracked: TrackedParameters,
    infos: list[ParameterInfo],
    *,
    every: int,
    seconds: float,
    weights_every: int | None,
    extras: tuple[str, ...],
    group: dist.ProcessGroup | None,
    check_replicas: bool,
    noise_scale: GradientNoiseScale | None,
    timeout: float,
    receive: Receive,
    find: Callable[[Finding], None],
    mark: Callable[[str], None],
    on_fault: OnRankFault,
) -> SingleRank | Team:
    """Return the ranks that a tracker must talk to. A meeting where there are some; waits.

    Raises:
        LayoutError: it cannot be told whether other ranks have copies or pieces, or the group leaves some of them out;
            a group was given, and torch.distributed is not initialized; or the noise scale is asked for, of parameters
            that are spread.
        RankMismatchError: the ranks were given different arguments or models, or one does not come.
    """
    if on_fault not in get_args(OnRankFault):
        raise wrong_value("on_rank_fault", on_fault, '"warn" or "raise"')
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
            return SingleRank(infos, receive, is_first=True)
    if not spread and noise_scale is None and not (check_replicas and has_others()):
        return SingleRank(infos, receive)
    ranks = Ranks(members, timeout=timeout)
    try:
        ranks.check_settings(
            every=every,
            weights_every=weights_every,
            columns=extras,
            check_replicas=check_replicas,
            noise_scale=noise_scale is not None,
            spread=spread,
        )
        merger: RowMerger | None = None
        if noise_scale is not None:
            merger = NoiseMerger(ranks, infos, noise_scale, every=every)
        elif spread:
            merger = MomentMerger(
                ranks,
                tracked.parameters,
                infos,
                every=every,
                watched=check_replicas,
                weights=weights_every is not None,
                extras=bool(extras),
            )
        replicas = ReplicaWatch(ranks, tracked.parameters, every=every) if check_replicas else None
        # Copies are compared at the same step on all ranks, which then wait for each other: at steps known beforehand.
        intervals = Intervals(ranks, every=every, seconds=math.inf if check_replicas else seconds)
        return Team(ranks, infos, merger, replicas, intervals, receive=receive, find=find, mark=mark, on_fault=on_fault)
    except BaseException as error:
        ranks.leave(in_words(error))
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
