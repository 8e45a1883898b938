"""The gradient noise scale under DDP: from the norms of the gradient before and after it is averaged over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .._checks import finite_number, real_number, wrong_value
from ..collectives import SUM, Ranks
from ..columns import SUM_SQ
from ..core import Rows, native
from ..errors import InvalidTypeError, LayoutError
from ..history import ParameterInfo
from .row_merger import HEADER, PendingMerge, RowMerger, check_stamps, stamp

NOISE_SERIES = ("noise_scale", "grad_sq_estimate", "grad_variance_estimate")
_LOCAL, _MEAN = "_noise_scale/local", "_noise_scale/mean"

Hook: TypeAlias = Callable[[Any, Any], Any]
"""(state, GradBucket) -> Future[Tensor], as torch's own in ``ddp_comm_hooks``."""


class GradientNoiseScale:
    """Measures how much of the gradient is noise, and so how large a batch still pays off.

    Give it to the tracker, which records on every step::

        model = DistributedDataParallel(model)
        noise = pytracker.GradientNoiseScale(model, batch_size=32)
        with pytracker.Tracker(model, noise_scale=noise) as tracker: ...

    With ``|G_b|^2`` the squared norm of one rank's gradient, averaged over the ranks, b the samples behind it, and
    ``|G_B|^2``, B the same of the average of all (McCandlish et al., An Empirical Model of Large-Batch Training, 2018,
    arXiv 1812.06162, appendix A.1), these have no bias:

    * ``grad_sq_estimate = (B |G_B|^2 - b |G_b|^2) / (B - b)``, of the true gradient's squared norm,
    * ``grad_variance_estimate = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)``, of the trace of a sample's covariance.

    ``noise_scale`` is their ratio, in samples: batches much smaller than that are mostly noise, and larger ones bring
    little. Both are smoothed before they are divided, since the ratio of two noisy numbers is biased: exponential
    moving averages with the weight ``1 - decay`` of the newest step, divided by the weights so far. It is NaN where the
    smoothed ``grad_sq_estimate`` isn't above zero. Steps whose gradient isn't finite, or wasn't averaged, are left out.

    A step costs one reading of each bucket before, and one after DDP's own all-reduce: no wait, and no collective of
    its own. What the ranks measured travels once an interval, beside the training.

    Under ``no_sync`` the gradient of the last, synchronizing backward counts, with all that has been accumulated: b is
    then the samples of all of them. A scale common to all ranks (a GradScaler's, a sum instead of a mean over the
    accumulated batches) changes neither the ratio nor, as they are given in units of the recorded ``grad_norm``, the
    estimates.

    Args:
        model: wrapped in DDP, without a communication hook.
        batch_size: b, the samples behind one rank's gradient of one step.
        decay: of the moving averages; 0.99 averages over about the last 100 steps.
        hook: how the gradient is averaged, as for ``register_comm_hook`` with the process group as its state:
            ``bf16_compress_hook``, say. The default is DDP's own way.

    Raises:
        InvalidTypeError: ``model`` is not a ``DistributedDataParallel``.
        InvalidValueError: ``batch_size`` isn't above 0, or ``decay`` isn't in [0, 1).
        LayoutError: there is one rank only, or the model has a communication hook.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        batch_size: float,
        *,
        decay: float = 0.99,
        hook: Hook | None = None,
    ) -> None:
        """Register the hook."""
        if not isinstance(model, DistributedDataParallel):
            raise InvalidTypeError(
                f"model is a {type(model).__name__}; the noise scale is measured where DistributedDataParallel "
                "averages gradients: wrap the model in it, and give the wrapper"
            )
        samples = finite_number(
            "batch_size", batch_size, above=0, expected="the samples behind one rank's gradient, above 0"
        )
        if not 0 <= (kept := real_number("decay", decay)) < 1:
            raise wrong_value("decay", decay, "a number from 0 to below 1")
        self.group = model.process_group
        self.ranks = dist.get_world_size(self.group)
        if self.ranks == 1:
            raise LayoutError(
                "there is one rank only, whose gradient is the average; the noise scale needs two or more"
            )
        self.batch_size, self.decay = float(samples), kept
        self._hook = hook or _default_hook()
        self._squares = torch.zeros(0, device="cpu")
        self._fresh = False
        native.load()  # registers the operators
        try:
            model.register_comm_hook(None, lambda state, bucket: self._measure(bucket))
        except RuntimeError as error:
            raise LayoutError(f"the model has a communication hook already; give it here, as hook: {error}") from error

    def _measure(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket as the hook does, and measure it before and after."""
        index, before = bucket.index(), bucket.buffer()
        squares = self._room_for(index, before.device)
        squares[index, 0].copy_(torch.ops.pytracker.gradient_moments([before])[SUM_SQ])

        def after(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            averaged: Tensor = value[0] if isinstance(value, list) else value
            squares[index, 1].copy_(torch.ops.pytracker.gradient_moments([averaged])[SUM_SQ])
            return averaged

        self._fresh = True
        future: torch.futures.Future[Tensor] = self._hook(self.group, bucket).then(after)
        return future

    def _room_for(self, index: int, device: torch.device) -> Tensor:
        """Return the squares of all buckets, [>= index + 1, 2]; those of earlier steps are cleared."""
        if index >= len(self._squares) or self._squares.device != device:
            larger = torch.zeros(max(16, 2 * index), 2, dtype=torch.float64, device=device)
            larger[: len(self._squares)] = self._squares.to(device) if len(self._squares) else 0.0
            self._squares = larger
        if index == 0:
            self._squares.zero_()
        return self._squares

    def scalars(self) -> dict[str, Tensor]:
        """Return what this rank measured in the latest backward, float64 on the device; nothing if it is known."""
        if not self._fresh:
            return {}
        self._fresh = False
        local, mean = self._squares.sum(dim=0)
        return {_LOCAL: local, _MEAN: mean}


def _default_hook() -> Hook:
    # Not at the top: torch can be built without torch.distributed.
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hook: Hook = default_hooks.allreduce_hook
    return hook


class NoiseMerger(RowMerger):
    """Averages what the ranks measured, one collective an interval and level, and adds the noise scale to the rows."""

    def __init__(self, ranks: Ranks, infos: list[ParameterInfo], noise: GradientNoiseScale, *, every: int) -> None:
        super().__init__(ranks, ranks.members, infos, every)
        self._noise = noise
        self._smoothed = np.zeros(3)  # squared norm, variance, weights

    def scalars(self) -> dict[str, Any]:
        return self._noise.scalars()

    def pack(self, merge: PendingMerge) -> tuple[Any, list[Any]]:
        steps = merge.rows.steps
        squares = np.zeros(HEADER + max(self._every, len(steps)))
        squares[:HEADER] = stamp(steps, merge.dropped)
        squares[HEADER : HEADER + len(steps)] = self._of(merge.rows, _LOCAL)
        return squares, [(torch.from_numpy(squares), SUM)]

    def unpack(self, merge: PendingMerge) -> Rows:
        rows, ranks = merge.rows, len(self._members)
        whole = self.without_others(rows)
        if check_stamps(merge.packed[:HEADER], ranks, rows.steps, merge.drain):
            return whole
        mean = merge.packed[HEADER : HEADER + len(rows.steps)] / ranks
        averaged = self._of(rows, _MEAN)
        with np.errstate(invalid="ignore", divide="ignore"):
            units = np.where(averaged > 0, rows.totals[:, SUM_SQ] / averaged, 1.0)
        series = self._estimate(mean * units, averaged * units)
        known = np.flatnonzero(np.isfinite(averaged))
        noise = {name: (known, values[known]) for name, values in zip(NOISE_SERIES, series, strict=True)}
        return replace(rows, scalars={**whole.scalars, **noise})

    def without_others(self, rows: Rows) -> Rows:
        """Return the rows without a noise scale: DDP leaves every rank the whole gradient."""
        scalars = {name: values for name, values in rows.scalars.items() if name not in (_LOCAL, _MEAN)}
        return replace(rows, scalars=scalars)

    @staticmethod
    def _of(rows: Rows, name: str) -> NDArray[np.float64]:
        values = np.full(len(rows.steps), np.nan)
        if name in rows.scalars:
            where, known = rows.scalars[name]
            values[where] = known
        return values

    def _estimate(self, small: NDArray[np.float64], large: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the series of ``NOISE_SERIES``, float64 [3, n], of squared norms [n]."""
        b, ranks = self._noise.batch_size, self._noise.ranks
        squared = (ranks * large - small) / (ranks - 1)
        variance = (small - large) * b * ranks / (ranks - 1)
        smoothed = np.empty(len(small))
        for index, now in enumerate(np.stack([squared, variance, np.ones(len(small))], axis=1)):
            if np.isfinite(now).all():
                self._smoothed = self._noise.decay * self._smoothed + (1 - self._noise.decay) * now
            estimate, noise, _ = self._smoothed
            smoothed[index] = noise / estimate if estimate > 0 else np.nan
        return np.stack([smoothed, squared, variance])
