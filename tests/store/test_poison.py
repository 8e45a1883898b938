"""What SQLite can't take costs nothing else: it is escaped, refused by the call, or set aside alone."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from pytracker.errors import InvalidTypeError, InvalidValueError, PytrackerError
from pytracker.history import ParameterInfo, Points, summarize
from pytracker.store import Run, load_run

LATIN = "/data/\udce9t\udce9"  # as Python gives a path that is not UTF-8
ESCAPED = "/data/\\udce9t\\udce9"


def test_a_text_that_is_not_utf_8_is_escaped_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", LATIN])
    info = ParameterInfo(LATIN, (2,), "float32", LATIN, 2)
    with Run(tmp_path, config={"data": LATIN, LATIN: [LATIN]}) as run:
        run.set_meta(data=LATIN)
        run.set_parameters([info])
        run.log_finding({"rule": LATIN, "first_step": 1, "evidence": LATIN, "parameters": [LATIN], "numbers": {}})
        for step in range(100):
            run.log(step, loss=1.0)
        run.finish("failed", error=f"OSError: {LATIN}")
    stored = load_run(run.path)
    assert len(stored.history["loss"]) == 100
    assert stored.config == {"data": ESCAPED, ESCAPED: [ESCAPED]}
    assert stored.meta == {"data": ESCAPED}
    assert (stored.parameters[0].name, stored.parameters[0].group) == (ESCAPED, ESCAPED)
    assert (stored.findings[0]["rule"], stored.findings[0]["parameters"]) == (ESCAPED, [ESCAPED])
    assert (stored.state, stored.error) == ("failed", f"OSError: {ESCAPED}")
    assert stored.facts["command"] == f"python {ESCAPED}"
    with Run(tmp_path, name=run.name, resume=True) as again:  # the model of the same names
        again.set_parameters([info])


def test_a_working_directory_that_is_not_utf_8_costs_nothing(tmp_path, monkeypatch):
    odd = tmp_path / "d\udce9p\udcf4t"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with Run("runs") as run:
        run.log(0, loss=1.0)
    stored = load_run(run.path)
    assert stored.history["loss"] == [1.0]
    assert stored.facts["working_directory"].endswith("d\\udce9p\\udcf4t")


class Silent:
    """Has no text."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def nested(levels):
    found = []
    for _ in range(levels):
        found = [found]
    return found


def circular():
    found = {"a": 1}
    found["itself"] = found
    return found


@pytest.mark.parametrize(
    "value",
    [circular(), nested(100), nested(5000), 10**5000, -(10**5000), Silent(), {"x": [Silent()]}, "x" * 2**25],
    ids=["circular", "deep", "very deep", "large", "small", "silent", "silent within", "long"],
)
def test_what_has_no_json_is_refused_before_anything_is_made(tmp_path, value):
    with pytest.raises(InvalidValueError, match=r"^config "):
        Run(tmp_path / "runs", name="one", config={"value": value})
    assert not (tmp_path / "runs").exists()
    with Run(tmp_path, name="one") as run:
        with pytest.raises(InvalidValueError, match=r"^meta 'value' "):
            run.set_meta(fine=1, value=value)
        with pytest.raises(InvalidValueError, match=r"^findings 'spike@1:' "):
            run.log_finding({"rule": "spike", "first_step": 1, "extra": value})
        run.log(0, loss=1.0)
    stored = load_run(run.path)
    assert (stored.meta, stored.findings, stored.history.to_dict()) == ({}, [], {"loss": [1.0]})


def test_integers_past_64_bits_are_kept_in_documents_and_leave_columns_empty(tmp_path):
    with Run(tmp_path, config={"seed": 2**200}) as run:
        run.set_meta(seed=2**64)
        run.log_finding({"rule": "spike", "first_step": 1, "numbers": {"count": 2**70}})
    stored = load_run(run.path)
    assert (stored.config, stored.meta, stored.findings[0]["numbers"]) == (
        {"seed": 2**200},
        {"seed": 2**64},
        {"count": 2**70},
    )


def test_steps_of_any_size_come_back_exactly(tmp_path):
    steps = [0, 2**53, 2**53 + 1, 2**62 + 1, 2**63 - 2]
    with Run(tmp_path) as run:
        for step in steps[:3]:
            run.log(step, loss=1.0)
        run.log_many(np.array(steps[3:]), {"loss": [1.0, 2.0]})
        for step in (2**63 - 1, 2**64, 10**400):
            with pytest.raises(InvalidValueError, match=f"step is .*from 0 to {2**63 - 2}"):
                run.log(step, loss=1.0)
        with pytest.raises(InvalidTypeError, match=r"steps is 0\.5"):
            run.log_many([0.5], {"other": [1.0]})
    assert load_run(run.path).history["loss"].steps.tolist() == steps


