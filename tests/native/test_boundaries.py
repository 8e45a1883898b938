"""No input ends the process: the operators and the core's classes with whatever tensors there are.

Each call gives numbers or raises. `make sanitize` runs this with every read and write checked. Tensor subclasses have a
file of their own.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytracker.core import native
from pytracker.errors import InvalidValueError, ParameterError

core, _reason = native.load()
if core is None:
    pytest.skip(f"there is no native core: {_reason}", allow_module_level=True)

OPERATORS = torch.ops.pytracker
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.t(),
    "gaps": lambda x: x[..., ::2],
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "overlapping": lambda x: x.as_strided((2, max(x.numel() - 1, 0)), (1, 1)) if x.numel() > 1 else x,
    "lazily negated": torch._neg_view,
    "lazily conjugated": lambda x: x.conj(),
    "imaginary": lambda x: x.conj().imag,
    "a lazy clone": torch._lazy_clone,
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "sparse CSR": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "requires a gradient": lambda x: x.requires_grad_(),
    "inference": lambda x: inference(x),
}


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # last: torch itself would read what is not there
    "nothing": lambda x: x,
    "freed": freed,
    "a freed part": lambda x: freed(torch.cat([x.flatten(), x.flatten()]))[x.numel() :],
    "shrunk": shrunk,
    "a freed half with gaps": lambda x: shrunk(x.clone())[..., ::2],
}


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any dtype, shape and kind; one that torch cannot make is a plain one."""
    shape = draw(st.sampled_from([(), (1,), (0,), (5,), (3, 4), (2, 0), (130, 33)]))
    dtype = draw(st.sampled_from(DTYPES))
    value = draw(st.sampled_from([0.0, 1.0, -2.0, math.inf, math.nan]))
    plain = torch.full(shape, 1.0).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        plain = torch.full(shape, value).to(dtype)
    changed = plain
    for change in draw(st.lists(st.sampled_from(list(CHANGES.values())), max_size=2)):
        with contextlib.suppress(Exception):
            changed = change(changed)
    is_memory = type(changed) is torch.Tensor and changed.layout is torch.strided and not changed.is_quantized
    if is_memory and not changed._is_zerotensor():
        with contextlib.suppress(Exception):
            changed = draw(st.sampled_from(list(LOSSES.values())))(changed)
    return changed


def survives(call: Callable[[], object]) -> None:
    """Make a call that may raise anything, since torch has its own say, and must come back."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        call()


@given(st.lists(tensors(), max_size=4), st.one_of(st.none(), tensors()))
def test_moments_of_anything(gradients: list[torch.Tensor], scale: torch.Tensor | None) -> None:
    survives(lambda: OPERATORS.gradient_moments(gradients, scale))


@given(st.lists(tensors(), max_size=4), st.one_of(tensors(), st.just(torch.tensor(0.5, dtype=torch.float64))))
def test_scaling_of_anything(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    survives(lambda: OPERATORS.scale_gradients_(gradients, factor))


@given(
    st.one_of(tensors(), st.integers(0, 4).map(lambda k: torch.zeros(k, 4, dtype=torch.float64))),
    st.lists(tensors(), max_size=4),
    st.lists(tensors(), max_size=4),
)
def test_meters_of_anything(state: torch.Tensor, values: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    survives(lambda: OPERATORS.meter_update_(state, values, weights))
    survives(lambda: OPERATORS.meter_update_(state, values, [torch.tensor(1.0)] * len(values)))


@given(
    st.lists(tensors(), max_size=3),
    st.sampled_from(["gradient", "value", "tensor"]),
    st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), max_size=3),
    st.dictionaries(st.sampled_from(["loss", "grad_scale", "", "\n"]), tensors(), max_size=3),
)
def test_plans_and_logs_of_anything(
    parameters: list[torch.Tensor], source: str, windows: list[tuple[int, int]], scalars: dict[str, torch.Tensor]
) -> None:
    for parameter in parameters:
        survives(lambda parameter=parameter: setattr(parameter, "grad", parameter.detach()))

    def run() -> None:
        plan = core.Plan(parameters, [str(index) for index in range(len(parameters))], source, windows)
        log = core.StepLog(plan, 2, 3)
        reader = core.StepReader(None, lambda groups: [], set())
        for step in range(3):
            survives(lambda step=step: log.append(reader, step, scalars))
        survives(plan.norm_and_max)
        survives(lambda: plan.scale(plan.reduce_and_clip(1.0)[2]))
        log.notes(-3, 9), log.release(99), log.notes(0, -1)

    survives(run)


def test_operators_refuse_an_empty_list_and_a_freed_factor_by_name() -> None:
    with pytest.raises(InvalidValueError, match="gradient_moments was called with no tensors"):
        OPERATORS.gradient_moments([], torch.tensor(1.0))
    with pytest.raises(InvalidValueError, match="needs a factor of one float64 element"):
        OPERATORS.scale_gradients_([torch.ones(2)], freed(torch.ones(1, dtype=torch.float64)))
    with pytest.raises(InvalidValueError, match="state of meters"):
        OPERATORS.meter_update_(freed(torch.zeros(1, 4, dtype=torch.float64)), [torch.ones(1)], [torch.ones(1)])
    with pytest.raises(ParameterError, match=r"'tensors\[1\]' has 8 elements in a memory of 16 bytes"):
        OPERATORS.gradient_moments([torch.ones(2), shrunk(torch.ones(8))])


def test_a_number_that_takes_the_gradients_away_when_it_is_read_does_no_harm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50_000))
    parameter.grad = torch.ones(50_000)

    class Thief:
        def __float__(self) -> float:
            parameter.grad = None
            return 1.0

    log = core.StepLog(core.Plan([parameter], ["w"]), 2, 2)
    assert log.append(core.StepReader(None, lambda groups: [], set()), 0, {"loss": Thief()}) == 1
    assert log.rows[0][0, 13].item() == 1.0
    assert log.rows[0][0, 7:13].isnan().all()
