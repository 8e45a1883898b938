"""Every way in which a gradient can lie in memory: its statistics, and that clipping changes it and not a copy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import pytracker
from pytracker.columns import COLUMNS

SEED = 5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(SEED))
    values.view(-1)[::7] = 0
    return values


def sparse(indices: list[list[int]], values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor(indices), values, shape, check_invariants=True)


def dimensions(count: int) -> torch.Tensor:
    """Return a view with gaps in every dimension, so that none can be folded into another."""
    return random(*[3] * count)[tuple([slice(0, 2)] * count)]


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "0-d": lambda: random(1)[0],
    "contiguous": lambda: random(6, 7),
    "transposed": lambda: random(6, 7).t(),
    "permuted": lambda: random(2, 3, 4, 5).permute(3, 1, 0, 2),
    "channels_last": lambda: random(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: random(2, 3, 4, 5, 2).contiguous(memory_format=torch.channels_last_3d),
    "offset": lambda: random(100)[3:91],
    "every third": lambda: random(100)[1::3],
    "a column": lambda: random(9, 5)[:, 2],
    "a block": lambda: random(9, 8, 7)[1:5, 2:7, 3:6],
    "eight dimensions with gaps": lambda: dimensions(8),
    "nine dimensions with gaps": lambda: dimensions(9),
    "twelve dimensions": lambda: random(*[2] * 12),
    "lazily negated": lambda: torch._neg_view(random(9)),
    "lazily negated with gaps": lambda: torch._neg_view(random(9, 4)[:, ::2]),
    "complex": lambda: random(9, dtype=torch.complex64),
    "lazily conjugated": lambda: random(9, dtype=torch.complex64).conj(),
    "conjugated and transposed": lambda: random(4, 5, dtype=torch.complex128).mH,
    "the real parts of a complex": lambda: random(9, dtype=torch.complex64).real,
    "the imaginary parts of a conjugate": lambda: random(9, dtype=torch.complex64).conj().imag,
    "sparse": lambda: sparse([[0, 2, 3], [1, 0, 4]], random(3), (4, 5)).coalesce(),
    "sparse with equal indices": lambda: sparse([[0, 2, 2, 2], [1, 0, 0, 4]], random(4), (4, 5)),
    "sparse rows": lambda: sparse([[0, 2, 2]], random(3, 5), (4, 5)),
    "sparse without a value": lambda: sparse([[], []], random(0), (4, 5)),
    "sparse complex": lambda: sparse([[1, 1]], random(2, dtype=torch.complex64), (3,)),
    "empty": lambda: random(0),
    "empty with dimensions": lambda: random(3, 0, 2),
}
EXPANDED: dict[str, Callable[[], torch.Tensor]] = {
    "a scalar expanded": lambda: torch.tensor(2.5).expand(3, 3),
    "expanded between others": lambda: random(4, 1, 5).expand(4, 6, 5),
    "expanded with gaps": lambda: random(4, 10)[:, ::2].unsqueeze(1).expand(4, 3, 5),
    "overlapping windows": lambda: random(20).as_strided((6, 5), (2, 1)),
}


def parameter_with(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    parameter.grad = gradient
    return parameter


def dense(gradient: torch.Tensor) -> np.ndarray:
    """Return the values as numpy's widest, in memory of their own."""
    values = gradient.to_dense() if gradient.is_sparse else gradient
    return values.resolve_conj().resolve_neg().to(torch.complex128 if values.is_complex() else torch.float64).numpy()


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *EXPANDED.values()], ids=[*LAYOUTS, *EXPANDED])
def test_every_layout_has_the_statistics_of_its_values(layout: Callable[[], torch.Tensor]) -> None:
    gradient = layout()
    values = dense(gradient)
    size = np.abs(values).ravel()
    norm = math.sqrt(math.fsum((size**2).tolist()))
    stats = pytracker.gradient_stats([("w", parameter_with(gradient))])
    elements = max(1, values.size)
    assert stats.norms.tolist() == pytest.approx([norm], rel=1e-14)
    assert stats.total_norm.item() == pytest.approx(norm, rel=1e-14)
    assert stats.abs_max.tolist() == pytest.approx([size.max(initial=0.0)], rel=1e-14)
    assert stats.means.tolist() == pytest.approx([math.fsum(values.real.ravel()) / elements], rel=1e-12, abs=1e-15)
    assert stats.rms.tolist() == pytest.approx([norm / math.sqrt(elements)], rel=1e-14)
    assert stats.zero_fraction.tolist() == [np.count_nonzero(size == 0) / elements]
    assert (stats.nans.tolist(), stats.infs.tolist()) == ([0], [0])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_clipping_changes_the_gradient_itself_in_every_layout(layout: Callable[[], torch.Tensor]) -> None:
    gradient = layout()
    before = dense(gradient).copy()
    parameter = parameter_with(gradient)
    norm = pytracker.clip_grad_norm_([parameter], 0.25).item()
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-6)
    assert parameter.grad is gradient
    factor = min(1.0, 0.25 / (np.linalg.norm(before) + 1e-6))
    np.testing.assert_allclose(dense(gradient), before * factor, rtol=1e-6)


def test_clipping_tells_autograd_that_the_gradient_has_changed() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    (gradient,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    penalty = gradient.square().sum()  # its backward needs the gradient as it is now
    weight.grad = gradient
    pytracker.clip_grad_norm_([weight], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_gradient_that_is_not_clipped_counts_as_unchanged() -> None:
    parameter = parameter_with(torch.ones(3))
    before = parameter.grad._version
    pytracker.clip_grad_norm_([parameter], 100.0)
    assert parameter.grad._version == before


def test_the_layouts_of_one_model_do_not_disturb_each_other() -> None:
    gradients = [layout() for layout in (*LAYOUTS.values(), *EXPANDED.values())]
    alone = [pytracker.gradient_stats([parameter_with(gradient)]).norms.item() for gradient in gradients]
    together = pytracker.gradient_stats([parameter_with(gradient) for gradient in gradients])
    assert together.norms.tolist() == alone
    assert together._tensors.shape == (len(gradients), len(COLUMNS))
