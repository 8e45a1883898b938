"""What goes wrong around a tracker: each message has the name and the value, and no row that was recorded is lost."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pytracker import GradientMeter, Run, Tracker, load_run
from pytracker.diagnostics import Diagnosis, Finding
from pytracker.errors import ClosedError, InvalidTypeError, InvalidValueError, ParameterError, SeriesIndexError


def model_with_gradients() -> nn.Linear:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


BAD_STEPS = [
    ({"loss": "low"}, InvalidTypeError, "'loss' is 'low', of type str"),
    ({"loss": [1.0, 2.0]}, InvalidTypeError, "'loss' is [1.0, 2.0], of type list"),
    ({"loss": object}, InvalidTypeError, "'loss' is <class 'object'>"),
    ({"loss": torch.ones(3)}, InvalidValueError, "'loss' is a tensor of shape [3] with 3 elements"),
    ({"loss": torch.ones(())[None][:0]}, InvalidValueError, "'loss' is a tensor of shape [0] with 0 elements"),
    ({"loss": torch.tensor(1j)}, InvalidValueError, "'loss' is complex"),
    ({"fine": 1.0, "z": torch.ones(2)}, InvalidValueError, "'z' is a tensor"),
    ({"grad_norm": 1.0}, InvalidValueError, "'grad_norm' is recorded by pytracker itself"),
    ({"lr": 1.0}, InvalidValueError, "'lr' is recorded by pytracker itself"),
    ({"epoch": 1}, InvalidValueError, "'epoch' is recorded by pytracker itself"),
    ({"n": "many"}, InvalidTypeError, "n is 'many', of type str"),
    ({"n": torch.tensor(3)}, InvalidTypeError, "n is tensor(3), of type Tensor"),
    ({"n": -1}, InvalidValueError, "n is -1; expected a number of samples, 0 or more"),
    ({"n": float("nan")}, InvalidValueError, "n is nan"),
    ({"loss": 10**400}, InvalidTypeError, "'loss' is 1000"),
    ({"": 1.0}, InvalidValueError, "a printable name, got ''"),
    ({"a\nb": 1.0}, InvalidValueError, r"a printable name, got 'a\nb'"),
    ({"\ud800": 1.0}, InvalidValueError, r"a printable name, got '\ud800'"),
    ({"grad_scale": 0.0}, InvalidValueError, "'grad_scale' is 0"),
    ({"grad_scale": "big"}, InvalidTypeError, "'grad_scale' is 'big', of type str"),
    ({"grad_scale": torch.ones(2)}, InvalidValueError, "'grad_scale' is a tensor"),
    (
        {"grad_scale": torch.amp.GradScaler("cpu")},
        InvalidTypeError,
        "grad_scale is a GradScaler; give its scale, scaler.g",
    ),
    (
        {"losses": {"a": 1.0}},
        InvalidTypeError,
        "'losses' is {'a': 1.0}, of type dict; expected a number; give those of",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "named"), BAD_STEPS, ids=[named for _, _, named in BAD_STEPS])
def test_a_scalar_that_cannot_be_recorded_is_named_and_nothing_else_is_lost(arguments, error, named: str) -> None:
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, optimizer=optimizer, every=4, diagnosis=None) as tracker:
        for step in range(6):
            if step == 3:
                with pytest.raises(error, match=re.escape(named)):
                    tracker.step(**arguments)
            else:
                tracker.step(loss=step)
    assert tracker.history["loss"].steps.tolist() == [0, 1, 2, 4, 5]
    assert len(tracker.history["grad_norm"]) == 5
    assert tracker.history.parameters.rows()[0].tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("wrong", [{"loss": 3.0, "n": -1}, {"loss": "3"}])
def test_a_step_that_cannot_be_recorded_takes_its_micro_batches_with_it(wrong) -> None:
    with Tracker(model_with_gradients(), diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        tracker.step(loss=7.0, when=False)
        with pytest.raises((InvalidTypeError, InvalidValueError)):
            tracker.step(**wrong)
        tracker.step(loss=2.0)
    assert (tracker.history["loss"].steps.tolist(), tracker.history["loss"][:]) == ([0, 2], [1.0, 2.0])


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5), {"loss": 0.5}])
def test_a_loss_without_its_name_is_refused_and_not_taken_for_something_else(loss) -> None:
    with Tracker(model_with_gradients(), diagnosis=None) as tracker:
        with pytest.raises(InvalidTypeError, match=r"without one: tracker.step\(loss=loss"):
            tracker.step(loss)
        tracker.step(loss=1.0)
    assert tracker.history["loss"][:] == [1.0]


def unnamed_calls(tracker: Tracker, run: Run) -> list[tuple[Callable[[], object], str]]:
    model, optimizer = nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return [
        (lambda: tracker.step({"loss": 1.0}), r"tracker.step\(loss=loss, n=len\(x\)\); put \*\* before a dictionary"),
        (lambda: tracker.log({"val_loss": 1.0}), r"tracker.log\(val_loss=0.5\); put \*\* before a dictionary"),
        (lambda: tracker.log(0.5), r"got 0.5 without one: tracker.log\(val_loss=0.5\)"),
        (lambda: tracker.epoch({"val_loss": 1.0}), r"tracker.epoch\(val_loss=0.5\); put \*\* before a dictionary"),
        (lambda: tracker.epoch(3), r"got 3 without one: tracker.epoch\(val_loss=0.5\)"),
        (lambda: run.log({"loss": 1.0}), r"run.log\(step, \*\*metrics\)"),
        (lambda: run.log({"loss": 1.0}, step=3), r"run.log\(step, \*\*metrics\)"),
        (lambda: run.log(3, {"loss": 1.0}), r"run.log\(step, loss=0.5\); put \*\* before a dictionary"),
        (lambda: run.log("loss", 1.0), r"got 1.0 without one: run.log\(step, loss=0.5\)"),
        (lambda: run.log(loss=1.0), "run.log.. needs the step, first and without a name"),
        (lambda: run.log(step=3, loss=1.0), "run.log.. needs the step, first and without a name"),
        (lambda: run.log(), "run.log.. needs the step, first and without a name"),
        (lambda: run.log(None, loss=1.0), "run.log.. needs the step, first and without a name"),
        (lambda: Tracker(model, optimizer, run), r"Tracker\(model, optimizer, run="),
        (lambda: Tracker(model, None, "runs", 50), r"got 'runs', 50 without one: Tracker\("),
        (lambda: Run("runs", "second"), r"got 'second' without one: Run\(directory, name="),
        (lambda: GradientMeter(model, 50), r"got 50 without one: GradientMeter\(target, every=50\)"),
    ]


@pytest.mark.parametrize("number", range(17))
def test_what_has_no_name_is_refused_with_the_call_that_was_meant(number: int, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run("runs", name="first") as run, Tracker(model_with_gradients(), diagnosis=None) as tracker:
        calls = unnamed_calls(tracker, run)
        assert len(calls) == 17
        call, named = calls[number]
        with pytest.raises(InvalidTypeError, match=named):
            call()
    assert (tracker.steps, list(tracker.history), list(run.history)) == (0, [], [])
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["first"]


def test_a_metric_and_a_scalar_of_the_steps_never_share_a_series() -> None:
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, optimizer, diagnosis=None) as tracker:
        for name in ("lr", "grad_norm", "epoch", "step"):
            with pytest.raises(InvalidValueError, match=f"'{name}' is recorded on each step already"):
                tracker.log(**{name: 1.0})
        tracker.log(loss=9.0)  # validation before training
        with pytest.raises(InvalidValueError, match=r"'loss' is recorded by pytracker itself, or by log\(\)"):
            tracker.step(loss=1.0)
        tracker.step(train_loss=1.0)
        tracker.epoch(loss=8.0, accuracy=0.5)
        tracker.log(loss=7.0)
        for name in ("loss", "accuracy", "epoch"):
            with pytest.raises(InvalidValueError, match=f"'{name}' is recorded by pytracker itself, or by log"):
                tracker.step(**{name: 1.0})
        for call in (tracker.log, tracker.epoch):
            for name in ("train_loss", "epoch", "lr"):
                with pytest.raises(InvalidValueError, match=f"'{name}' is recorded on each step already"):
                    call(**{name: 1.0})
    assert tracker.history["loss"][:] == [9.0, 8.0, 7.0]
    assert tracker.history["train_loss"][:] == [1.0]
    assert tracker.history["epoch"][:] == [1.0]


def test_an_optimizer_of_another_model_is_said_to_be_one() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with (
        pytest.warns(RuntimeWarning, match="the optimizer has none of the parameters that are tracked") as caught,
        Tracker(model_with_gradients(), optimizer=optimizer, diagnosis=None) as tracker,
    ):
        tracker.step(loss=1.0)
    assert caught[0].filename == __file__
    assert tracker.history["lr"][:] == [0.1]


def test_parameters_that_the_optimizer_does_not_train_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match=r"4 of 6 parameters that .*: '1.weight', '1.bias', '2.weight', '2.bias';"):
        Tracker(model, optimizer=optimizer, diagnosis=None).close()


def test_a_model_that_its_optimizer_trains_is_worth_no_warning(recwarn) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    Tracker(model, optimizer=optimizer, diagnosis=None).close()
    assert [str(warning.message) for warning in recwarn] == []


def test_gradients_are_no_model() -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(InvalidTypeError, match="the target holds gradients"):
        Tracker(torch.autograd.grad(weight.sum(), [weight]))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_tracker_says_that_it_cannot_be_copied(copied) -> None:
    with (
        Tracker(model_with_gradients(), diagnosis=None) as tracker,
        pytest.raises(InvalidTypeError, match="a Tracker cannot be pickled or copied"),
    ):
        copied(tracker)


BAD_ARGUMENTS = [
    ({"check_replicas": "yes"}, InvalidTypeError, "check_replicas is 'yes', of type str; expected True or False"),
    ({"noise_scale": 0.5}, InvalidTypeError, "noise_scale is 0.5, of type float; expected a GradientNoiseScale"),
    ({"optimizer": 0.1}, InvalidTypeError, "optimizer is 0.1, of type float; expected one with param_groups"),
    ({"diagnosis": "strict"}, InvalidTypeError, "diagnosis is 'strict', of type str; expected a Diagnosis"),
    ({"on_finding": 3}, InvalidTypeError, "on_finding is 3, of type int; expected a function"),
    ({"sinks": 5}, InvalidTypeError, "sinks is 5, of type int; expected a list of sinks"),
    ({"meta": [1, 2]}, InvalidTypeError, "meta is [1, 2], of type list; expected a dictionary"),
    ({"meta": {1: 2}}, InvalidTypeError, "meta is {1: 2}, of type dict; expected a dictionary of names"),
    ({"meta": {"seed": 10**5000}}, InvalidValueError, "meta 'seed' has an integer of 16610 bits"),
    ({"process_group": 3}, InvalidTypeError, "process_group is 3, of type int; expected a torch.distributed"),
    ({"process_group": -100}, InvalidValueError, "process_group is one that this rank is not in"),
    ({"rank_timeout": "long"}, InvalidTypeError, "rank_timeout is 'long', of type str; expected a number of seconds"),
    ({"rank_timeout": 0}, InvalidValueError, "rank_timeout is 0; expected a number of seconds above 0"),
    ({"rank_timeout": float("inf")}, InvalidValueError, "rank_timeout is inf"),
    ({"every": 0}, InvalidValueError, "every is 0"),
]


@pytest.mark.parametrize(("arguments", "error", "named"), BAD_ARGUMENTS, ids=[named for _, _, named in BAD_ARGUMENTS])
def test_an_argument_that_is_wrong_is_named_and_begins_no_run(arguments, error, named: str, tmp_path) -> None:
    with pytest.raises(error, match=re.escape(named)):
        Tracker(model_with_gradients(), run=tmp_path / "runs", **arguments)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_cannot_take_the_parameters_is_marked_as_failed(tmp_path) -> None:
    class Refusing(Run):
        def set_parameters(self, infos) -> None:
            raise OSError("the disk is gone")

    run = Refusing(tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        Tracker(model_with_gradients(), run=run)
    assert (load_run(run.path).state, load_run(run.path).error) == ("failed", "OSError: the disk is gone")


def test_more_scalars_than_a_row_can_hold_are_refused_by_number() -> None:
    with Tracker(model_with_gradients(), every=3, diagnosis=None) as tracker:
        tracker.step(loss=1)
        with pytest.raises(InvalidValueError, match="more than 64 different scalars"):
            tracker.step(**{f"s{k}": k for k in range(65)})
        tracker.step(loss=2)
    assert tracker.history["loss"][:] == [1, 2]


def test_a_parameter_without_a_shape_is_named() -> None:
    with pytest.raises(ParameterError, match="parameter 'weight' has no shape yet; run the model once"):
        Tracker(nn.LazyLinear(2), diagnosis=None)


def test_an_optimizer_whose_groups_are_no_list_is_named() -> None:
    class Strange:
        param_groups = ({"params": [], "lr": 0.1},)

    tracker = Tracker(model_with_gradients(), optimizer=Strange(), diagnosis=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="param_groups is of type tuple"):
        tracker.step(loss=1)


def test_a_model_that_changes_after_its_last_step_spoils_nothing() -> None:
    model = nn.Sequential(model_with_gradients())
    tracker = Tracker(model, every=50, diagnosis=None)
    for step in range(3):
        tracker.step(loss=step)
    del model[0]
    with pytest.warns(RuntimeWarning, match="gone: '0.weight'"):
        tracker.close()
    assert tracker.history["loss"][:] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.add_module("extra", nn.Linear(1, 1)), "new: 'extra.weight'; new: 'extra.bias'"),
        (lambda model: model.__delattr__("0"), "gone: '0.weight'; gone: '0.bias'"),
        (lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(1))), "replaced"),
    ],
)
def test_a_model_whose_parameters_change_is_noticed_at_the_next_drain(change, named: str) -> None:
    model = nn.Sequential(model_with_gradients())
    tracker = Tracker(model, every=2, diagnosis=None)
    tracker.step(loss=0)
    change(model)
    with pytest.raises(ParameterError, match=re.escape(named)):
        tracker.step(loss=1)
    tracker.step(loss=2)
    tracker.close()
    assert tracker.history["loss"][:] == [0, 1, 2]


def test_a_model_that_gets_another_activation_is_still_the_same() -> None:
    model = nn.Sequential(model_with_gradients(), nn.ReLU())
    with Tracker(model, every=2, diagnosis=None) as tracker:
        for step in range(6):
            if step == 3:
                model[1] = nn.GELU()
            tracker.step(loss=step)
    assert tracker.history["loss"][:] == list(range(6))


@pytest.mark.parametrize("call", [lambda t: t.step(), lambda t: t.epoch(), lambda t: t.replayed()])
def test_a_closed_tracker_says_so(call) -> None:
    tracker = Tracker(model_with_gradients(), diagnosis=None)
    tracker.step(loss=1)
    tracker.close()
    tracker.close()
    with pytest.raises(ClosedError, match="the tracker is closed"):
        call(tracker)
    assert tracker.history["loss"][:] == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"model": 3}, InvalidTypeError, "the target is 3, of type int"),
        ({"optimizer": "adam"}, InvalidTypeError, "optimizer is 'adam', of type str"),
        ({"every": 0}, InvalidValueError, "every is 0"),
        ({"every": "often"}, InvalidTypeError, "every is 'often', of type str"),
        ({"diagnosis": 5}, InvalidTypeError, "diagnosis is 5"),
    ],
)
def test_a_tracker_that_cannot_be_made_says_why(arguments, error, named: str) -> None:
    with pytest.raises(error, match=named):
        Tracker(**{"model": model_with_gradients(), **arguments})


@pytest.mark.parametrize("metric", ["x", None, [1.0]])
def test_an_epoch_metric_that_is_no_number_is_named(metric) -> None:
    with Tracker(model_with_gradients(), diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        if metric is None:
            tracker.epoch(val_loss=metric)
        else:
            with pytest.raises(InvalidTypeError, match="'val_loss' is"):
                tracker.epoch(val_loss=metric)
        with pytest.raises(InvalidValueError, match="'loss' is recorded on each step already"):
            tracker.epoch(loss=2.0)
    assert "val_loss" not in tracker.history


def test_a_state_of_something_else_is_refused() -> None:
    with (
        Tracker(model_with_gradients(), diagnosis=None) as tracker,
        pytest.raises(InvalidValueError, match=r"expected what Tracker.state_dict"),
    ):
        tracker.load_state_dict({"step": 3})


def test_training_without_gradients_is_told_once() -> None:
    model = nn.Linear(2, 1)
    with Tracker(model, every=2, diagnosis=None) as tracker:
        tracker.step()
        with pytest.warns(
            RuntimeWarning, match=r"no parameter had a gradient in steps 0 to 1; call tracker.step\(\) after"
        ):
            tracker.step()
        tracker.step()
        tracker.step()


def test_findings_reach_the_callback_the_tracker_and_the_history() -> None:
    model = model_with_gradients()
    told: list[Finding] = []
    with Tracker(model, every=10, diagnosis=Diagnosis(["gradient_nonfinite"]), on_finding=told.append) as tracker:
        for step in range(20):
            if step == 13:
                model.bias.grad = torch.tensor([float("nan")])
            tracker.step(loss=1.0)
    (finding,) = tracker.findings
    assert (finding.rule, finding.first_step, finding.parameters) == ("gradient_nonfinite", 13, ("bias",))
    assert told[-1] == finding
    assert tracker.history.findings[-1]["first_step"] == 13


def test_reading_a_series_before_its_rows_arrive_says_how_many_are_on_their_way_and_names_flush() -> None:
    model = nn.Linear(2, 1)
    with Tracker(model, every=100, diagnosis=None) as tracker:
        for step in range(7):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            tracker.step(loss=float(step))
        with pytest.raises(
            SeriesIndexError, match=r"'loss' has no value.* 7 steps are still on the way: call flush\(\)"
        ):
            tracker.history["loss"][-1]
        tracker.flush()
        assert tracker.history["loss"][-1] == 6.0
        with pytest.raises(SeriesIndexError, match=r"'lss' has no value; there are grad_norm, .*loss$"):
            tracker.history["lss"][-1]
