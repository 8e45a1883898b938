"""Checks of what a caller gives: one for each kind of number, and one for text. No torch here.

Each takes an argument's name and value and returns a plain Python value, or raises an error that has the name, the
value and what was expected. NumPy's scalars count as numbers; a tensor of one element does where a value is recorded.
A bool is no setting.
"""

from __future__ import annotations

import errno
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from .errors import InvalidTypeError, InvalidValueError

LARGEST_STEP: Final = 2**63 - 2
"""The largest step: a 64-bit integer, with room for the step after it."""

LONGEST_SECONDS: Final = 1e6
"""The longest wait that can be asked for, about eleven days; the system's own limit differs from one to another."""

_SHOWN: Final = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """Return ``value`` for a message: its repr, cut short, whatever the repr does.

    >>> shown(1.5), shown([0] * 1000)[:15]
    ('1.5', '[0, 0, 0, 0, 0,')
    """
    try:
        text = _shape_of(value) if _has_no_memory(value) else repr(value)
    except Exception:  # a repr of the user's that raises, or an int with too many digits to print
        text = "(no repr)"
    return f"{writable(text):.{_SHOWN}}"


def _has_no_memory(value: Any) -> bool:
    """Whether it is a tensor whose storage was freed: torch's own repr of it would end the process."""
    if not hasattr(value, "untyped_storage"):
        return False
    try:
        needed = value.numel() * value.element_size()
        return bool(value.untyped_storage().nbytes() < needed and value.device.type != "meta")
    except Exception:  # one that has no storage: sparse, wrapped
        return False


def _shape_of(tensor: Any) -> str:
    return f"a tensor of shape {list(tensor.shape)} and {tensor.dtype} whose memory was freed"


def wrong_type(name: str, value: Any, expected: str) -> InvalidTypeError:
    """Return the error for an argument of a type that can't be used.

    >>> print(wrong_type("every", 2.5, "a whole number"))
    every is 2.5, of type float; expected a whole number
    """
    return InvalidTypeError(f"{name} is {shown(value)}, of type {type(value).__name__}; expected {expected}")


def wrong_value(name: str, value: Any, expected: str) -> InvalidValueError:
    """Return the error for an argument of the right type with an impossible value."""
    return InvalidValueError(f"{name} is {shown(value)}; expected {expected}")


def whole_number(
    name: str, value: Any, *, low: int = 0, high: int = LARGEST_STEP, expected: str = "a whole number"
) -> int:
    """Return ``value`` as an int from ``low`` to ``high``; ``np.int64`` is one, a bool and 2.0 are not.

    Raises:
        InvalidTypeError: it is not an integer.
        InvalidValueError: it is out of range.

    >>> import numpy as np
    >>> whole_number("step", np.int64(3))
    3
    """
    if type(value) is not int:
        try:
            index = None if isinstance(value, bool) else operator.index(value)
        except Exception:  # operator.index runs code of the value
            index = None
        if index is None:
            raise wrong_type(name, value, expected)
        value = index
    if not low <= value <= high:
        raise wrong_value(name, value, f"{expected}, {_range(low, high, value)}")
    return int(value)


def real_number(name: str, value: Any) -> float:
    """Return ``value`` as a float, NaN and infinities too; reading a tensor waits for its device.

    Raises:
        InvalidTypeError: it is not one number.
        InvalidValueError: it is an integer too large for a float.

    >>> import fractions
    >>> real_number("loss", fractions.Fraction(1, 2)), real_number("accuracy", True)
    (0.5, 1.0)
    """
    if type(value) is float:
        return value
    try:
        scalar = _scalar(value)
        return float(scalar)
    except OverflowError:
        raise wrong_value(name, value, "a number that a float can hold") from None
    except Exception as error:  # conversion runs code of the value
        raise wrong_type(name, value, "a number") from error


