"""Gradients on the device whose values are known on the host, and what their moments must be."""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from pytracker.columns import COLUMNS, TOTALS
from pytracker.core import native

try:
    import cudasim  # on the path under `python -m cudasim run`

    SIMULATED = cudasim.active()
except ImportError:
    SIMULATED = False

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
EXACT = {torch.float64, torch.complex64, torch.complex128}


def orders_of_atomics(ptx: str) -> set[str]:
    """Return the memory orders of the atomic operations in PTX."""
    return set(re.findall(r"^\s*atom\.\w+\.(\w+)\.", ptx, re.MULTILINE))


def moments(values: torch.Tensor) -> np.ndarray:
    """Return the six moments of a tensor on the CPU, in extended precision where that matters."""
    wide = torch.complex128 if values.is_complex() else torch.float64
    x = values.detach().to(wide).reshape(-1).resolve_neg().resolve_conj().numpy()
    size = np.abs(x)
    nan, inf = np.isnan(x), np.isinf(x)
    with np.errstate(invalid="ignore"):
        sum_sq = np.sum(x.real.astype(np.longdouble) ** 2) + np.sum(x.imag.astype(np.longdouble) ** 2)
        total = np.sum(x.real.astype(np.longdouble))
    largest = math.nan if nan.any() else size.max(initial=0)
    return np.array([total, sum_sq, largest, np.sum(x == 0), nan.sum(), inf.sum()], np.float64)


def parameter(like: torch.Tensor, device: str = "cuda") -> torch.nn.Parameter:
    """Return a parameter on the device with the shape and dtype of a tensor on the host, without a gradient."""
    return torch.nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=device))


def with_gradient(values: torch.Tensor, device: str = "cuda") -> torch.nn.Parameter:
    """Return a parameter whose gradient is a copy of `values`, which lie on the host."""
    result = parameter(values, device)
    result.grad = values.to(device)
    return result


def make_plan(parameters: list[torch.nn.Parameter]):
    return native.make_plan(parameters, [f"p{i}" for i in range(len(parameters))])


def reduce(plan, grad_scale: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the totals [7] and the moments [T, 6] of a plan for one device, on the host."""
    (row,) = plan.reduce(grad_scale)
    host = row.cpu().numpy()
    return host[:TOTALS], host[TOTALS:].reshape(-1, len(COLUMNS))


def assert_moments(got: np.ndarray, values: torch.Tensor, what: str = "") -> None:
    """Compare one tensor's moments with what they must be: norms within 1e-7, or 1e-14 for wide dtypes."""
    want = moments(values)
    tolerance = 1e-14 if values.dtype in EXACT else 1e-7
    magnitude = values.detach().to(torch.complex128 if values.is_complex() else torch.float64).abs().sum().item()
    # A sum may cancel, so its error is measured against the sum of magnitudes.
    room = 10 * tolerance * magnitude if math.isfinite(magnitude) else 0
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=room, err_msg=what)
    np.testing.assert_allclose(np.sqrt(got[1]), np.sqrt(want[1]), rtol=tolerance, err_msg=what)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-15, err_msg=what)
    np.testing.assert_array_equal(got[3:], want[3:], err_msg=what)
