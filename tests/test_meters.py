"""AverageMeter beside the usual one, GradientMeter beside numpy."""

from __future__ import annotations

import copy
import enum
import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pytracker
from pytracker import AverageMeter, GradientMeter
from pytracker.errors import InvalidTypeError, InvalidValueError, ParameterError

numbers = st.one_of(st.integers(-(10**18), 10**18), st.floats(-1e100, 1e100))


class UsualMeter:
    """The meter that everyone copies."""

    def __init__(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


@given(updates=st.lists(st.tuples(numbers, st.integers(1, 1000)), max_size=20))
def test_python_numbers_give_exactly_what_the_usual_meter_gives(updates) -> None:
    ours, usual = AverageMeter(), UsualMeter()
    for val, n in updates:
        ours.update(val, n)
        usual.update(val, n)
    assert (ours.val, ours.avg, ours.sum, ours.count) == (usual.val, usual.avg, usual.sum, usual.count)
    assert type(ours.sum) is type(usual.sum)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_element_counts_as_its_number(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    meter = AverageMeter()
    meter.update(torch.ones(shape, dtype=dtype, requires_grad=dtype.is_floating_point), n=3)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (1, 3, 3, 1)


@pytest.mark.parametrize(
    "n", [np.int64(3), np.float32(3), np.longdouble(3), True + 2, 3.0, Fraction(3), torch.tensor(3)]
)
def test_any_number_of_python_numpy_or_torch_is_a_weight(n) -> None:
    meter = AverageMeter()
    meter.update(2.0, n)
    assert (meter.sum, meter.count) == (6.0, 3)


@given(values=st.lists(st.tuples(st.floats(-1e3, 1e3, width=16), st.integers(0, 99)), min_size=1, max_size=20))
def test_tensors_of_half_precision_are_added_in_double_precision(values) -> None:
    meter = AverageMeter()
    for value, n in values:
        meter.update(torch.tensor(value, dtype=torch.float16), n)
    assert meter.sum == pytest.approx(math.fsum(value * n for value, n in values), rel=1e-12, abs=1e-9)
    assert meter.count == sum(n for _, n in values)


def test_nan_is_counted_apart() -> None:
    meter = AverageMeter()
    for value in (1.0, math.nan, torch.tensor(math.nan), 3.0):
        meter.update(value)
    assert (meter.avg, meter.count, meter.nans) == (2.0, 2, 2)
    meter.update(math.nan)
    assert math.isnan(meter.val)


def test_reset_forgets_everything() -> None:
    meter = AverageMeter()
    meter.update(5.0, 2)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count, meter.nans) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("value", [math.inf, math.nan, torch.tensor(math.inf)])
def test_a_weight_of_zero_adds_nothing(value) -> None:
    meter = AverageMeter()
    meter.update(2.0, 3)
    meter.update(value, 0)
    assert (meter.sum, meter.count, meter.avg, meter.nans) == (6.0, 3, 2.0, 0)
    assert meter.val == pytest.approx(float(value), nan_ok=True)


def test_integers_past_a_float_make_the_sum_infinite_and_not_an_error() -> None:
    meter = AverageMeter()
    for value in (2**1000, 0.5):
        meter.update(value, 2**1000)
    assert meter.avg == math.inf


def test_a_meter_shows_itself_as_that_of_the_imagenet_example() -> None:
    meter = AverageMeter("Loss", ":.4e")
    meter.update(1.2345)
    assert str(meter) == "Loss 1.2345e+00 (1.2345e+00)"
    top1 = AverageMeter("Acc@1", ":6.2f")
    top1.update(torch.tensor([50.0]), 2)
    top1.update(100, 2)
    assert f"{top1}" == "Acc@1 100.00 ( 75.00)"


class Summary(enum.Enum):
    """As the ImageNet example has it."""

    NONE = 0
    AVERAGE = 1
    SUM = 2
    COUNT = 3


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((), "Acc@1 62.500"),
        ((Summary.AVERAGE,), "Acc@1 62.500"),
        ((Summary.SUM,), "Acc@1 250.000"),
        ((Summary.COUNT,), "Acc@1 4.000"),
        ((Summary.NONE,), ""),
        (("sum",), "Acc@1 250.000"),
    ],
)
@pytest.mark.parametrize("kept", [lambda meter: meter, lambda meter: pickle.loads(pickle.dumps(meter))])
def test_the_summary_of_the_imagenet_example_works(given, shown: str, kept) -> None:
    meter = AverageMeter("Acc@1", ":6.2f", *given)
    meter.update(75.0, 3)
    meter.update(torch.tensor(25.0))
    assert kept(meter).summary() == shown