def finite_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    expected: str = "a finite number",
) -> float:
    """Return a setting as a finite number, at least ``low``, above ``above``, at most ``high``; an int stays an int.

    A tensor is not taken, since reading it could wait for its device.

    Raises:
        InvalidTypeError: it is not a number, or a bool.
        InvalidValueError: it is NaN, infinite or out of range.

    >>> finite_number("max_norm", 2, low=0), finite_number("decay", 0.5, low=0, high=1)
    (2, 0.5)
    """
    if (type(value) is int or type(value) is float) and above < value and low <= value <= high and abs(value) < 1e300:
        return value  # as on every step; what follows asks classes for what they are, which takes 2 us
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise wrong_type(name, value, expected)
    known = real_number(name, value)
    if not (math.isfinite(known) and low <= known <= high and known > above):
        raise wrong_value(name, value, expected)
    return int(value) if isinstance(value, Integral) else known


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a time to wait, in seconds: above 0 (or 0 where ``zero``), and at most ``LONGEST_SECONDS``.

    Raises:
        InvalidTypeError: it is not a number, or a bool.
        InvalidValueError: it is NaN, infinite or out of range.

    >>> import decimal
    >>> seconds("timeout", decimal.Decimal(2))
    2.0
    """
    expected = f"a number of seconds {'from 0' if zero else 'above 0'} up to {LONGEST_SECONDS:,.0f}"
    bound: dict[str, Any] = {"low": 0.0} if zero else {"above": 0.0}
    return float(finite_number(name, value, high=LONGEST_SECONDS, expected=expected, **bound))


def number_of_samples(name: str, value: Any) -> float:
    """Return the weight of a value in a mean: 0 or more, and an int stays an exact int.

    Raises:
        InvalidTypeError: it is not a number, or a bool.
        InvalidValueError: it is negative or not finite.
    """
    return finite_number(name, value, low=0, expected="a number of samples, 0 or more")


def text(name: str, value: Any) -> str:
    r"""Return a text that can be written anywhere: lone surrogates, as in paths that are not UTF-8, are escaped.

    Raises:
        InvalidTypeError: it is not a str.

    >>> text("name", "data\udce9")
    'data\\udce9'
    """
    if not isinstance(value, str):
        raise wrong_type(name, value, "a str")
    return writable(value)


def writable(given: str) -> str:
    r"""Return ``given`` as it can be written to a file: with lone surrogates escaped.

    >>> writable("fc.weight"), writable("fc.\ud800")
    ('fc.weight', 'fc.\\ud800')
    """
    return given if given.isascii() else given.encode("utf-8", "backslashreplace").decode("utf-8")


def kind_of(name: str, value: Any, kind: Any, expected: str) -> Any:
    """Return ``value`` if it is an instance of ``kind``: a class, or an abstract one as Mapping.

    Raises:
        InvalidTypeError: it is not.
    """
    if not isinstance(value, kind):
        raise wrong_type(name, value, expected)
    return value


def items(name: str, value: Any, expected: str) -> list[Any]:
    """Return what there is in an iterable; of a text the letters are not what was meant.

    Raises:
        InvalidTypeError: it is a str or bytes, or cannot be iterated over.
    """
    if isinstance(value, (str, bytes)):
        raise wrong_type(name, value, expected)
    try:
        return list(value)
    except TypeError:
        raise wrong_type(name, value, expected) from None


def path(name: str, value: Any) -> Path:
    r"""Return a path, whether there is something at it or not.

    Raises:
        InvalidTypeError: it is neither a str nor an os.PathLike of one.
        InvalidValueError: no file can have it.

    >>> path("path", "a/b").name
    'b'
    """
    try:
        found = Path(value if isinstance(value, str) else os.fspath(kind_of(name, value, os.PathLike, "a path")))
        found.lstat()
    except (TypeError, UnicodeError):  # of bytes; not to be encoded for the file system
        raise wrong_type(name, value, "a path") from None
    except ValueError:
        raise wrong_value(name, value, "a path without NUL characters") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise wrong_value(name, value, "a shorter path: the file system has none of this length") from None
    return found


def flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, of Python or of NumPy.

    Raises:
        InvalidTypeError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise wrong_type(name, value, "True or False")
    return bool(value)


def no_copies(what: str, remedy: str) -> Any:
    """Return a ``__reduce_ex__`` for what belongs to the parameters that it reads: no pickle or copy could have them.

    The method raises InvalidTypeError.
    """

    def refuse(self: object, protocol: object) -> NoReturn:
        raise InvalidTypeError(f"{what} cannot be pickled or copied, as it belongs to this process; {remedy}")

    return refuse


def by_name(call: str, unnamed: Sequence[Any], example: str) -> None:
    """Make sure that whatever a call takes by name was given one.

    Args:
        call: what was called, as it is written.
        unnamed: what was given without a name.
        example: arguments as they should be.

    Raises:
        InvalidTypeError: there is something in ``unnamed``.

    >>> by_name("tracker.log", [0.5], "val_loss=0.5")
    Traceback (most recent call last):
    pytracker.errors.InvalidTypeError: tracker.log() takes its values by name, and got 0.5 without one: ...
    """
    if unnamed:
        spread = "; put ** before a dictionary of them" if any(isinstance(each, Mapping) for each in unnamed) else ""
        raise InvalidTypeError(
            f"{call}() takes its values by name, and got {', '.join(map(shown, unnamed))} without one: "
            f"{call}({example}){spread}"
        )


def function(name: str, value: Any) -> Callable[..., Any]:
    """Return ``value`` if it can be called.

    Raises:
        InvalidTypeError: it can't.
    """
    if not callable(value):
        raise wrong_type(name, value, "a function")
    called: Callable[..., Any] = value
    return called


def _scalar(value: Any) -> Any:
    """Return the Python number in a scalar of NumPy or in an array or tensor of one element; others as they are."""
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError  # float("1") is 1, and a text is still no number
    item = getattr(value, "item", None)
    scalar = item() if callable(item) else value
    if isinstance(scalar, (str, bytes)):
        raise TypeError
    return scalar


def _range(low: int, high: int, value: int) -> str:
    return f"{low} or more" if high == LARGEST_STEP and value < low else f"from {low} to {high}"
