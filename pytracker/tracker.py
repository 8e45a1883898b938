"""The tracker: ties a model, an optimizer, the device log, a run, the detectors and the sinks together.

One step, from top to bottom::

    Tracker.step                 counts, and hands the scalars on
      DeviceLog.append           one call into C++: takes the .grad pointers, one launch writes a row on the device
        every `every` rows: one asynchronous copy to the host
      Tracker._receive           some steps later: exact rows of single steps
        History, Run (disk), sinks, Diagnosis
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from ._atexit import CloseAtExit
from ._checks import number_of_samples, real_number, whole_number
from .columns import MAX_SCALARS, SUM_SQ
from .core import FIRST_SLOTS, DeviceLog, Rows, Target, plan_for, watchable
from .diagnostics import Diagnosis, Finding
from .distributed import NOISE_SERIES, team_of
from .errors import ClosedError, InvalidTypeError, InvalidValueError, in_words
from .history import History, summarize
from .sinks import SinkLike, mirrors_of
from .tracking import (
    EpochMeans,
    InMemoryRun,
    LiveDiagnosis,
    ModelWatch,
    check_arguments,
    check_by_name,
    explain_scalars,
    facts_for_rules,
    gradient_series,
    opened,
    parameter_infos,
    warn_of_strangers,
    warned_of_no_gradients,
    weight_moments,
)

if TYPE_CHECKING:
    from .distributed import GradientNoiseScale
    from .store import Run

GRADIENT_SERIES = ("grad_norm", "grad_max", "grad_abs_max", "grad_nonfinite", "grad_zero_fraction")
"""What is recorded of the gradients on every step, besides the scalars given and the learning rates."""

_RESERVED = frozenset({*GRADIENT_SERIES, *NOISE_SERIES, "epoch", "step"})


class Tracker:
    """Records every gradient statistic of every step, without making the training wait.

    Call ``step`` after ``backward`` and before the gradients are cleared::

        with pytracker.Tracker(model, optimizer=optimizer) as tracker:
            for x, y in loader:
                loss = loss_function(model(x), y)
                loss.backward()
                tracker.step(loss=loss, n=len(x))
                optimizer.step()
                optimizer.zero_grad()

    A tracker that nobody closes is closed at the end of the program, as by ``close``.

    Args:
        model: a module, an iterable of parameters, or of (name, parameter) pairs.
        optimizer: its learning rates are recorded on every step: ``lr``, or ``lr/NAME`` for each of several groups (its
            ``name``, or else its index).
        run: where to keep the training on disk: a ``Run``, or a directory in which to start one; in memory only
            (``tracker.history``) without it. Of several ranks only the first writes.
        every: steps from one copy to the host to the next. Findings come, and the disk is written, as often.
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
        rank_timeout: seconds to wait for a rank that does not come to ``flush``, ``epoch`` or ``close``.

    Raises:
        InvalidTypeError: an argument is of the wrong type.
        InvalidValueError: ``every`` is less than 1, or ``rank_timeout`` not above 0.
        ParameterError: two parameters have the same name, or one has no data.
        LayoutError: it cannot be told which piece of a parameter this rank holds; the message says what to give.
        RankMismatchError: the ranks have different intervals or models, or one does not come.

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
        model: Target,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        run: Run | str | Path | None = None,
        every: int = 50,
        diagnosis: Diagnosis | str | None = "default",
        on_finding: Callable[[Finding], None] | None = None,
        sinks: Sequence[SinkLike] = (),
        meta: dict[str, Any] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        check_replicas: bool = False,
        noise_scale: GradientNoiseScale | None = None,
        rank_timeout: float = 300.0,
    ) -> None:
        """Plan the reduction and allocate the device log; this may wait for the device and for the other ranks."""
        check_arguments(optimizer, diagnosis, on_finding, sinks, meta, process_group, rank_timeout)
        tracked = plan_for(watchable(model))
        warn_of_strangers(tracked.parameters, optimizer)
        self._held, self._plan = tracked.parameters, tracked.plan
        self._watch = ModelWatch(None if tracked.rewritten else model, self._held)
        every = whole_number("every", every, low=1)
        infos = parameter_infos(self._held, optimizer)
        self._team = team_of(
            tracked,
            infos,
            every=every,
            group=process_group,
            check_replicas=check_replicas,
            noise_scale=noise_scale,
            timeout=rank_timeout,
        )
        self._closed = True  # until it is made
        self._run: Any = InMemoryRun()
        self._sinks = mirrors_of((), is_first=False)
        try:  # the other ranks have come, and must not wait for one that fails alone
            first = self._team.is_first
            slots = MAX_SCALARS if self._team.talks else FIRST_SLOTS  # to make more is a drain, perhaps of one rank
            self._log = DeviceLog(self._plan, every, self._take, optimizer=optimizer, reserved=_RESERVED, slots=slots)
            self._append = self._append_and_poll if self._team.polls else self._log.append
            self._run = opened(run) if first else InMemoryRun()
            diagnosis = Diagnosis() if isinstance(diagnosis, str) else diagnosis
            self._sinks = mirrors_of(sinks, is_first=first)
            tell = on_finding if first else None
            self._judge = LiveDiagnosis(diagnosis if first else None, self._run, tell, self._sinks.finding)
            self._steps = self._epochs = 0
            self._warned = False
            self._means = EpochMeans()
            self._numel = np.array([info.numel for info in self._team.infos], np.float64)
            self._run.set_parameters(self._team.infos)
            facts = facts_for_rules(optimizer, diagnosis, self.history.meta)
            self._run.set_meta(**{**facts, **(meta or {}), "every": every})
            self._sinks.begin(self._run)
            self._measure_weights()
            self._judge.look(self.history)  # of nothing yet: prepares what it knows of the parameters
        except BaseException as error:
            self._team.leave(self._receive)
            self._sinks.close(in_words(error))
            self._run.finish("failed", error=in_words(error))
            raise
        self._closed = False
        self._at_exit = CloseAtExit(self, self._run)

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

    @property
    def history(self) -> History:
        """What has arrived so far; ``flush`` brings the rest. Never waits."""
        history: History = self._run.history
        return history

    @property
    def findings(self) -> list[Finding]:
        """The findings so far, the most severe first."""
        return self._judge.findings

    @property
    def waits(self) -> int:
        """How often the host had to wait because the device was more than ``every`` steps behind."""
        return self._log.waits

    def step(self, *unnamed: Any, n: float = 1, **scalars: Any) -> None:
        """Record the gradients as they are, and the scalars beside them. Never waits.

        Args:
            unnamed: an error, which says how values are given.
            n: how many samples the step stands for: the weight of its scalars in the means that ``epoch`` returns.
            scalars: by name a number, or a tensor of one element of any dtype, on a device of the model or the CPU;
                None is left out. ``grad_scale`` is not recorded: it divides the gradients' statistics (the scale of a
                GradScaler, before ``unscale_``).

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a scalar is nothing that can be recorded. Nothing of the step is.
            ParameterError: a gradient cannot be read; or each ``every`` steps, and in flush and epoch, the model
                has got other parameters.
        """
        self._check_open()
        check_by_name(unnamed)
        step, self._steps = self._steps, self._steps + 1  # also where nothing can be recorded: the step is missing
        self._means.weigh(step, number_of_samples("n", n))
        self._sinks.stamp(step)
        try:
            self._append(step, scalars)
        except InvalidTypeError:
            explain_scalars(scalars)
            raise
        if self._steps % self._log.every == 0:  # at the same step on every rank
            self._watch.check(closed=False)

    def replayed(self, n: float = 1) -> None:
        """Say that a CUDA graph in which ``step`` was captured has been replayed once. Never waits.

        The replay has written the row; numbers among the scalars are those of the capture, tensors are read anew. It is
        an InvalidValueError, and nothing is recorded, where no step was captured.
        """
        self._check_open()
        self._log.check_captured()
        step, self._steps = self._steps, self._steps + 1
        self._means.weigh(step, number_of_samples("n", n))
        self._sinks.stamp(step)
        self._log.replayed(step)
        self._team.poll(self._receive)

    def epoch(self, **metrics: Any) -> dict[str, float]:
        """End an epoch: record its metrics at the latest step, and return the means of its steps' scalars. Waits.

        Args:
            metrics: by name a number or a tensor of one element: validation loss, accuracy, ...

        Returns:
            The mean of each scalar over the steps of the epoch, weighted by ``n``, and the metrics given.

        Raises:
            ClosedError: the tracker is closed.
            InvalidTypeError, InvalidValueError: a metric is nothing that can be recorded. No metric is.
        """
        self._check_open()
        values = {name: real_number(repr(name), value) for name, value in metrics.items() if value is not None}
        for name in values:
            if name in _RESERVED or name in self._log.names:
                raise InvalidValueError(f"{name!r} is recorded on each step already; give the epoch's another name")
        self._epochs += 1
        self.flush()
        self._measure_weights()
        at, late = max(self._steps - 1, 0), {**values, "epoch": float(self._epochs)}
        self._run.log_many(np.array([at], np.int64), {name: np.array([value]) for name, value in late.items()})
        self._sinks.late(at, late)
        self._judge.look(self.history, again=True)
        return {**self._means.take(), **values}

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the tracker is closed; make a new one to go on recording")

    def flush(self) -> None:
        """Bring everything recorded so far to the history and the run. Waits for the device."""
        self._team.meet(self._steps, self._receive)
        self._log.flush()
        self._add(self._team.finish(self._receive))
        self._judge.look(self.history, now=True)
        self._sinks.flush()
        self._watch.check(closed=self._closed)

    def close(self, *, error: str | None = None) -> None:
        """Bring home what is pending, and finish the run. Waits for the device. More than once is fine.

        Args:
            error: the run is marked as failed, with this text, and no other rank is waited for: as also where the ranks
                have lost each other before.

        Raises:
            RankMismatchError: the ranks disagree, or one is missing; what needs no other rank is recorded.
        """
        if self._closed:
            return
        self._closed = True
        self._at_exit.forget()
        error = error or (in_words(self._team.fault) if self._team.fault else None)
        try:
            self.flush() if error is None else self._flush_alone()
        except BaseException as problem:  # ^C too, while other ranks are waited for
            error = error or in_words(problem)
            with contextlib.suppress(Exception):  # the first says more
                self._flush_alone()
            raise
        finally:
            if error is None:
                self._team.close()
            self._sinks.close(error)
            self._run.finish("finished" if error is None else "failed", error=error)

    def _flush_alone(self) -> None:
        """Bring home what needs no other rank: they may not know of the fault, so nobody is waited for."""
        self._team.leave(self._receive)
        self._log.flush()
        self._judge.look(self.history, now=True)

    def __del__(self) -> None:
        """Say what is lost with a tracker that was dropped; nothing can be brought home where garbage is collected."""
        is_open = not getattr(self, "_closed", True) and self._at_exit.is_ours
        if is_open and (lost := self._steps - 1 - self.history.last_step) > 0:
            warnings.warn(
                f"a tracker was dropped without close(), and with it the last {lost} of its {self._steps} steps; use "
                "`with pytracker.Tracker(...) as tracker`, or call tracker.close() at the end",
                RuntimeWarning,
                stacklevel=2,
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InvalidTypeError(
            "a Tracker cannot be pickled or copied, as it belongs to its model and to this process; save "
            "tracker.state_dict(), and keep the tracker out of what is copied"
        )

    def __enter__(self) -> Tracker:
        """Return the tracker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; where an exception leaves the block, it goes on its way with all rows safe."""
        if error is None:
            self.close()
            return
        try:
            self.close(error=in_words(error))
        except Exception as problem:
            warnings.warn(f"the last rows could not be brought home: {problem}", RuntimeWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on counting: the number of steps and epochs."""
        return {"steps": self._steps, "epochs": self._epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: what has been recorded after it is taken out of the run. Waits for the disk.

        Raises:
            InvalidValueError: ``state`` is not from ``state_dict``.
        """
        try:
            steps, epochs = int(state["steps"]), int(state["epochs"])
        except (KeyError, TypeError, ValueError):
            raise InvalidValueError(f"state is {state!r:.80}; expected what Tracker.state_dict() returned") from None
        self.flush()
        if self.history.last_step >= steps:
            self._run.truncate(steps)
        self._sinks.truncate(steps)
        self._steps, self._epochs = steps, epochs
        self._means = EpochMeans()

    def _append_and_poll(self, step: int, scalars: dict[str, Any]) -> None:
        """Append, where ranks meet at a drain: also what they measured; and hand on what has been merged meanwhile."""
        self._log.append(step, {**scalars, **self._team.scalars()})
        self._team.poll(self._receive)

    def _take(self, rows: Rows) -> None:
        """Take rows of this rank: all there is, or pieces to be merged with those of others."""
        self._add(self._team.take(rows, self._receive))

    def _receive(self, rows: Rows) -> None:
        """Hand rows that have arrived to everyone who wants them."""
        self._means.add(rows)
        complete = {name: values for name, (where, values) in rows.scalars.items() if len(where) == len(rows.steps)}
        gradients = gradient_series(rows, self._numel)
        self._run.log_many(rows.steps, {**gradients, **complete})
        for name, (where, values) in rows.scalars.items():
            if name not in complete:
                self._run.log_many(rows.steps[where], {name: values})
        everywhere = np.arange(len(rows.steps))
        series = {name: (everywhere, values) for name, values in gradients.items()}
        self._sinks.write(rows.steps, {**series, **rows.scalars}, rows.tensors)
        if len(self._numel):
            self._run.log_rows(rows.steps, rows.tensors)
            interval = summarize(rows.steps, rows.tensors, self._numel, self._weight_norms)
            self._run.log_interval(interval)
            self._sinks.parameters(interval)
        self._warned = self._warned or warned_of_no_gradients(rows)
        self._judge.look(self.history)

    def _add(self, findings: list[Finding]) -> None:
        for finding in findings:
            self._judge.add(finding)

    def _measure_weights(self) -> None:
        """Measure the norms of the parameters themselves, for the update-to-weight ratio. Waits for the device."""
        moments, found = self._team.merge_weights(max(self._steps - 1, 0), weight_moments(self._held))
        self._add(found)
        self._weight_norms = np.sqrt(moments[:, SUM_SQ])