def freed() -> torch.Tensor:
    value = torch.tensor([2.0])
    value.untyped_storage().resize_(0)
    return value


KINDS: dict[str, tuple[Callable[[], torch.Tensor], float | str]] = {
    "mkldnn": (lambda: torch.tensor([3.0]).to_mkldnn(), 3.0),
    "sparse": (lambda: torch.tensor([3.0]).to_sparse(), 3.0),
    "CSR": (lambda: torch.tensor([[3.0]]).to_sparse_csr(), 3.0),
    "lazily negated": (lambda: torch._neg_view(torch.tensor(-3.0)), 3.0),
    "freed": (freed, "memory was freed"),
    "bits": (lambda: torch.tensor(1, dtype=torch.uint8).view(torch.bits8), "bits8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1)]), "nested"),
    "meta": (lambda: torch.ones((), device="meta"), "meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(("make", "expected"), KINDS.values(), ids=KINDS)
def test_a_tensor_of_any_kind_is_read_as_torch_reads_it_or_refused_with_the_meters_name(make, expected) -> None:
    calls: list[tuple[str, Callable[[AverageMeter], None]]] = [
        ("val of the meter 'Loss'", lambda meter: meter.update(make())),
        ("n of the meter 'Loss'", lambda meter: meter.update(1.0, make())),
        ("sum of the meter 'Loss'", lambda meter: setattr(meter, "sum", make())),
    ]
    for named, call in calls:
        meter = AverageMeter("Loss")
        if isinstance(expected, str):
            with pytest.raises(InvalidValueError, match=f"{named} .*{expected}"):
                call(meter)
            assert (meter.val, meter.sum, meter.count) == (0, 0, 0)
        else:
            call(meter)
            assert meter.sum == expected
    with pytracker.Tracker([], diagnosis=None) as tracker:
        if isinstance(expected, str):
            with pytest.raises(InvalidValueError, match=f"'metric' .*{expected}"):
                tracker.log(metric=make())
        else:
            tracker.log(metric=make())
            assert tracker.history["metric"][:] == [expected]


def test_a_value_within_vmap_is_refused_with_the_meters_name() -> None:
    meter = AverageMeter("Loss")
    with pytest.raises(
        InvalidValueError, match=r"val of the meter 'Loss' is a tensor whose value cannot be read .*vmap"
    ):
        torch.func.vmap(lambda x: (meter.update(x), x)[1])(torch.ones(3))


def test_the_all_reduce_of_the_imagenet_example_works() -> None:
    meter = AverageMeter()
    meter.update(1.0, 4)
    total = torch.tensor([meter.sum, meter.count], dtype=torch.float32) * 2  # as if of two ranks
    meter.sum, meter.count = total.tolist()
    meter.avg = meter.sum / meter.count
    assert (meter.sum, meter.count, meter.avg) == (8.0, 8.0, 1.0)
    meter.update(3.0, 8)
    assert meter.avg == 2.0
    meter.sum, meter.val = total[0], np.float32(0.5)
    assert (meter.sum, meter.val) == (8.0, 0.5)


def test_an_average_that_was_assigned_holds_until_the_next_update() -> None:
    meter = AverageMeter()
    meter.update(1.0)
    meter.avg = 5
    meter.sum = 7.0
    assert meter.avg == 5
    meter.update(1.0)
    assert meter.avg == 4.0


@pytest.mark.parametrize("name", ["val", "sum", "count", "avg"])
def test_what_cannot_be_assigned_is_named_and_changes_nothing(name: str) -> None:
    meter = AverageMeter()
    meter.update(2.0)
    with pytest.raises(InvalidTypeError, match=f"{name} is 'x', of type str"):
        setattr(meter, name, "x")
    assert (meter.val, meter.sum, meter.count, meter.avg) == (2.0, 2.0, 1, 2.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda meter: pickle.loads(pickle.dumps(meter))])
def test_a_meter_is_copied_with_all_it_holds(copied) -> None:
    meter = AverageMeter("Loss", ":.4e")
    for value in (1, 2.5, math.nan):
        meter.update(value, 3)
    twin = copied(meter)
    meter.reset()
    assert (str(twin), twin.sum, twin.count, twin.nans) == ("Loss nan (1.7500e+00)", 10.5, 6, 1)
    twin.avg = 9.0
    assert copied(twin).avg == 9.0


def test_a_meter_goes_on_from_its_state() -> None:
    meter, later = AverageMeter(), AverageMeter("Loss")
    meter.update(10**20, 2)
    later.load_state_dict(meter.state_dict())
    later.update(1, 2)
    assert (later.name, later.sum, later.count) == ("Loss", 2 * 10**20 + 2, 4)


@pytest.mark.parametrize("state", [{}, None, 3, {"val": 1, "sum": 1, "count": 1}])
def test_a_state_that_is_none_is_refused(state) -> None:
    with pytest.raises(InvalidValueError, match=r"state is .*; expected what AverageMeter.state_dict"):
        AverageMeter().load_state_dict(state)


def test_a_state_with_a_wrong_value_changes_nothing() -> None:
    meter = AverageMeter()
    meter.update(2.0)
    with pytest.raises(InvalidTypeError, match=r"state\['count'\] is 'x'"):
        meter.load_state_dict({"val": 1, "sum": 1, "count": "x", "nans": 0})
    assert meter.sum == 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((3,), InvalidTypeError, "name is 3, of type int"),
        (("a", None), InvalidTypeError, "fmt is None"),
        (("a", ":.4q"), InvalidValueError, "fmt is ':.4q'; expected the format of a float"),
        (("a", ".4f"), InvalidValueError, "fmt is '.4f'"),
        (("a", ":{x}"), InvalidValueError, "fmt is ':{x}'"),
        (("a", ":d"), InvalidValueError, "fmt is ':d'"),
        (
            ("a", ":f", "median"),
            InvalidValueError,
            "summary_type is 'median'; expected one of none, average, sum, count",
        ),
        (("a", ":f", 2), InvalidValueError, "summary_type is 2; expected one of none"),
    ],
)
def test_a_meter_that_cannot_be_made_says_why(arguments, error, named: str) -> None:
    with pytest.raises(error, match=named):
        AverageMeter(*arguments)


