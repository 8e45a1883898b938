"""clip_grad_norm_ beside torch's own, and against exact norms."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pytracker
from pytracker.errors import InvalidValueError


def two_of(*gradients: torch.Tensor | None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the same parameters and gradients twice, for two functions that change them."""
    both: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for gradient in gradients:
        for parameters in both:
            parameter = nn.Parameter(torch.zeros(3) if gradient is None else torch.zeros_like(gradient))
            parameter.grad = None if gradient is None else gradient.clone()
            parameters.append(parameter)
    return both


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    max_norm=st.sampled_from([1e-3, 0.5, 1.0, 3.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_clipped_as_torch_clips_them(sizes, dtype, max_norm: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    ours, torchs = two_of(*gradients, None)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    got = pytracker.clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(torchs, max_norm)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(ours[:-1], torchs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=1e-12)
    assert ours[-1].grad is None


def test_where_no_clip_is_due_the_memory_of_the_gradients_is_not_written() -> None:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)  # writing here would end the process
    parameter = nn.Parameter(torch.zeros(1024))
    with pytest.warns(UserWarning, match="not writable"):
        parameter.grad = torch.from_numpy(np.frombuffer(page, np.float32))
    assert pytracker.clip_grad_norm_([parameter], 1.0).item() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_to_the_gradients_what_torch_does(value: float) -> None:
    ours, torchs = two_of(torch.tensor([1.0, value, -2.0]))
    assert pytracker.clip_grad_norm_(ours, 1.0).item() == pytest.approx(value, nan_ok=True)
    nn.utils.clip_grad_norm_(torchs, 1.0)
    assert torch.equal(ours[0].grad.isnan(), torchs[0].grad.isnan())


def test_error_if_nonfinite_raises_and_leaves_the_gradients() -> None:
    ours, _ = two_of(torch.tensor([3.0, math.inf]))
    with pytest.raises(RuntimeError, match="total norm of the gradients of 1 parameters is inf"):
        pytracker.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert ours[0].grad.tolist() == [3.0, math.inf]


@pytest.mark.parametrize("norm_type", [1.0, 3, math.inf, "inf"])
def test_other_norms_are_those_of_torch(norm_type) -> None:
    ours, torchs = two_of(torch.tensor([3.0, -4.0]), torch.tensor([1.0]))
    got = pytracker.clip_grad_norm_(ours, 0.5, norm_type=norm_type)
    assert got == nn.utils.clip_grad_norm_(torchs, 0.5, norm_type=norm_type)
    assert torch.equal(ours[0].grad, torchs[0].grad)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.complex64,),
        (torch.complex64, torch.float64),
    ],
    ids=str,
)
def test_the_norm_has_the_dtype_that_torch_gives_it(dtypes) -> None:
    ours, torchs = two_of(*(torch.ones(3, dtype=dtype) for dtype in dtypes))
    assert pytracker.clip_grad_norm_(ours, 9.0).dtype == nn.utils.clip_grad_norm_(torchs, 9.0).dtype


def test_every_kind_of_parameters_that_torch_takes_is_taken() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    for parameters in (model.parameters(), list(model.parameters()), model, model.named_parameters()):
        assert pytracker.clip_grad_norm_(parameters, 1e9).item() == pytest.approx(norm, rel=1e-6)
    assert pytracker.clip_grad_norm_(model.bias, 1e9).item() == pytest.approx(math.sqrt(2))


def test_without_gradients_the_norm_is_zero() -> None:
    assert pytracker.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0).item() == 0.0


def test_a_max_norm_of_zero_clips_everything() -> None:
    ours, _ = two_of(torch.tensor([3.0, -4.0]))
    assert pytracker.clip_grad_norm_(ours, 0).item() == 5.0
    assert ours[0].grad.tolist() == [0.0, -0.0]


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_max_norm_that_cannot_be_is_refused(max_norm: float) -> None:
    with pytest.raises(InvalidValueError, match="max_norm is"):
        pytracker.clip_grad_norm_([nn.Parameter(torch.zeros(1))], max_norm)
