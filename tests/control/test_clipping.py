"""clip_grad_norm_ beside torch's own, and against exact norms."""

from __future__ import annotations

import math
import mmap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pytracker
from pytracker.errors import InvalidTypeError, InvalidValueError


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
    assert (got.dtype, got.shape) == (torch.promote_types(expected.dtype, torch.float32), expected.shape)
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(ours[:-1], torchs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=1e-12)
    assert ours[-1].grad is None


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_where_no_clip_is_due_the_memory_of_the_gradients_is_not_written() -> None:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)  # writing here would end the process
    parameter = nn.Parameter(torch.zeros(1024))
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
    with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 for gradients of 1 parameters is inf"):
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
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
        (torch.complex64,),
        (torch.complex64, torch.float64),
    ],
    ids=str,
)
def test_the_norm_has_the_dtype_that_torch_gives_it_or_float32(dtypes) -> None:
    ours, torchs = two_of(*(torch.ones(3, dtype=dtype) for dtype in dtypes))
    expected = torch.promote_types(nn.utils.clip_grad_norm_(torchs, 9.0).dtype, torch.float32)
    assert pytracker.clip_grad_norm_(ours, 9.0).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("norm_type", "expected"), [(2.0, 316_228.0), (1.0, 1e8), (1.5, 1e3 * 1e5 ** (2 / 3))])
def test_the_norm_of_halves_fits_and_they_are_clipped_by_it(dtype, norm_type: float, expected: float) -> None:
    ours, _ = two_of(torch.full((100_000,), 1000.0, dtype=dtype))
    got = pytracker.clip_grad_norm_(ours, expected / 2, norm_type=norm_type, error_if_nonfinite=True)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected, rel=1e-5 if norm_type == 2 else 1e-3)  # torch's own are no better
    assert ours[0].grad.dtype == dtype
    assert ours[0].grad.float().mean().item() == pytest.approx(500.0, rel=1e-3)


def test_a_norm_that_float32_cannot_hold_is_an_error_where_one_was_asked_for() -> None:
    ours, _ = two_of(torch.full((4,), 3e38))
    with pytest.raises(RuntimeError, match=r"is 6e\+38, returned in torch.float32: it is not finite"):
        pytracker.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert ours[0].grad[0] == 3e38
    pytracker.clip_grad_norm_(ours, 1.0)
    assert ours[0].grad.tolist() == pytest.approx([0.5] * 4)


def test_in_the_place_of_torchs_it_does_not_call_itself(monkeypatch) -> None:
    for module in (nn.utils, nn.utils.clip_grad):
        monkeypatch.setattr(module, "clip_grad_norm_", pytracker.clip_grad_norm_)
    for norm_type in (2.0, 1.0, math.inf):
        ours, _ = two_of(torch.tensor([3.0, -4.0]))
        nn.utils.clip_grad_norm_(ours, 1e-9, norm_type=norm_type)
        assert ours[0].grad.norm(norm_type).item() < 1e-9


def test_an_empty_generator_is_worth_a_warning_and_an_empty_list_is_not(recwarn) -> None:
    generator = nn.Linear(2, 2).parameters()
    list(generator)
    with pytest.warns(UserWarning, match="parameters is an empty generator") as caught:
        assert pytracker.clip_grad_norm_(generator, 1.0).item() == 0.0
    assert caught[0].filename == __file__
    assert pytracker.clip_grad_norm_([], 1.0).item() == 0.0
    assert len(recwarn) == 0


def test_the_device_that_new_tensors_get_changes_nothing() -> None:
    ours, torchs = two_of(torch.tensor([3.0, -4.0]))
    empty = nn.Parameter(torch.zeros(1))
    torch.set_default_device("meta")
    try:
        norms = [pytracker.clip_grad_norm_([empty], 1.0), pytracker.clip_grad_norm_(ours, 1.0)]
        norms.append(pytracker.clip_grad_norm_(torchs, 1.0, norm_type=1.0))
    finally:
        torch.set_default_device(None)
    assert [norm.item() for norm in norms] == [0.0, 5.0, 7.0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, "inf"])
@pytest.mark.parametrize(
    "parameters_of",
    [nn.Module.parameters, nn.Module.named_parameters, lambda model: model, lambda model: model[0].weight],
    ids=["parameters", "named_parameters", "module", "tensor"],
)
def test_a_compiled_step_clips_without_a_graph_break(backend: str, norm_type, parameters_of) -> None:
    def clip(model: nn.Module) -> torch.Tensor:
        return pytracker.clip_grad_norm_(parameters_of(model), 0.7, norm_type)

    torch._dynamo.reset()  # its limit of recompilations counts those of all cases together
    compiled = torch.compile(clip, backend=backend, fullgraph=True)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, dtype=torch.float64)) for _ in range(2)]
    for step in range(3):
        for model in models:
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = None if (index, step) == (1, 1) else torch.full_like(parameter, index + 0.5)
        got, expected = compiled(models[0]), clip(models[1])
        assert (got.dtype, got.item()) == (expected.dtype, pytest.approx(expected.item(), rel=1e-6))
        for ours, eager in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, eager.grad)


def test_a_compiled_clip_of_nothing_is_zero() -> None:
    compiled = torch.compile(pytracker.clip_grad_norm_, backend="eager", fullgraph=True)
    assert compiled([nn.Parameter(torch.zeros(1))], 1.0).item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"max_norm": "1"}, InvalidTypeError, "max_norm is '1', of type str"),
        ({"max_norm": None}, InvalidTypeError, "max_norm is None"),
        ({"max_norm": 1j}, InvalidTypeError, "max_norm is 1j"),
        ({"max_norm": 10**400}, InvalidValueError, "max_norm is 10+"),
        ({"norm_type": "two"}, InvalidTypeError, "norm_type is 'two', of type str; expected the order of a norm"),
        ({"norm_type": None}, InvalidTypeError, "norm_type is None"),
        ({"norm_type": math.nan}, InvalidValueError, "norm_type is nan"),
        ({"parameters": 3}, InvalidTypeError, "the target is 3, of type int"),
    ],
)
def test_an_argument_that_cannot_be_is_named(arguments, error, named: str) -> None:
    with pytest.raises(error, match=named):
        pytracker.clip_grad_norm_(**{"parameters": nn.Parameter(torch.zeros(1)), "max_norm": 1.0, **arguments})


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


def test_gradients_in_the_place_of_parameters_are_left_alone_and_that_is_told():
    weight = torch.nn.Parameter(torch.ones(3))
    gradients = torch.autograd.grad(weight.square().sum(), [weight])
    with pytest.warns(RuntimeWarning, match="nothing in .grad, so nothing is clipped"):
        assert pytracker.clip_grad_norm_(gradients, 1.0) == 0
    assert gradients[0].tolist() == [2.0, 2.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pytracker.clip_grad_norm_([weight], 1.0) == 0  # one without a gradient, as a layer that was not used