def test_numpy_scalars_are_numbers() -> None:
    meter = AverageMeter()
    for value in (np.float32(0.5), np.int64(2), np.array([1.5])):
        meter.update(value)
    assert meter.sum == 4.0


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (("high",), InvalidTypeError, "val is 'high', of type str"),
        ((None,), InvalidTypeError, "val is None"),
        (("1",), InvalidTypeError, "val is '1', of type str"),
        ((torch.ones(2),), InvalidValueError, r"shape \[2\] with 2 elements"),
        ((1.0, -1), InvalidValueError, "n is -1"),
        ((1.0, math.nan), InvalidValueError, "n is nan"),
        ((1.0, math.inf), InvalidValueError, "n is inf"),
        ((1.0, torch.tensor(-3)), InvalidValueError, "n is -3"),
        ((1.0, torch.ones(2)), InvalidValueError, r"n is a tensor of shape \[2\]"),
        ((1.0, torch.ones(1, device="meta")), InvalidValueError, "n is a tensor on the meta device"),
        ((torch.ones(1, device="meta"),), InvalidValueError, "val is a tensor on the meta device"),
        ((torch.tensor(1j),), InvalidTypeError, "val is a complex tensor"),
        ((1j,), InvalidTypeError, "val is 1j, of type complex"),
        ((np.complex64(1j),), InvalidTypeError, "val is .*1j.*, of type complex64"),
        ((10**400,), InvalidValueError, "val is 10+; expected a number that a float can hold"),
        ((1.0, 10**400), InvalidValueError, "n is 10+; expected a number that a float can hold"),
        ((1.0, Fraction(-1, 2)), InvalidValueError, r"n is Fraction\(-1, 2\)"),
        ((1.0, "3"), InvalidTypeError, "n is '3', of type str"),
    ],
)
def test_what_a_meter_cannot_take_is_named_and_changes_nothing(arguments, error, named: str) -> None:
    meter = AverageMeter()
    meter.update(2.0)
    with pytest.raises(error, match=named):
        meter.update(*arguments)
    assert (meter.sum, meter.count) == (2.0, 1)


