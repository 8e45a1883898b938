"""One home for the checks of numbers: what is taken, what is refused, and that the message has name and value."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytracker import _checks
from pytracker.errors import InvalidTypeError, InvalidValueError, PytrackerError


class Raises:
    """Nothing about it can be asked."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __index__(self):
        raise RuntimeError("no index")

    def __float__(self):
        raise RuntimeError("no float")


class Level(enum.IntEnum):
    LOW = 3


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), Level.LOW])
def test_an_integer_of_any_kind_is_a_whole_number(value):
    found = _checks.whole_number("step", value)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "3", b"3", None, Fraction(3), Decimal(3), 3j, [3], Raises()])
def test_what_is_no_integer_is_refused_by_name(value):
    with pytest.raises(InvalidTypeError, match=r"^step is .*expected a whole number"):
        _checks.whole_number("step", value)


@pytest.mark.parametrize("value", [-1, 2**63 - 1, 2**63, 10**4000, -(10**4000)])
def test_an_integer_out_of_range_is_refused_by_name(value):
    limits = "0 or more" if value < 0 else f"from 0 to {2**63 - 2}"
    with pytest.raises(InvalidValueError, match=rf"^step is .*expected a whole number, {limits}"):
        _checks.whole_number("step", value)


@given(st.floats() | st.integers(-(2**1000), 2**1000) | st.fractions() | st.booleans())
def test_a_real_number_is_what_float_makes_of_it(value):
    np.testing.assert_equal(_checks.real_number("loss", value), float(value))


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float16(0.5), np.array([0.5]), np.array([[0.5]]), Decimal("0.5")]
)
def test_a_scalar_of_another_library_is_a_real_number(value):
    assert _checks.real_number("loss", value) == 0.5


@pytest.mark.parametrize(
    "value", ["1", b"1", bytearray(b"1"), np.str_("1"), None, 1j, np.complex64(1), [1.0], Raises()]
)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(InvalidTypeError, match=r"^loss is "):
        _checks.real_number("loss", value)


def test_an_array_of_several_elements_is_no_number():
    with pytest.raises(InvalidTypeError, match=r"loss is array\(\[0., 0.\]\)"):
        _checks.real_number("loss", np.zeros(2))


@pytest.mark.parametrize("value", [10**400, -(10**4000), Fraction(10**400)])
def test_a_number_that_no_float_holds_is_refused_by_name(value):
    with pytest.raises(InvalidValueError, match=r"^loss is .*float can hold"):
        _checks.real_number("loss", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e12, -1, 10**400, Decimal("inf"), np.float32("inf")])
def test_a_time_that_cannot_be_waited_for_is_refused_by_name(value):
    with pytest.raises(InvalidValueError, match=r"^timeout is "):
        _checks.seconds("timeout", value, zero=True)


@pytest.mark.parametrize("value", [2, 2.0, Decimal(2), Fraction(2), np.float32(2), np.int64(2)])
def test_a_time_may_be_any_kind_of_number(value):
    found = _checks.seconds("timeout", value)
    assert (found, type(found)) == (2.0, float)


def test_a_time_may_be_nothing_only_where_that_makes_sense():
    assert _checks.seconds("timeout", 0, zero=True) == 0
    with pytest.raises(InvalidValueError, match="timeout is 0; expected a number of seconds above 0"):
        _checks.seconds("timeout", 0)


@pytest.mark.parametrize("value", [True, "soon", None, 2j])
def test_what_is_no_time_is_refused_by_name(value):
    with pytest.raises(InvalidTypeError, match=r"^timeout is "):
        _checks.seconds("timeout", value)


def test_a_weight_that_is_an_integer_stays_exact():
    assert _checks.number_of_samples("n", np.int64(2**53 + 1)) == 2**53 + 1


@given(st.text(st.characters()))
def test_a_text_that_was_escaped_can_be_written(value):
    _checks.text("name", value).encode()


@pytest.mark.parametrize("check", [_checks.whole_number, _checks.real_number, _checks.finite_number, _checks.seconds])
@given(value=st.recursive(st.none() | st.text() | st.binary() | st.complex_numbers() | st.floats(), st.lists))
def test_a_check_returns_a_number_or_raises_an_error_of_pytracker(check, value):
    try:
        found = check("it", value)
    except PytrackerError as error:
        found = error
    assert isinstance(found, (int, float)) or str(found).startswith("it is ")


def test_an_integer_that_python_does_not_print_is_refused_by_name():
    with pytest.raises(InvalidValueError, match="loss is"):
        _checks.real_number("loss", 10**5000)


@pytest.mark.parametrize("value", ["runs", Path("runs"), "", ".", "data\udce9", np.str_("runs")])
def test_whatever_a_file_system_takes_is_a_path(value) -> None:
    assert _checks.path("path", value) == Path(value)


@pytest.mark.parametrize(
    ("value", "error", "named"),
    [
        (None, InvalidTypeError, "directory is None, of type NoneType; expected a path"),
        (b"runs", InvalidTypeError, "directory is b'runs', of type bytes"),
        (3, InvalidTypeError, "directory is 3, of type int"),
        ("a\0b", InvalidValueError, r"directory is 'a\\x00b'; expected a path without NUL"),
        ("x" * 100_000, InvalidValueError, "directory is 'x+; expected a shorter path"),
    ],
)
def test_what_no_file_can_have_for_a_path_is_refused_by_name(value, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        _checks.path("directory", value)


@pytest.mark.parametrize("value", ["ab", b"ab", 3, None, object()])
def test_what_holds_no_items_is_refused_by_name(value) -> None:
    assert _checks.items("rules", iter([1, 2]), "a list") == [1, 2]
    with pytest.raises(InvalidTypeError, match=r"rules is .*; expected a list"):
        _checks.items("rules", value, "a list")


def test_only_true_and_false_are_flags():
    assert (_checks.flag("resume", np.True_), _checks.flag("resume", False)) == (True, False)
    for value in (1, "yes", None, np.ones(2)):
        with pytest.raises(InvalidTypeError, match=r"resume is .*; expected True or False"):
            _checks.flag("resume", value)


def test_a_tensor_without_memory_is_shown_and_not_read() -> None:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    assert _checks.shown(tensor) == "a tensor of shape [3] and torch.float32 whose memory was freed"
    assert _checks.shown(torch.tensor(0.5)) == "tensor(0.5000)"
