"""The tracker: ties a model, an optimizer, the device log, a run, the detectors and the sinks together.

One step, from top to bottom::

    Tracker.step                 counts, and hands the scalars on
      DeviceLog.append           one call into C++: takes the .grad pointers, one launch writes a row on the device
        every `every` rows: one asynchronous copy to the host
      Delivery.put               some steps later: exact rows of single steps
        History, Run (disk), sinks
      LiveDiagnosis              the rules, on what has arrived
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ._atexit import CloseAtExit, exit_on_signals
from ._checks import by_name, flag, number_of_samples, whole_number
from ._checks import seconds as checked_seconds
from .columns import MAX_SCALARS
from .control import CLIP_SERIES, ClipRule
from .core import FIRST_SLOTS, DeviceLog, Rows, Target
from .diagnostics import Diagnosis, Finding
from .distributed import NOISE_SERIES, Receive, team_of
from .errors import InvalidTypeError, InvalidValueError, StoreError, in_words
from .sinks import NoSinks, SinkLike, mirrors_of
from .tracking import (
    EXTRA_SERIES,
    GRADIENT_SERIES,
    Closing,
    Delivery,
    GradientWatch,
    InGraphs,
    InMemoryRun,
    Lanes,
    LateMetrics,
    LiveDiagnosis,
    OriginWatch,
    Players,
    WeightWatch,
    WhoseSteps,
    check_arguments,
    check_choices,
    checked_state,
    explain_scalars,
    facts_for_rules,
    graphed,
    opened,
)

if TYPE_CHECKING:
    from .distributed import GradientNoiseScale
    from .store import Run

_RESERVED = frozenset({*GRADIENT_SERIES, *CLIP_SERIES, *NOISE_SERIES, "epoch", "step"})


class Tracker(Closing):
    """Records every gradient statistic of every step, without making the training wait.

    Call ``step`` after ``backward`` and before the gradients are cleared::

        with pytracker.Tracker(model, optimizer=optimizer) as tracker:
            for x, y in loader:
                loss = loss_function(model(x), y)
                loss.backward()
                tracker.step(loss=loss, n=len(x))
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: a module, or an iterable of modules (a rank's stages of a pipeline, say), of parameters, or of (name,
            parameter) pairs. Parameters of several modules go by their names in these, unless two have the same. Or
            the players of a run, each one of these: ``{"G": generator, "D": discriminator}``. See :doc:`players`.
        optimizer: its learning rates are recorded on every step: ``lr`` is that of the first group, and of several each
            has a series ``lr/NAME`` (its ``name``, or else its index). By name those of the players, or of one model's.
        run: where to keep the training on disk: a ``Run``, or a directory in which to start one; in memory only
            (``tracker.history``) without it. Of several ranks only the first writes.
        every: steps from one copy to the host to the next, at most. Findings come, and the disk is written, as often.
        seconds: time from one copy to the host to the next, at most; it is looked at by ``step``. Ranks that merge
            go by the first one's clock and merge as often; those that compare copies do so each ``every`` steps.
        diagnosis: looks for trouble in what has been recorded, at each drain; None for none, default: all rules.
        on_finding: called with each finding that is new or has grown; by default new ones are logged as warnings
            (logger ``pytracker``).
        sinks: mirrors in other tools, e.g. ``["tensorboard", WandbSink(project="x")]``: sinks, names of them, or
            functions that make one. They are opened on the first rank alone, and work on threads of their own.
        meta: facts for the diagnosis and the report, e.g. ``{"clip_threshold": 1.0, "scheduler": True}``.
        process_group: the ranks over which plain parameters or gradients are spread (pipeline stages, a ZeRO
            optimizer): those of one name are copies. DDP, FSDP, HSDP and tensor parallel say it themselves. Every rank
            makes a tracker, and calls step, epoch, flush and close alike; the first alone writes, and judges.
        check_replicas: compare, at each drain, the gradients of ranks that hold copies, and their weights at the start
            and at each epoch; a rank that drifted is a finding ``replica_drift``. One more collective a drain.
        noise_scale: of a model in DDP: records ``noise_scale``, and the estimates it is made of, on every step. One
            collective a drain.
        gradient: returns the gradient of a parameter, where that is not in ``.grad``: ``lambda p: p.main_grad``.
        grad_scaler: the GradScaler of a training in mixed precision. Its scale is taken out of what is recorded, unless
            ``unscale_`` has done so; and steps that it skips are known as such: ``step_skipped`` is 1.
        rank_timeout: seconds to wait for a rank that does not come to ``flush``, ``epoch`` or ``close``.
        on_rank_fault: what happens where a rank is missing, leaves or disagrees once the tracker is made. "warn": one
            warning says which, the run is marked (``rank_fault`` in its meta), the training goes on, and what needs no
            other rank is recorded: the scalars, and under DDP everything. "raise": a RankMismatchError, at each call.
        close_on_signal: end the program by SystemExit at SIGTERM and SIGHUP, so that it is closed as by Ctrl-C. A
            signal that the program handles or ignores is left as it is.
        on_nonfinite: "locate": once a gradient that is not finite has come, the next steps run with hooks on the model,
            which wait for each output, until a finding says which module made the first NaN or Inf
            (``nonfinite_origin``). ``model`` is a module.
        each_closure: where ``step`` is called in the closure of an LBFGS optimizer, record every evaluation as a step;
            otherwise only the first of each ``optimizer.step``, where that begins.
        in_backward: read each gradient as it comes, before an optimizer in the backward frees it; no clip then.
        weights_every: steps from one to the next of which ||w_after - w_before|| of each parameter is measured, and its
            own norm: ``update_norm`` and ``weight_norm`` of ``history.parameters``. It takes a copy of what is trained
            while the optimizer works. None: norms alone, at the start and at each epoch.
        columns: what else to measure of each gradient, in the same launch: "l1", and "exponents", the shares that are
            subnormal in bf16, fp16 and fp8 or within 4 times of their overflow. See :doc:`tracker`.

    Raises:
        InvalidTypeError: an argument is of the wrong type.
        InvalidValueError: ``every`` is less than 1, or ``rank_timeout`` not above 0.
        ParameterError: two parameters have the same name, or one has no data.
        LayoutError: it cannot be told which piece of a parameter this rank holds; the message says what to give.
        RankMismatchError: the ranks have different intervals or models, or one does not come, as the tracker is made.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        ...     for _ in range(3):
        ...         loss = model(torch.ones(4, 2)).pow(2).mean()
        ...         loss.backward()
        ...         tracker.step(loss=loss, n=4)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> len(tracker.history["loss"]), tracker.history["lr"][:]
        (3, [0.1, 0.1, 0.1])
        >>> tracker.history["grad_norm"][-1] < tracker.history["grad_norm"][0]
        True
    """

    def __init__(
        self,
        model: Target | Mapping[str, Target],
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
        *unnamed: Any,
        run: Run | str | Path | None = None,
        every: int = 50,
        seconds: float = 2.0,
        diagnosis: Diagnosis | str | None = "default",
        on_finding: Callable[[Finding], None] | None = None,
        sinks: Sequence[SinkLike] = (),
        meta: dict[str, Any] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        check_replicas: bool = False,
        noise_scale: GradientNoiseScale | None = None,
        gradient: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        rank_timeout: float = 300.0,
        on_rank_fault: Literal["warn", "raise"] = "warn",
        close_on_signal: bool = True,
        on_nonfinite: Literal["locate"] | None = None,
        each_closure: bool = False,
        in_backward: bool = False,
        weights_every: int | None = None,
        columns: Sequence[Literal["l1", "exponents"]] = (),
    ) -> None:
        """Plan the reduction and allocate the device log; this may wait for the device and for the other ranks."""
        by_name("Tracker", unnamed, 'model, optimizer, run="runs"')
        flags = {"check_replicas": check_replicas, "close_on_signal": close_on_signal, "in_backward": in_backward}
        flags["each_closure"] = each_closure
        check_arguments(diagnosis, on_finding, sinks, meta, process_group, noise_scale, gradient, grad_scaler, flags)
        self._extras = extras = check_choices(rank_timeout, on_nonfinite, weights_every, columns, in_backward)
        self._players = players = Players(model, optimizer)
        if players and noise_scale is not None:
            raise InvalidValueError("noise_scale is of one model whose every step is recorded, and there are players")
        target, self._held, self._plan = players.all.model, players.all.parameters, players.tracked.plan
        find = lambda finding: self._judge.add(finding)  # noqa: E731  # of what is made below
        self._origins = OriginWatch(target, players.prefixes, find) if on_nonfinite else None
        self._watches = players.watches(self._regroup)
        every, seconds = whole_number("every", every, low=1), checked_seconds("seconds", seconds)
        self._team = team_of(
            players.tracked,
            players.infos(),
            every=every,
            seconds=seconds,
            weights_every=weights_every,
            extras=extras,
            group=process_group,
            check_replicas=check_replicas,
            noise_scale=noise_scale,
            timeout=rank_timeout,
            receive=Receive(self._receive, lambda rows: self._delivery.prepare(rows), lambda s: self._weights.until(s)),
            find=find,
            mark=lambda fault: self._run.set_meta(rank_fault=fault),
            on_fault=on_rank_fault,
        )
        self._lock = threading.RLock()
        self._steps = self._epochs = 0
        self._closed = self._ending = self._ended = False
        self._at_exit = CloseAtExit(self)
        self._gradient_watch = GradientWatch(target, self._held, {each.name: each.model for each in players.each})
        self._reserved = players.reserved(_RESERVED.union(EXTRA_SERIES[name] for name in extras))
        self._in_graphs = InGraphs(self, players, gradient, in_backward)
        self._weights = WeightWatch(players, weights_every, in_backward)
        self._connect(InMemoryRun(), NoSinks(), None, None)  # until the run is open
        try:  # the other ranks have come, and must not wait for one that fails alone
            self._log = DeviceLog(
                self._plan,
                every,
                self._team.take,
                seconds=seconds,
                optimizer=players.all.optimizer,
                rates=players.name_rates,
                reserved=self._reserved,
                slots=MAX_SCALARS if self._team.talks else FIRST_SLOTS,  # to make more is a drain, perhaps of one rank
                extras=bool(extras),
            )
            self._append = self._append_and_poll if self._team.talks else self._log.append
            self._lanes = Lanes(players, self._log, gradient, grad_scaler, process_group, each_closure, in_backward)
            self._lane = self._lanes.all  # of the latest step
            self._begin(run, diagnosis, on_finding, sinks, meta)
        except BaseException as error:
            self._fail(in_words(error))
            raise
        if close_on_signal:
            exit_on_signals(self._at_exit, self._run)

    def _connect(self, run: Any, sinks: NoSinks, diagnosis: Diagnosis | None, on_finding: Any) -> None:
        self._run, self._sinks = run, sinks
        self._judge = LiveDiagnosis(diagnosis, run, on_finding, sinks.finding)
        whose_steps = WhoseSteps(self._players, self._team.infos, self._extras)
        self._delivery = Delivery(run, sinks, self._gradient_watch, whose_steps, self._weights.until)
        self._late = LateMetrics(run, sinks, self._reserved)

    def _begin(self, run: Any, diagnosis: Any, on_finding: Any, sinks: Any, meta: Any) -> None:
        """Open the run and the sinks, which only the first rank does, and say what is recorded."""
        diagnosis = Diagnosis() if isinstance(diagnosis, str) else diagnosis
        if self._team.is_first:
            self._connect(opened(run), mirrors_of(sinks, is_first=True), diagnosis, on_finding)
            self._at_exit.close_before(self._run)
        self._run.set_parameters(self._team.infos)
        facts = facts_for_rules(self._players.facts(), self._held, self._team.infos, diagnosis, self.history.meta)
        self._run.set_meta(**{**facts, **(meta or {}), "every": self.every})
        self._sinks.begin(self._run)
        self._measure_weights()
        self._judge.evaluate(self.history)  # of nothing yet: prepares what it knows of the parameters

    @property
    def steps(self) -> int:
        """Steps recorded so far; the next one gets this number."""
        return self._steps

    @property
    def every(self) -> int:
        """Steps from one copy to the host to the next. Setting it delivers what is pending, and waits for that."""
        return self._log.every

    @every.setter
    def every(self, every: int) -> None:
        if self._team.talks:
            raise InvalidValueError("every cannot change while the rows of several ranks are merged or compared")
        self._log.every = every

    @graphed("step")
    def step(
        self,
        *unnamed: Any,
        only: str | None = None,
        n: float = 1,
        when: bool = True,
        gradients: Sequence[torch.Tensor | None] | None = None,
        clip: float | str | ClipRule | None = None,
        **scalars: Any,
    ) -> None:
        """Record the gradients as they are, and the scalars beside them. Never waits.

        Args:
            unnamed: an error, which says how values are given.
            only: the player whose step it is, by name: its gradients alone are read, and all that is recorded goes by
                its name (``D/loss``, ``D/grad_norm``); None: a step of all together, of which each has its share.
            n: how many samples the step stands for: the weight of its scalars in the means that ``epoch`` returns.
            when: whether the gradients are those of a step; False for a micro-batch that more are added to. Nothing is
                read then, and the scalars are kept: the step's are the means over its micro-batches, weighted by n.
            gradients: what to read in the place of ``.grad``, as ``torch.autograd.grad`` returns them: one for each
                parameter, in their order, or None. A clip scales these.
            clip: bring the total norm down to this number, or by a rule: ``ZClip()``, ``AutoClip()``, ``AGC()``, or
                their names in small letters. Recorded is the norm before, and the factor as ``clip_factor``. A fused
                optimizer takes the factor by itself, and skips a step that is not finite (``step_skipped`` is 1);
                for any other the gradients are scaled. See :doc:`control`.
            scalars: by name a number, or a tensor of one element of any dtype, on a device of the model or the CPU;
                None is left out. ``grad_scale`` is not recorded: it divides the gradients' statistics (the scale of a
                GradScaler, before ``unscale_``). It is finite and above 0; on a device that is not checked.

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a scalar is nothing that can be recorded, or has the name of a metric
                of ``log`` or ``epoch``; or there is no such player. Nothing of the step is recorded.
            ParameterError: a gradient cannot be read; or each ``every`` steps, and in flush and epoch, the model
                has got other parameters.
        """
        by_name("tracker.step", unnamed, "loss=loss, n=len(x)")
        with self._lock:  # several threads may step one tracker
            self._check_open()
            lane = self._lanes.of(only)
            asked = None if clip is None else lane.ask(clip)
            if lane.closures.are_recorded:
                return
            self._weights.end()
            if not flag("when", when):
                lane.micro_batches.add(scalars, n)
                return
            step, self._steps = self._steps, self._steps + 1  # even if it cannot be recorded: the step is missing then
            self._lane = lane
            lane.closures.record()
            scalars, n = lane.micro_batches.take(scalars, n)
            self._delivery.expect(step, n, lane.player)
            self._gradient_watch.look(step, lane.player)
            self._sinks.stamp(step)
            if self._origins is not None:
                self._origins.step(step)
            try:
                lane.steering.step(self._append, step, lane.named(scalars), asked, gradients)
                self._weights.begin(step, lane.player)
            except InvalidTypeError:
                explain_scalars(scalars)
                raise
            if self._steps % self._log.every == 0:  # at the same step on every rank
                for watch in self._watches:
                    watch.check(closed=False)

    @graphed("clip")
    def clip(
        self,
        max_norm: float | str | ClipRule,
        norm_type: float | str = 2.0,
        *,
        gradients: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Clip the gradients by the norm that the latest ``step`` has measured, as ``step(clip=...)`` would have.

        Args:
            max_norm: the largest total norm, or a rule.
            norm_type: of a number: 2.0 or inf, or any other order that torch takes, which costs a second read.
            gradients: those that the step was given.

        Returns:
            The total norm before, 0-d, on the device, as ``torch.nn.utils.clip_grad_norm_`` returns it, in float32 at
            least; divided by ``grad_scale`` where the step was given one.

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a number is none, or no step was recorded yet.
            LayoutError: the gradients cannot be scaled.
        """
        with self._lock:
            self._check_open()
            if self._steps == 0:
                raise InvalidValueError("clip() goes by the norm of the latest step, and there was none: call step()")
            asked = self._lane.ask(max_norm, norm_type, "max_norm")
            return self._lane.steering.clip(asked, self._record_decision, gradients)

    def _record_decision(self, results: dict[str, float]) -> None:
        """Record what was decided on the latest step, whose row has left. Waits: the rows before it come first."""
        if not self._team.talks:  # rows that ranks merge arrive when they will
            self._log.flush()
            self._late.record(self._steps - 1, self._lane.named(results))

    def replayed(self, n: float = 1, only: str | None = None) -> None:
        """Say that a CUDA graph in which ``step`` was captured, with the same ``only``, was replayed once. Never waits.

        Call it after each replay: of one that is not announced nothing is recorded, and a warning says so. The current
        stream then waits, on the device, for the replay's kernel. Numbers among the scalars are those of the capture,
        tensors are read again. It is an InvalidValueError, and nothing is recorded, where no step was captured.
        """
        with self._lock:
            self._check_open()
            self._log.check_captured()
            lane, n = self._lanes.of(only), number_of_samples("n", n)
            step, self._steps = self._steps, self._steps + 1
            self._lane = lane
            self._delivery.expect(step, n, lane.player)
            self._sinks.stamp(step)
            self._log.replayed(step)
            self._follow(step)

    def log(self, *unnamed: Any, **metrics: Any) -> None:
        """Record metrics at the latest step, in the middle of an epoch or at its end. Waits for values on a device.

        Args:
            unnamed: an error, which says how values are given.
            metrics: by name a number or a tensor of one element: validation loss, accuracy, ... ``epoch`` may have the
                same names, and ``step`` none of them. None is left out.

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a metric is nothing that can be recorded. No metric is.

        Example:
            >>> with Tracker([], diagnosis=None) as tracker:
            ...     tracker.step(loss=1.0)
            ...     tracker.log(val_loss=0.5)
            >>> tracker.history["val_loss"][:]
            [0.5]
        """
        by_name("tracker.log", unnamed, "val_loss=0.5")
        with self._lock:
            self._check_open()
            self._late.record(max(self._steps - 1, 0), self._late.checked(metrics, self._log.names))

    def epoch(self, *unnamed: Any, **metrics: Any) -> dict[str, float]:
        """End an epoch: record its metrics at the latest step, and return the means of its steps' scalars. Waits.

        Args:
            unnamed: an error, which says how values are given.
            metrics: by name a number or a tensor of one element: validation loss, accuracy, ...

        Returns:
            The mean of each scalar over the steps of the epoch, weighted by ``n``, and the metrics given.

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a metric is nothing that can be recorded. No metric is.
        """
        by_name("tracker.epoch", unnamed, "val_loss=0.5")
        with self._lock:
            self._check_open()
            values = self._late.checked(metrics, self._log.names)
            self._epochs += 1
            self.flush()
            self._measure_weights()
            self._late.record(max(self._steps - 1, 0), {**values, "epoch": float(self._epochs)})
            self._judge.evaluate_again(self.history)
            return {**self._delivery.means.take(), **values}

    def state_dict(self) -> dict[str, Any]:
        """Bring home what has been recorded, and return the number of steps and epochs. Waits for device and disk.

        A checkpoint that holds it goes on without a gap, whatever ends the program later. Ranks that merge their rows
        do not wait here; let all of them call ``flush`` before.
        """
        with self._lock:
            if not (self._closed or self._team.talks):
                self.flush()
            if not self._closed:
                with contextlib.suppress(StoreError):  # the run warns of it, and tries again
                    self._run.flush()
            counts = {"steps": self._steps, "epochs": self._epochs, "scalars": self._log.names}
            return {**counts, **self._lanes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: what has been recorded after it is taken out of the run. Waits for the disk.

        Raises:
            InvalidTypeError, InvalidValueError: ``state`` is not from ``state_dict``.
        """
        steps, epochs, scalars = checked_state(state)
        with self._lock:
            self.flush()
            if self.history.last_step >= steps:
                self._run.truncate(steps)
            self._sinks.truncate(steps)
            self._steps, self._epochs = steps, epochs
            self._late.leave_to_steps(scalars)
            self._delivery.restart(steps)
            self._weights.restart()
            self._lanes.load_state_dict(state)

    def _append_and_poll(self, step: int, scalars: dict[str, Any], clip: Any = None, *, hold: bool = False) -> None:
        """Append, where ranks meet at a drain: also what they measured; and hand on what has been merged meanwhile."""
        self._log.append(step, {**scalars, **self._team.scalars()}, clip, hold=hold)
        self._follow(step)

    def _follow(self, step: int) -> None:
        if self._team.is_due(step):
            self._log.drain_soon()
        self._team.poll()

    def _receive(self, rows: Rows) -> None:
        """Hand rows of the whole model to everyone who wants them, and then let the rules see them."""
        self._delivery.put(rows)
        self._judge.evaluate(self.history)
        if self._origins is not None and not self._closed:
            self._origins.see(self.history)

    def _regroup(self) -> None:
        """Note in which group of its optimizer each parameter is; ranks that merge keep what they agreed on."""
        if not self._team.talks:
            self._run.set_parameters(self._players.infos())

    def _measure_weights(self) -> None:
        """Measure the norms of the parameters themselves, for the update-to-weight ratio. Waits for the device."""
        moments = self._team.merge_weights(max(self._steps - 1, 0), self._weights.moments())
        self._delivery.weigh(moments)