@given(
    batches=st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), min_size=1, max_size=4),
    every=st.sampled_from([1, 3, 50]),
)
def test_a_gradient_meter_gives_what_numpy_gives_since_the_last_reset(batches, every: int) -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    meter = GradientMeter([("w", parameter)], every=every)
    for batch in batches:
        meter.reset()
        for norm in batch:
            parameter.grad = torch.tensor([norm, 0.0], dtype=torch.float64)
            meter.update()
    last = np.sqrt(np.array(batches[-1]) ** 2)
    expected = {"mean": last.mean(), "min": last.min(), "max": last.max(), "std": last.std(), "last": last[-1]}
    scale = max(1.0, last.max())
    for name in ("grad_norm", "grad_max", "norm/w"):
        got = meter.compute(per_parameter=True)[name]
        assert got.pop("count") == len(last)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-7 * scale)


def test_a_parameter_counts_only_where_it_has_a_gradient() -> None:
    model = nn.Linear(1, 1)
    meter = GradientMeter(model, every=2)
    for step in range(5):
        model.weight.grad = torch.full((1, 1), float(step)) if step % 2 else None
        model.bias.grad = torch.ones(1)
        meter.update()
    norms = meter.compute(per_parameter=True)
    assert (norms["norm/weight"]["count"], norms["norm/weight"]["mean"], norms["norm/weight"]["last"]) == (2, 2.0, 3.0)
    assert norms["norm/bias"]["count"] == 5


def test_an_update_without_any_gradient_does_not_count() -> None:
    model = nn.Linear(1, 1, bias=False)
    meter = GradientMeter(model, every=2)
    for step in range(5):
        model.weight.grad = torch.full((1, 1), 6.0) if step % 2 else None
        meter.update()
    norms = meter.compute()
    assert (norms["grad_norm"]["count"], norms["grad_norm"]["mean"], norms["grad_max"]["min"]) == (2, 6.0, 6.0)


def test_before_the_first_update_there_is_nothing() -> None:
    nothing = GradientMeter(nn.Linear(1, 1)).compute()["grad_norm"]
    assert nothing.pop("count") == 0
    assert all(math.isnan(value) for value in nothing.values())


def test_a_gradient_that_is_not_finite_reaches_the_mean() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    meter = GradientMeter([parameter])
    for value in (1.0, math.nan):
        parameter.grad = torch.tensor([value])
        meter.update()
    assert math.isnan(meter.compute()["grad_norm"]["mean"])


@pytest.mark.parametrize("every", [1, 2, 50])
def test_an_infinite_norm_makes_the_mean_infinite_whatever_comes_after(every: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    meter = GradientMeter([parameter], every=every)
    for value in (1.0, math.inf, 2.0, 3.0):
        parameter.grad = torch.tensor([value])
        meter.update()
    norms = meter.compute()["grad_norm"]
    assert (norms["mean"], norms["min"], norms["max"], norms["last"]) == (math.inf, 1.0, math.inf, 3.0)


def test_reading_a_gradient_meter_changes_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    meter = GradientMeter([parameter], every=4)
    for step in range(11):
        parameter.grad = torch.tensor([float(step)])
        meter.update()
        assert meter.compute()["grad_norm"] == meter.compute()["grad_norm"]
        assert meter.compute()["grad_norm"]["mean"] == pytest.approx(step / 2)


@pytest.mark.parametrize(
    ("every", "error"),
    [(0, InvalidValueError), (-3, InvalidValueError), (1.5, InvalidTypeError), (True, InvalidTypeError)],
)
def test_an_interval_that_cannot_be_is_named(every, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"every is {every}"):
        GradientMeter(nn.Linear(1, 1), every=every)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_gradient_meter_says_that_it_cannot_be_copied(copied) -> None:
    with pytest.raises(InvalidTypeError, match="a GradientMeter cannot be pickled or copied"):
        copied(GradientMeter(nn.Linear(1, 1)))


def test_gradients_themselves_are_no_target_of_a_meter() -> None:
    weight = torch.ones(2, requires_grad=True)
    gradients = torch.autograd.grad(weight.sum(), [weight])
    with pytest.raises(InvalidTypeError, match="the target holds gradients"):
        GradientMeter(gradients)


def test_a_model_without_data_is_refused() -> None:
    with pytest.raises(ParameterError, match="'weight' is on the meta device"):
        GradientMeter(nn.Linear(1, 1, device="meta"))
