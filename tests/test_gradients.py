"""compute_gradient_stats and gradient_stats against float64 sums, for every kind of model."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pytracker
from pytracker.errors import InvalidTypeError, InvalidValueError, ParameterError


def oracle(parameters) -> dict[str, float]:
    """Return the two norms from float64 sums that math.fsum rounds once."""
    squares = []
    for parameter in parameters:
        if parameter.grad is not None:
            dense = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            values = np.abs(dense.detach().to(torch.complex128 if dense.is_complex() else torch.float64).numpy())
            squares.append(math.fsum((values.astype(np.longdouble).ravel() ** 2).tolist()))
    return {"grad_norm": math.sqrt(math.fsum(squares)), "grad_max": math.sqrt(max(squares, default=0.0))}


def assert_as_the_loop(model) -> None:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else list(model)
    stats = pytracker.compute_gradient_stats(model)
    assert list(stats) == ["grad_norm", "grad_max"]
    assert all(type(value) is float for value in stats.values())
    assert stats == pytest.approx(oracle(parameters), rel=1e-6)


def with_gradients(*gradients: torch.Tensor | None) -> nn.ParameterList:
    parameters = []
    for gradient in gradients:
        like = torch.zeros(3) if gradient is None else gradient
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
        parameter.grad = gradient
        parameters.append(parameter)
    return nn.ParameterList(parameters)


def gapped(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3)[..., 1]


CASES = {
    "no parameters": lambda: nn.ReLU(),
    "no gradients": lambda: nn.Linear(3, 4),
    "some gradients missing": lambda: with_gradients(torch.randn(4), None, torch.randn(2, 2), None),
    "empty tensors": lambda: with_gradients(torch.empty(0), torch.empty(3, 0, 2), torch.randn(5)),
    "0-d": lambda: with_gradients(torch.tensor(-3.0), torch.tensor(4.0)),
    "non-contiguous": lambda: with_gradients(gapped(7, 5), torch.randn(6, 4).t()),
    "channels_last": lambda: with_gradients(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)),
    "expanded": lambda: with_gradients(torch.randn(1, 5).expand(7, 5), torch.tensor(2.0).expand(3, 3)),
    "offset views": lambda: with_gradients(torch.randn(100)[7:61], torch.randn(33, dtype=torch.bfloat16)[1:]),
    "ten dimensions with gaps": lambda: with_gradients(torch.randn([3] * 10)[tuple([slice(0, 2)] * 10)]),
    "mixed dtypes": lambda: with_gradients(
        *(torch.randn(50).to(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        torch.randn(50, dtype=torch.complex64),
        torch.randn(50, dtype=torch.complex128),
    ),
    "tiny values": lambda: with_gradients(torch.full((1000,), 1e-40), torch.full((3,), 1e-38)),
    "huge values": lambda: with_gradients(torch.full((1000,), 1e38), torch.full((3,), -3e38)),
    "all scales": lambda: with_gradients(*(torch.randn(100) * 10.0**k for k in range(-38, 38, 4))),
    "lazily negated": lambda: with_gradients(torch._neg_view(torch.randn(9))),
    "lazily conjugated": lambda: with_gradients(torch.randn(9, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
def test_the_drop_in_gives_the_norms_of_the_original_loop(model) -> None:
    assert_as_the_loop(model())


def test_frozen_parameters_contribute_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    model(torch.ones(2, 4)).sum().backward()
    assert_as_the_loop(model)
    assert math.isnan(pytracker.gradient_stats(model).norms[0])


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model(torch.ones(2, 4)).sum().backward()
    assert_as_the_loop(model)
    assert pytracker.gradient_stats(model).names == ["0.weight"]


@pytest.mark.parametrize("mode", ["sum", "coalesced"])
def test_a_sparse_embedding_has_the_norm_of_its_dense_gradient(mode: str) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 3, 3, 3, 9])).pow(2).sum().backward()
    if mode == "coalesced":
        embedding.weight.grad = embedding.weight.grad.coalesce()
    assert_as_the_loop(embedding)
    assert pytracker.gradient_stats(embedding).zero_fraction.item() == pytest.approx(28 / 40)


@pytest.mark.parametrize(("value", "expected"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_what_is_not_finite_reaches_the_norm(value: float, expected: float) -> None:
    gradient = torch.randn(5000)
    gradient[4321] = value
    stats = pytracker.compute_gradient_stats(with_gradients(torch.randn(10), gradient))
    assert stats == pytest.approx({"grad_norm": expected, "grad_max": expected}, nan_ok=True)


def test_the_cpu_norm_of_torch_loses_a_percent_at_1e8_elements_and_ours_does_not() -> None:
    gradient = torch.full((100_000_000,), 0.01)
    exact = float(np.float32(0.01)) * 1e4
    parameter = nn.Parameter(torch.empty(0))
    parameter.data = gradient  # the values do not matter: sharing them saves 400 MB
    parameter.grad = gradient
    ours = pytracker.compute_gradient_stats([parameter])["grad_norm"]
    assert abs(gradient.norm(2).item() / exact - 1) > 1e-3
    assert abs(ours / exact - 1) < 1e-7


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scale=st.floats(-18, 18),
    seed=st.integers(0, 2**31),
)
def test_any_model_has_the_norms_of_the_oracle(sizes: list[int], dtype: torch.dtype, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = 10 ** (scale / 6 if dtype == torch.float16 else scale)
    gradients = [(torch.randn(size, generator=generator, dtype=torch.float64) * factor).to(dtype) for size in sizes]
    assert_as_the_loop(with_gradients(*gradients))


def test_each_property_of_the_stats_is_that_of_the_gradient() -> None:
    gradient = torch.tensor([[0.0, -3.0, 4.0], [0.0, math.inf, 1.0]])
    other = torch.tensor([2.0, -2.0, 0.0, 0.0])
    stats = pytracker.gradient_stats([("a", with_gradients(gradient)[0]), ("b", with_gradients(other)[0])])
    assert stats.names == ["a", "b"]
    assert stats.norms.tolist() == [math.inf, math.sqrt(8)]
    assert stats.abs_max.tolist() == [math.inf, 2.0]
    assert stats.means.tolist() == [math.inf, 0.0]
    assert stats.rms.tolist() == [math.inf, math.sqrt(2)]
    assert stats.zero_fraction.tolist() == pytest.approx([2 / 6, 0.5])
    assert (stats.nans.tolist(), stats.infs.tolist()) == ([0, 0], [1, 0])
    assert (stats.total_norm.item(), stats.max_norm.item(), stats.total_abs_max.item()) == (math.inf,) * 3
    assert stats.total_nonfinite.item() == 1
    assert stats.nonfinite_names() == ["a"]
    assert stats.to_dict(per_parameter=True) == {
        "grad_norm": math.inf,
        "grad_max": math.inf,
        "abs_max": math.inf,
        "nonfinite": 1.0,
        "zero_fraction": 0.4,
        "norm/a": math.inf,
        "norm/b": math.sqrt(8),
    }


@pytest.mark.parametrize(
    "scale", [1024.0, 1024, np.float32(1024), torch.tensor(1024.0), torch.tensor([1024.0], dtype=torch.float64)]
)
def test_a_grad_scale_divides_the_statistics_and_not_the_gradients(scale) -> None:
    gradient = torch.tensor([0.0, 3.0, -4.0]) * 1024
    model = with_gradients(gradient.clone())
    stats = pytracker.gradient_stats(model, grad_scale=scale)
    assert (stats.norms.item(), stats.abs_max.item(), stats.means.item()) == pytest.approx((5.0, 4.0, -1 / 3))
    assert stats.zero_fraction.item() == pytest.approx(1 / 3)
    assert torch.equal(model[0].grad, gradient)


def test_the_plan_follows_a_model_that_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for change in (
        lambda: model(torch.ones(1, 3)).sum().backward(),
        lambda: model.append(nn.Linear(3, 1)),
        lambda: model(torch.ones(1, 3)).sum().backward(),
        lambda: model.zero_grad(),
        lambda: model.double()(torch.ones(1, 3, dtype=torch.float64)).sum().backward(),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(3, 3, dtype=torch.float64))),
        lambda: delattr(model, "2"),
    ):
        change()
        assert_as_the_loop(model)
        assert pytracker.gradient_stats(model).names == [name for name, _ in model.named_parameters()]


def test_a_gradient_may_change_its_layout_between_two_calls() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6))
    for gradient in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.randn(4, 6), None):
        parameter.grad = gradient
        assert_as_the_loop([parameter])
    parameter.data = torch.zeros(2, 2, dtype=torch.float64)
    parameter.grad = torch.randn(2, 2, dtype=torch.float64)
    assert_as_the_loop([parameter])


def test_several_modules_are_measured_as_one_whichever_way_they_are_given() -> None:
    whole = nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Linear(4, 2)))
    whole(torch.ones(1, 3)).sum().backward()
    parts = [nn.Sequential(OrderedDict(a=whole.a)), nn.Sequential(OrderedDict(b=whole.b))]
    expected = pytracker.gradient_stats(whole)
    for target in (parts, tuple(parts), iter(parts), nn.ModuleList(parts)):
        stats = pytracker.gradient_stats(target)
        assert (stats.names, stats.norms.tolist()) == (expected.names, expected.norms.tolist())
    assert pytracker.compute_gradient_stats(parts) == pytracker.compute_gradient_stats(whole)
    with pytracker.Tracker(parts, diagnosis=None) as tracker:
        tracker.step()
    assert tracker.history.parameters.names == list(expected.names)
    norm = pytracker.clip_grad_norm_(parts, 1e-3)
    assert norm == pytest.approx(expected.total_norm)
    assert pytracker.gradient_stats(whole).total_norm == pytest.approx(1e-3)


def test_modules_whose_parameters_have_the_same_names_go_by_their_places() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    nn.Sequential(*layers)(torch.ones(1, 2)).sum().backward()
    assert list(pytracker.gradient_stats(layers).names) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_modules_and_parameters_are_not_mixed() -> None:
    with pytest.raises(InvalidTypeError, match=r"element 0 of the target is .*modules alone"):
        pytracker.Tracker([nn.Linear(2, 2), nn.Parameter(torch.ones(2))])


def test_a_model_that_was_measured_can_be_freed() -> None:
    model = nn.Linear(3, 3)
    pytracker.compute_gradient_stats(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_model_whose_child_leads_back_to_it_can_be_freed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3)
            self.child.register_forward_hook(self.hook)

        def hook(self, *arguments: object) -> None:
            return None

    model = Model()
    pytracker.compute_gradient_stats(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    ("target", "error", "named"),
    [
        (3, InvalidTypeError, "3, of type int"),
        ("weights", InvalidTypeError, "element 0 of the target is 'w'"),
        ([nn.Parameter(torch.zeros(1)), None], InvalidTypeError, "element 1 of the target is None"),
        (
            [("w", nn.Parameter(torch.zeros(1))), ("w", nn.Parameter(torch.ones(1)))],
            ParameterError,
            "'w' is used for 2",
        ),
        (nn.Linear(2, 2, device="meta"), ParameterError, "'weight' is on the meta device"),
    ],
)
def test_a_target_that_cannot_be_measured_is_named(target, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pytracker.gradient_stats(target)


def test_a_gradient_of_an_unknown_layout_is_named() -> None:
    parameter = nn.Parameter(torch.eye(3).to_sparse_csr())
    parameter.grad = torch.eye(3).to_sparse_csr()
    with pytest.raises(ParameterError, match=r"the gradient of 'csr' has layout (SparseCsr|torch.sparse_csr)"):
        pytracker.gradient_stats([("csr", parameter)])


@pytest.mark.parametrize("names", [False, True], ids=["tensors", "named tensors"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", [tuple, list, iter])
def test_gradients_that_autograd_returned_are_measured_themselves(kind, create_graph: bool, names: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    gradients = torch.autograd.grad(model(torch.ones(2, 3)).sum(), list(model.parameters()), create_graph=create_graph)
    squares = [math.fsum((gradient.double() ** 2).flatten().tolist()) for gradient in gradients]
    expected = {"grad_norm": math.sqrt(math.fsum(squares)), "grad_max": math.sqrt(max(squares))}

    def target():
        keys = [name for name, _ in model.named_parameters()]
        return kind(zip(keys, gradients, strict=True)) if names else kind(gradients)

    assert pytracker.compute_gradient_stats(target()) == pytest.approx(expected, rel=1e-9)
    stats = pytracker.gradient_stats(target())
    assert stats.norms.tolist() == pytest.approx([math.sqrt(square) for square in squares], rel=1e-9)
    assert stats.names == ([name for name, _ in model.named_parameters()] if names else ["0", "1", "2", "3"])


def test_a_gradient_that_autograd_did_not_find_is_left_out() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    gradients = torch.autograd.grad((used * 3).sum(), [unused, used], allow_unused=True)
    stats = pytracker.gradient_stats(gradients)
    assert (stats.names, stats.norms.tolist()) == (["1"], [math.sqrt(18)])


def test_tensors_that_have_gradients_are_parameters_whatever_their_kind() -> None:
    leaf, retaining, unset = torch.ones(2), torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True)
    leaf.grad = torch.tensor([3.0, 4.0])
    retaining.retain_grad()
    retaining.sum().backward()
    assert pytracker.gradient_stats([leaf, retaining]).norms.tolist() == [5.0, math.sqrt(2)]
    assert pytracker.compute_gradient_stats([unset, nn.Parameter(torch.ones(2), requires_grad=False)]) == {
        "grad_norm": 0.0,
        "grad_max": 0.0,
    }


@pytest.mark.parametrize("measure", [pytracker.gradient_stats, pytracker.compute_gradient_stats])
@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_gradients_among_parameters_are_refused_by_name(measure, places) -> None:
    parameter, frozen = nn.Parameter(torch.ones(2)), torch.ones(2)
    parameter.grad = torch.tensor([3.0, 4.0])
    (computed,) = torch.autograd.grad((parameter**2).sum(), [parameter], create_graph=True)
    for stranger in (frozen, computed):
        pair = [parameter, stranger]
        with pytest.raises(InvalidTypeError, match=rf"^element {places.index(1)} of the target: no parameter"):
            measure([pair[place] for place in places])
        named = [("w", parameter), ("g", stranger)]
        with pytest.raises(InvalidTypeError, match=r"^'g' of the target: no parameter"):
            measure([named[place] for place in places])


def test_a_tracker_takes_frozen_tensors_and_refuses_what_was_computed() -> None:
    weight, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    with pytracker.Tracker([("weight", weight), ("frozen", frozen)], diagnosis=None) as tracker:
        weight.sum().backward()
        tracker.step()
    assert tracker.history.meta["frozen"] == [[1, 2]]
    assert tracker.history["grad_norm"][:] == [math.sqrt(2)]
    for make in (pytracker.Tracker, pytracker.GradientMeter):
        with pytest.raises(InvalidTypeError, match="'part' of the target: computed from other tensors"):
            make([("weight", weight), ("part", weight[:1])])


def test_one_gradient_may_be_given_alone() -> None:
    assert pytracker.compute_gradient_stats(torch.tensor([3.0, 4.0])) == {"grad_norm": 5.0, "grad_max": 5.0}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))])
def test_statistics_are_copied_without_the_parameters(copied) -> None:
    model = with_gradients(torch.tensor([3.0, 4.0]), None, torch.tensor([0.0, 12.0]))
    stats = pytracker.gradient_stats(model)
    twin = copied(stats)
    assert (twin.names, twin.to_dict(per_parameter=True)) == (stats.names, stats.to_dict(per_parameter=True))
    assert twin.total_norm.item() == 13.0
    assert repr(twin) == repr(stats) == "GradientStats(3 parameters on cpu)"


def test_the_device_that_new_tensors_get_changes_nothing() -> None:
    model = with_gradients(torch.tensor([0.0, 3.0, -4.0]))
    torch.set_default_device("meta")
    try:
        stats = pytracker.gradient_stats(model, grad_scale=0.5)
        found = [stats.means.item(), stats.rms.item(), stats.zero_fraction.item(), stats.total_norm.item()]
        loop = pytracker.compute_gradient_stats(model)
        host = stats.to_dict()
    finally:
        torch.set_default_device(None)
    assert found == pytest.approx([-2 / 3, math.sqrt(100 / 3), 1 / 3, 10.0])
    assert (loop, host["grad_norm"]) == ({"grad_norm": 5.0, "grad_max": 5.0}, 10.0)


@given(square=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=8))
def test_both_functions_take_the_same_root_to_the_last_bit(square: list[float]) -> None:
    model = with_gradients(*(torch.tensor([value, value / 3], dtype=torch.float64) for value in square))
    stats = pytracker.gradient_stats(model)
    assert pytracker.compute_gradient_stats(model) == {
        "grad_norm": stats.total_norm.item(),
        "grad_max": stats.max_norm.item(),
    }


@pytest.mark.parametrize("scale", [0, 0.0, math.nan, math.inf, 10**400, torch.ones(2)])
def test_a_grad_scale_that_cannot_be_is_refused(scale) -> None:
    with pytest.raises(InvalidValueError, match="grad_scale"):
        pytracker.gradient_stats(with_gradients(torch.ones(2)), grad_scale=scale)
