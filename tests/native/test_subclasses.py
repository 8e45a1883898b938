"""Tensor subclasses run Python whenever they are asked for something: nothing that it does ends the process.

`make sanitize` runs this with every read and write checked.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import pytracker
from pytracker.core import native
from pytracker.errors import ParameterError

if native.load()[0] is None:
    pytest.skip(f"there is no native core: {native.load()[1]}", allow_module_level=True)


class Wrapper(torch.Tensor):
    """Stands for another tensor, as those of quantization libraries do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, **given: object) -> Wrapper:
        size = given.pop("size", inner.shape)
        made = torch.Tensor._make_wrapper_subclass(cls, size, dtype=inner.dtype, device=inner.device, **given)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor, **given: object) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x: object) -> object:
            return x.inner if isinstance(x, Wrapper) else x

        return func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))


class Raising(Wrapper):
    """Can do nothing."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func}")


class Fresh(Wrapper):
    """Has a local tensor, as a DTensor has, and another one each time."""

    @property
    def _local_tensor(self) -> torch.Tensor:
        return self.inner.clone()


class Alternating(Wrapper):
    """Has a local tensor the first time only."""

    asked = 0

    @property
    def _local_tensor(self) -> object:
        self.asked += 1
        return self.inner if self.asked == 1 else None


class Thief(Wrapper):
    """Frees the gradients of others when it is asked for its local tensor, or for its value."""

    victims: list[torch.Tensor]

    def steal(self) -> None:
        for victim in self.victims:
            victim.grad = None
        gc.collect()

    @property
    def _local_tensor(self) -> torch.Tensor:
        self.steal()
        return self.inner


def with_gradient(gradient: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(gradient.shape))
    parameter.grad = gradient
    return parameter


def test_a_piece_that_is_made_when_it_is_asked_for_lives_until_it_was_read() -> None:
    parameters = [with_gradient(Fresh(torch.full((10**4,), float(k)))) for k in (3, 4)]
    for _ in range(3):  # the second time it lies as the plan knows it
        stats = pytracker.gradient_stats(parameters)
        assert stats.norms.tolist() == [300.0, 400.0]
        assert pytracker.compute_gradient_stats(parameters) == {"grad_norm": 500.0, "grad_max": 400.0}


@pytest.mark.parametrize("kind", [Fresh, Alternating])
def test_a_piece_that_is_another_one_by_then_is_not_clipped(kind: type[Wrapper]) -> None:
    parameter = with_gradient(kind(torch.full((1000,), 3.0)))
    with pytest.raises(ParameterError, match="the gradient of '0' is not where it was when it was read"):
        pytracker.clip_grad_norm_([parameter], 1.0)
    assert parameter.grad.inner.tolist() == [3.0] * 1000


@pytest.mark.parametrize("first", [False, True])
def test_gradients_that_a_subclass_frees_are_missing(first: bool) -> None:
    for _ in range(2):
        victims = [with_gradient(torch.full((10**5,), 3.0)) for _ in range(3)]
        thief = with_gradient(Thief(torch.full((4,), 2.0)))
        thief.grad.victims = victims
        named = [(f"victim{k}", victim) for k, victim in enumerate(victims)]
        stats = pytracker.gradient_stats([("thief", thief), *named] if first else [*named, ("thief", thief)])
        norms = dict(zip(stats.names, stats.norms.tolist(), strict=True))
        assert norms.pop("thief") == 4.0
        assert all(map(math.isnan, norms.values()))


@pytest.mark.parametrize("name", ["loss", "grad_scale"])
@pytest.mark.filterwarnings("ignore:no parameter had a gradient")
def test_a_value_that_frees_gradients_is_read_before_they_are(name: str) -> None:
    weight = with_gradient(torch.full((10**5,), 3.0))
    value = Thief(torch.tensor(2.0))
    value.victims = [weight]
    with pytracker.Tracker([weight], diagnosis=None) as tracker:
        tracker.step(**{name: value})
    assert math.isnan(tracker.history["grad_norm"][0])
    weight.grad = torch.ones(10**5)
    assert math.isnan(pytracker.gradient_stats([weight], grad_scale=value).norms.item())


def fake(inner: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(inner.shape)


def leaked(transform: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(inner: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        transform(lambda x: (kept.append(x * 1), x.sum())[1])(inner.float())
        return kept[0]

    return make


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda inner: inner,
    "a wrapper": Wrapper,
    "one without an operation": Raising,
    "larger than what it holds": lambda inner: Wrapper(inner, size=(10**6, 10**3)),
    "with strides": lambda inner: Wrapper(inner, size=(2,) * 8, strides=(1,) * 8),
    "sparse by name": lambda inner: Wrapper(inner, layout=torch.sparse_csr),
    "with sizes of its own": lambda inner: Wrapper(inner, dispatch_sizes_strides_policy="sizes"),
    "with a device of its own": lambda inner: Wrapper(inner, dispatch_device=True),
    "another piece each time": Fresh,
    "a piece once": Alternating,
    "two": lambda inner: TwoTensor(inner, inner.clone()),
    "fake": fake,
    "a subclass of memory": lambda inner: torch.Tensor._make_subclass(Raising, inner),
    "leaked from grad": leaked(torch.func.grad),
    "leaked from vmap": leaked(torch.func.vmap),
    "jagged": lambda inner: torch.nested.nested_tensor([inner.flatten()], layout=torch.jagged),
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any kind; one that torch cannot make is a plain one."""
    shape = draw(st.sampled_from([(), (1,), (3,), (3, 4), (0,), (130, 33)]))
    inner = torch.ones(shape).to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8])))
    with contextlib.suppress(Exception):
        return KINDS[draw(st.sampled_from(list(KINDS)))](inner)
    return inner


def survives(call: Callable[[], object]) -> None:
    """Make a call that may raise anything, since a subclass has its own say, and must come back."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        call()


@given(
    st.lists(st.tuples(tensors(), tensors(), st.booleans()), min_size=1, max_size=4), st.lists(tensors(), min_size=3)
)
def test_subclasses_of_any_kind_give_numbers_or_raise(drawn, values: list[torch.Tensor]) -> None:
    parameters = []
    for value, gradient, trained in drawn:
        parameter = value
        with contextlib.suppress(Exception):
            parameter = torch.nn.Parameter(value, requires_grad=trained)
        with contextlib.suppress(Exception):
            parameter.grad = gradient
        parameters.append(parameter)
    named = [(str(place), parameter) for place, parameter in enumerate(parameters)]

    def recorded() -> None:
        with pytracker.Tracker(named, every=2, seconds=1e6, diagnosis=None) as tracker:
            for value in values:
                survives(lambda value=value: tracker.step(loss=value, grad_scale=value))
                survives(tracker.step)
            tracker.epoch()

    for call in (
        lambda: pytracker.compute_gradient_stats(named),
        lambda: pytracker.gradient_stats(named, grad_scale=values[0]).to_dict(),
        lambda: pytracker.gradient_stats(parameters).to_dict(),
        lambda: pytracker.clip_grad_norm_(parameters, 0.5),
        lambda: pytracker.AverageMeter().update(values[0], values[1]),
        lambda: torch.ops.pytracker.gradient_moments(parameters, values[0]),
        lambda: torch.ops.pytracker.scale_gradients_(parameters, values[1]),
        lambda: torch.ops.pytracker.meter_update_(values[0], [values[1]], [values[2]]),
        recorded,
    ):
        survives(call)
