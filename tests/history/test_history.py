"""History and Series: the usual dict-of-lists code, and the steps besides."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import operator
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytracker.errors import InvalidTypeError, InvalidValueError, PytrackerError, SeriesIndexError
from pytracker.history import History, Series

floats = st.floats(allow_nan=False, width=64)


def record_epochs(history):
    """The loop that people have in their scripts, as it stands there."""
    best = 0.0
    for epoch in range(5):
        history["epoch"].append(epoch)
        history["train_loss"].append(1.0 / (epoch + 1))
        history["val_accuracy"].append(0.5 + epoch / 10)
        if history["val_accuracy"][-1] > best:
            best = history["val_accuracy"][-1]
    history["lr"] = [0.1] * 5
    history["lr"][-1] = 0.01
    history["val_accuracy"] += [1.0]
    return {
        "best": best,
        "last three": sum(history["train_loss"][-3:]) / len(history["train_loss"][-3:]),
        "worst": max(history["train_loss"]),
        "index of best": history["val_accuracy"].index(max(history["val_accuracy"])),
        "lengths": {name: len(values) for name, values in history.items()},
        "pairs": list(zip(history["epoch"], history["train_loss"], strict=True)),
        "joined": history["train_loss"] + history["lr"],
        "reversed": list(reversed(history["train_loss"])),
        "sorted": sorted(history["train_loss"]),
        "mean": float(np.mean(history["train_loss"])),
        "array": (np.array(history["lr"]) * 2).tolist(),
        "has": "lr" in history and "nothing" not in history,
        "first": [values[0] for values in history.values()],
    }


def test_a_dict_of_lists_and_a_history_give_the_same_results():
    lists = {"epoch": [], "train_loss": [], "val_accuracy": []}
    assert record_epochs(History(epoch=[], train_loss=[], val_accuracy=[])) == record_epochs(lists)


def test_an_unseen_name_joins_with_its_first_value():
    history = History()
    series = history["loss"]
    assert "loss" not in history
    assert len(history) == 0
    assert history.get("loss") is None
    assert history["loss"] is series
    series.append(1.5)
    assert history["loss"] is series
    assert list(history) == ["loss"]


def test_reading_a_series_that_holds_nothing_names_the_series_that_there_are():
    history = History(loss=[1.0], grad_norm=[2.0])
    with pytest.raises(SeriesIndexError, match=r"series 'lss' has no value; there are loss, grad_norm$"):
        history["lss"][-1]
    with pytest.raises(SeriesIndexError, match="nothing is recorded yet"):
        History()["loss"][0]
    with pytest.raises(IndexError, match="series 'loss': index 1 is out of range, there are 1 values"):
        history["loss"][1]
    assert list(history) == ["loss", "grad_norm"]


def test_reading_a_series_whose_rows_are_on_their_way_says_so_and_names_flush():
    history = History()
    for waiting, said in ((12, "12 steps are"), (1, "; 1 step is")):
        history.waiting = lambda waiting=waiting: waiting
        with pytest.raises(SeriesIndexError, match=rf"{said} still on the way: call flush\(\)"):
            history["loss"][-1]
    assert len(pickle.loads(pickle.dumps(history))) == 0


@pytest.mark.parametrize("step", [math.nan, 1.5, "1", None, -1, 2**63 - 1, 10**400, True])
def test_a_step_that_cannot_be_adds_nothing(step):
    series = Series([1.0])
    if step is not None:
        with pytest.raises(PytrackerError, match="step is"):
            series.append(9.0, step=step)
    with pytest.raises(PytrackerError):
        series.extend([9.0], steps=[step])
    with pytest.raises(PytrackerError):
        History().truncate(step)
    assert (series[:], series.steps.tolist()) == ([1.0], [0])


def test_there_is_no_step_after_the_largest():
    series = Series([1.0], steps=[2**63 - 2], name="loss")
    for add in (series.append, lambda value: series.extend([value]), lambda value: series.insert(0, value)):
        with pytest.raises(InvalidValueError, match="there is no step after 9223372036854775806"):
            add(1.0)
    series.append(2.0, step=2**63 - 2)
    assert series.steps.tolist() == [2**63 - 2] * 2


def test_setdefault_pop_del_and_update_are_those_of_a_dict():
    history = History({"a": [1]}, b=[2])
    history.setdefault("c", []).append(3)
    history.setdefault("a", [9])
    history.update(d=[4])
    assert history.to_dict() == {"a": [1.0], "b": [2.0], "c": [3.0], "d": [4.0]}
    assert history.pop("a") == [1.0]
    assert history.pop("a", None) is None
    del history["b"]
    with pytest.raises(KeyError):
        del history["b"]
    with pytest.raises(KeyError):
        history.pop("b")
    assert list(history) == ["c", "d"]


def test_json_pickle_deepcopy_and_copy_keep_everything():
    history = History(loss=[1.0, 0.5])
    history["accuracy"].append(0.25, step=40)
    history["asked for only"]  # asking leaves nothing behind
    history.meta["optimizer"] = "SGD"
    history.findings.append({"rule": "spike", "first_step": 1})
    for other in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history), copy.copy(history)):
        assert other == history
        assert other["accuracy"].steps.tolist() == [40]
        assert other.meta == {"optimizer": "SGD"}
        assert other.findings == history.findings
        assert list(other) == ["loss", "accuracy"]
    assert json.loads(json.dumps(history.to_dict())) == {"loss": [1.0, 0.5], "accuracy": [0.25]}


def test_a_deep_copy_has_values_of_its_own():
    history = History(loss=[1.0])
    copy.deepcopy(history)["loss"].append(2.0)
    assert history["loss"] == [1.0]


def test_to_pandas_aligns_series_by_step_and_keeps_the_last_value_of_a_step():
    pytest.importorskip("pandas", reason="to_pandas needs pandas")
    history = History(loss=[3.0, 2.0, 1.0])
    history["val_loss"].extend([9.0, 8.0], steps=[2, 2])
    frame = history.to_pandas()
    assert frame.index.name == "step"
    assert frame["loss"].tolist() == [3.0, 2.0, 1.0]
    assert frame["val_loss"].tolist()[2] == 8.0
    assert frame["val_loss"].isna().tolist() == [True, True, False]


def test_to_dict_makes_a_data_frame():
    pandas = pytest.importorskip("pandas", reason="DataFrame needs pandas")
    history = History(a=[1, 2], b=[3, 4])
    assert pandas.DataFrame(history.to_dict()).to_numpy().tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_matplotlib_style_access_gets_an_array():
    series = Series([1.0, 2.0])
    array = np.asarray(series)
    array[0] = 9.0  # a copy: plotting code may do what it likes with it
    assert series == [1.0, 2.0]
    assert np.asarray(series, np.float32).dtype == np.float32


def test_adding_an_array_adds_numbers_as_it_does_to_a_list():
    series, ones = Series([1.0, 2.0]), np.ones(2)
    assert operator.add(series, ones).tolist() == operator.add([1.0, 2.0], ones).tolist() == [2.0, 3.0]
    assert operator.add(ones, series).tolist() == [2.0, 3.0]
    assert operator.add([0.0], series) == [0.0, 1.0, 2.0]
    with pytest.raises(TypeError):
        operator.add(series, (1.0,))


def test_views_are_read_only_and_survive_growth():
    series = Series([1.0, 2.0])
    view = series.values
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 5.0
    series.extend(range(1000))
    assert view.tolist() == [1.0, 2.0]


def test_steps_follow_on_and_may_repeat_but_never_go_back():
    series = Series(name="loss")
    series.append(1.0)
    series.append(2.0, step=10)
    series.append(3.0, step=10)
    series.append(4.0)
    assert series.steps.tolist() == [0, 10, 10, 11]
    with pytest.raises(
        InvalidValueError, match=r"'loss': step 5 comes before the last recorded step 11; truncate\(5\)"
    ):
        series.append(5.0, step=5)
    with pytest.raises(InvalidValueError, match="step 12 comes before step 20"):
        series.extend([1.0, 2.0], steps=[20, 12])
    assert series == [1.0, 2.0, 3.0, 4.0]


def test_a_refused_value_changes_nothing():
    series = Series([1.0], name="loss")
    with pytest.raises(InvalidTypeError, match=r"series 'loss' is '0\.5', of type str; expected a number"):
        series.append("0.5")
    with pytest.raises(InvalidTypeError, match="series 'loss' is None, of type NoneType; expected a number"):
        series.extend([2.0, None])
    with pytest.raises(InvalidValueError, match="got 2 values and 1 steps"):
        series.extend([1.0, 2.0], steps=[5])
    with pytest.raises(InvalidValueError, match=r"a series has a printable name, got 'a\\nb'"):
        History()["a\nb"]
    with pytest.raises(InvalidTypeError, match="a series has a str for a name, got int 3"):
        History()[3]
    assert series == [1.0]


def test_a_slice_is_replaced_by_as_many_values():
    series = Series([1.0, 2.0, 3.0])
    series[:2] = [8.0, 9.0]
    assert series == [8.0, 9.0, 3.0]
    with pytest.raises(InvalidValueError, match="a slice of 1 values can't be replaced by 2"):
        series[:1] = [1.0, 2.0]


def test_truncate_forgets_a_step_and_what_follows():
    history = History(loss=range(10))
    history["val_loss"].extend([1.0, 2.0], steps=[3, 7])
    history.findings = [{"first_step": 2}, {"first_step": 7}]
    history.truncate(7)
    assert history["loss"].steps.tolist() == list(range(7))
    assert history["val_loss"] == [1.0]
    assert history.findings == [{"first_step": 2}]
    assert history.last_step == 6


ACTIONS = ["append", "insert", "del", "pop", "set", "extend", "clear", "reverse"]


def edit(target, action, value, index):
    if action == "append":
        target.append(value)
    elif action == "insert":
        target.insert(index, value)
    elif action == "del":
        del target[index]
    elif action == "set":
        target[index] = value
    elif action == "extend":
        target.extend([value, value])
    else:
        getattr(target, action)()


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), floats, st.integers(-6, 6))))
def test_any_sequence_of_edits_equals_that_on_a_list(edits):
    series, plain = Series(), []
    for action, value, index in edits:
        for target in (series, plain):
            with contextlib.suppress(IndexError):
                edit(target, action, value, index)
        assert series == plain
        assert (np.diff(series.steps) >= 0).all()
        assert len(series.steps) == len(plain)


@given(st.lists(floats), st.slices(10))
def test_slices_equal_those_of_a_list(values, part):
    assert Series(values)[part] == values[part]


def test_the_record_imports_no_torch():
    code = "import sys, pytracker.history; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