def test_what_slips_through_is_set_aside_alone_and_named(tmp_path, infos):
    """As if a check had been forgotten: what the writer takes is changed on its way."""
    interval = summarize([0], np.ones((1, 3, 6)), [info.numel for info in infos])
    object.__setattr__(interval, "last_step", 2**64)
    run = Run(tmp_path, name="one")
    run.set_parameters(infos)
    run._pending.add(Points(0, {"bad \ud800": 1.0}, {"bad \ud800": 0}, 0.0))
    run._pending.add(interval)
    for step in range(100):
        run.log(step, loss=1.0, accuracy=0.5)
    run.set_meta(optimizer="SGD")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.finish()
    said = " ".join(str(warning.message) for warning in caught)
    assert "series 'bad \\ud800'" in said
    assert "the interval from step 0" in said
    assert (run.dropped_points, run.dropped_blobs) == (1, 1)
    stored = load_run(run.path)
    assert (stored.state, stored.dropped_points, stored.dropped_blobs) == ("finished", 1, 1)
    assert {name: len(series) for name, series in stored.history.items()} == {"loss": 100, "accuracy": 100}
    assert stored.meta == {"optimizer": "SGD"}
    assert stored.parameters == infos


@pytest.mark.parametrize("seconds", [math.inf, math.nan, -1, 1e12, "2", None, 2j, True])
def test_a_time_that_cannot_be_waited_for_is_refused_and_nothing_changes(tmp_path, seconds):
    with pytest.raises(PytrackerError, match="flush_seconds is"):
        Run(tmp_path / "runs", flush_seconds=seconds)
    assert not (tmp_path / "runs").exists()
    with Run(tmp_path) as run:
        for step in range(1000):
            run.log(step, loss=1.0)
        for act in (run.flush, run.finish):
            with pytest.raises(PytrackerError, match="timeout is"):
                act(timeout=seconds)
        assert run.state == "running"
    stored = load_run(run.path)
    assert (len(stored.history["loss"]), stored.state) == (1000, "finished")


@pytest.mark.parametrize("seconds", [Decimal(2), Fraction(1, 2), np.float32(0.5), np.int64(1), 1])
def test_a_time_may_be_any_real_number(tmp_path, seconds):
    with Run(tmp_path, flush_seconds=seconds) as run:
        run.log(np.int64(0), loss=np.float16(0.5))
        run.flush(timeout=seconds * 20)
        run.finish(timeout=seconds * 20)
    assert load_run(run.path).history["loss"] == [0.5]


HOSTILE = [
    None,
    math.nan,
    math.inf,
    -1,
    10**400,
    "",
    "x\0y",
    b"bytes",
    Fraction(1, 3),
    np.float32(1.5),
    1j,
    [],
    {},
    object(),
]


@pytest.mark.parametrize(
    "call",
    [
        lambda run, value: run.log(value, loss=1.0),
        lambda run, value: run.log({"loss": value}),
        lambda run, value: run.log_many(value, {"loss": [1.0]}),
        lambda run, value: run.log_many([5], value),
        lambda run, value: run.log_many([value], {"loss": [1.0]}),
        lambda run, value: run.log_interval(value),
        lambda run, value: run.log_rows([value], np.zeros((1, 0, 6))),
        lambda run, value: run.log_finding(value),
        lambda run, value: run.log_finding({"rule": value, "first_step": value}),
        lambda run, value: run.set_parameters([value]),
        lambda run, value: run.truncate(value),
        lambda run, value: run.finish(value),
        lambda run, value: run.finish(error=value, timeout=value),
        lambda run, value: run.before_finish(value),
        lambda run, value: Run(value, name=value),
        lambda run, value: Run(run.directory, name=value, max_pending_bytes=value, max_row_bytes=value),
        lambda run, value: load_run(value),
    ],
)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__)
def test_a_hostile_call_gets_an_error_of_pytracker_and_the_run_goes_on(tmp_path, monkeypatch, call, value):
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, name="one")
    run.log(0, kept=1.0)
    with contextlib.suppress(PytrackerError):
        call(run, value)
    if run.state == "running":
        run.log(10, kept=2.0)
        run.finish()
    assert load_run(run.path).history["kept"][0] == 1.0
