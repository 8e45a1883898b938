"""What has arrived of a tracker's steps, how it flushes what is pending, and how it closes."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .._checks import no_copies, text
from .._warn import warn_user
from ..errors import ClosedError, in_words

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._atexit import CloseAtExit
    from ..core import DeviceLog
    from ..diagnostics import Finding
    from ..history import History
    from ..sinks import NoSinks
    from .delivery import Delivery
    from .lanes import Lanes
    from .live_diagnosis import LiveDiagnosis
    from .model_watch import ModelWatch
    from .origin_watch import OriginWatch
    from .weight_watch import WeightWatch


class Closing:
    """What a Tracker does at ``flush`` and ``close``; its base class, which the tracker fills."""

    _lock: threading.RLock
    _steps: int
    _closed: bool
    _ending: bool
    _ended: bool
    _at_exit: CloseAtExit
    _log: DeviceLog
    _team: Any
    _delivery: Delivery
    _judge: LiveDiagnosis
    _watches: list[ModelWatch]
    _sinks: NoSinks
    _run: Any
    _lanes: Lanes
    _origins: OriginWatch | None
    _weights: WeightWatch

    @property
    def history(self) -> History:
        """What has arrived so far; ``flush`` brings the rest. What ranks merge is on the first alone. Never waits."""
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

    @property
    def closed(self) -> bool:
        """Whether the tracker is closed, and takes no more steps."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the tracker is closed; make a new one to go on recording")

    def flush(self) -> None:
        """Bring everything recorded so far to the history and the run. Waits for the device."""
        with self._lock:
            self._team.meet(self._steps)
            self._log.flush()
            self._team.finish()
            self._delivery.finish()
            self._judge.evaluate_now(self.history)
            self._sinks.flush()
            for watch in self._watches:
                watch.check(closed=self._closed)

    def close(self, *, error: str | None = None) -> None:
        """Bring home what is pending, and finish the run. Waits for the device. More than once is fine.

        At interpreter exit it is called by itself.

        Args:
            error: the run is marked as failed, with this text, and no other rank is waited for: as also where the ranks
                have lost each other before.

        Raises:
            RankMismatchError: the ranks disagree, or one is missing, and ``on_rank_fault`` is "raise".
        """
        error = None if error is None else text("error", error)
        with self._lock:
            if self._ended or self._ending:  # the run that is finished below closes its tracker first
                return
            self._closed = self._ending = True
            try:
                self._end(error or self._team.error)
                if error is None:  # the training was not cut off
                    self._warn_of_micro_batches()
            except BaseException as problem:  # what is left of the end is done all the same
                if not self._ended:
                    with contextlib.suppress(Exception):  # the first says more
                        self._end(error or in_words(problem))
                raise
            finally:
                self._ending = False

    def _end(self, error: str | None) -> None:
        """Bring everything home and close what was opened. After an interruption it can be called again."""
        try:
            self.flush() if error is None else self._flush_alone(error)
        except BaseException as problem:  # ^C too, while other ranks are waited for
            error = error or in_words(problem)
            with contextlib.suppress(Exception):
                self._flush_alone(error)
            raise
        finally:
            if error is None:
                self._team.close()
            self._let_go()
            self._sinks.close(error)
            self._run.finish("finished" if error is None else "failed", error=error)
            self._at_exit.forget()
            self._ended = True

    def _fail(self, error: str) -> None:
        """Leave no other rank waiting, and nothing open, where the tracker cannot be made."""
        self._closed = self._ended = True
        self._let_go()
        self._at_exit.forget()
        self._team.leave(error)
        self._sinks.close(error)
        self._run.finish("failed", error=error)

    def _let_go(self) -> None:
        """Leave the optimizers and the model alone."""
        for lane in getattr(self, "_lanes", ()):
            lane.close()
        self._weights.close()
        if self._origins is not None:
            self._origins.close()

    def _warn_of_micro_batches(self) -> None:
        """Say what was given for a step that never came; last of all, since a warning may be made an error."""
        if count := sum(lane.micro_batches.count for lane in self._lanes):
            which = "the last micro-batch" if count == 1 else f"the last {count} micro-batches"
            warn_user(
                f"{which}, given with when=False, came to no step, and what was given there is not recorded; the last "
                "call for a step has when=True, also where the data end before the accumulation is full"
            )

    def _flush_alone(self, error: str) -> None:
        """Bring home what needs no other rank: they may not know of the fault, so nobody is waited for."""
        self._team.leave(error)
        self._log.flush()
        self._delivery.finish()
        self._judge.evaluate_now(self.history)

    def __del__(self) -> None:
        """Say what is lost with a tracker that was dropped; nothing can be brought home where garbage is collected."""
        is_open = not getattr(self, "_closed", True) and self._at_exit.is_ours
        if is_open and (lost := self._steps - 1 - self.history.last_step) > 0:
            warn_user(
                f"a tracker was dropped without close(), and with it the last {lost} of its {self._steps} steps; use "
                "`with pytracker.Tracker(...) as tracker`, or call tracker.close() at the end"
            )

    __reduce_ex__ = no_copies("a Tracker", "save tracker.state_dict(), and keep the tracker out of what is copied")

    def __enter__(self) -> Self:
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
            warn_user(f"the last rows could not be brought home: {problem}")
