"""Everything public, called with what no one should give it: it works, or an error of pytracker names the argument."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pytracker
from pytracker.diagnostics import RULES, Rule
from pytracker.errors import InvalidTypeError, PytrackerError


class Raising:
    """Raises in whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __float__ = __index__ = __bool__ = __hash__ = __repr__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a bool": lambda: True,
    "text": lambda: "x",
    "no text": lambda: "",
    "a lone surrogate": lambda: "\udce9",
    "a NUL": lambda: "a\0b",
    "long text": lambda: "x" * 100_000,
    "bytes": lambda: b"x",
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "a negative integer": lambda: -1,
    "a fraction of one": lambda: 0.5,
    "a large integer": lambda: 2**63,
    "an integer that no float holds": lambda: 10**400,
    "an integer too long to print": lambda: 10**5000,
    "a large float": lambda: 1e308,
    "a complex number": lambda: 1j,
    "a Fraction": lambda: Fraction(1, 3),
    "a Decimal": lambda: Decimal("NaN"),
    "an int64": lambda: np.int64(3),
    "a float32": lambda: np.float32(0.5),
    "a complex64": lambda: np.complex64(1j),
    "a str_": lambda: np.str_("x"),
    "a datetime64": lambda: np.datetime64("2026-01-01"),
    "an array": lambda: np.ones(3),
    "an array of objects": lambda: np.array([object(), None]),
    "an empty list": list,
    "a list of integers": lambda: [1],
    "a deep list": lambda: nested(100_000),
    "a dictionary": lambda: {1: 2},
    "an object": object,
    "an object that raises": Raising,
    "a class": lambda: int,
    "a tensor of two": lambda: torch.ones(2),
    "a complex tensor": lambda: torch.tensor(1j),
    "a tensor without data": lambda: torch.ones((), device="meta"),
    "a sparse tensor": lambda: torch.ones(1).to_sparse(),
    "a module": lambda: nn.ReLU(),
}

Call = tuple[Callable[..., Any], dict[str, Any]]


def model_with_gradients() -> nn.Linear:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


def meter() -> pytracker.AverageMeter:
    filled = pytracker.AverageMeter()
    filled.update(2.0)
    return filled


def assigning(name: str) -> Callable[[Path], Call]:
    return lambda _: (lambda **given: setattr(meter(), name, given[name]), {name: 1.0})


def a_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.csv"
    path.write_text("step,training loss\n" + "".join(f"{step},{1 / (step + 1)}\n" for step in range(20)))
    return path


OPEN: list[pytracker.Tracker | pytracker.Run] = []


def close_all() -> None:
    while OPEN:
        opened = OPEN.pop()
        opened.close() if isinstance(opened, pytracker.Tracker) else opened.finish()


def gradient_meter() -> pytracker.GradientMeter:
    made = pytracker.GradientMeter(model_with_gradients())
    made.update()
    return made


def tracker() -> pytracker.Tracker:
    OPEN.append(pytracker.Tracker(model_with_gradients(), diagnosis=None))
    return OPEN[-1]


def stepped() -> pytracker.Tracker:
    made = tracker()
    made.step()
    return made


CLIP_RULES = {
    "AGC": pytracker.AGC,
    "AutoClip": pytracker.AutoClip,
    "ClipRule": pytracker.ClipRule,
    "MaxNorm": lambda: pytracker.MaxNorm(1.0),
    "ZClip": pytracker.ZClip,
}


def tracker_arguments(folder: Path) -> dict[str, Any]:
    return {
        "model": model_with_gradients(),
        "optimizer": None,
        "run": folder / "runs",
        "every": 2,
        "diagnosis": None,
        "on_finding": None,
        "sinks": [],
        "meta": {"clip_threshold": 1.0},
        "process_group": None,
        "rank_timeout": 300.0,
        "seconds": 2.0,
        "check_replicas": False,
        "noise_scale": None,
        "grad_scaler": None,
        "gradient": None,
        "close_on_signal": False,
    }


def recorded(folder: Path) -> pytracker.Run:
    run = pytracker.Run(folder / "recorded")
    OPEN.append(run)
    run.log(0, loss=1.0)
    return run


def make_and_step(**arguments: Any) -> None:
    with pytracker.Tracker(**arguments) as made:
        made.step(loss=1.0)
        made.step(loss=2.0)


def make_and_log(**arguments: Any) -> None:
    run = pytracker.Run(**arguments)
    run.log(0, loss=1.0)
    run.finish()


def finding() -> pytracker.Finding:
    return pytracker.Finding("rule", "warning", 0, 3, "evidence")


CALLS: dict[str, Callable[[Path], Call]] = {
    "AverageMeter": lambda _: (pytracker.AverageMeter, {"name": "Loss", "fmt": ":.4e"}),
    "AverageMeter.update": lambda _: (meter().update, {"val": 1.0, "n": 1}),
    "AverageMeter.load_state_dict": lambda _: (meter().load_state_dict, {"state": meter().state_dict()}),
    "AverageMeter.val": assigning("val"),
    "AverageMeter.sum": assigning("sum"),
    "AverageMeter.count": assigning("count"),
    "AverageMeter.avg": assigning("avg"),
    "CSVSink": lambda folder: (pytracker.CSVSink, {"path": folder / "a.csv", "per_parameter": None, "depth": None}),
    "Diagnosis": lambda _: (pytracker.Diagnosis, {"rules": None, "settings": None}),
    "Diagnosis.update": lambda _: (
        pytracker.Diagnosis().update,
        {"history": pytracker.History(loss=[1.0, 2.0]), "stop": None, "again": False},
    ),
    "Finding.merge": lambda _: (finding().merge, {"later": finding()}),
    "Finding.withdraw": lambda _: (finding().withdraw, {"why": "it moves again"}),
    "Finding.from_dict": lambda _: (pytracker.Finding.from_dict, {"values": finding().to_dict()}),
    "GradientMeter": lambda _: (pytracker.GradientMeter, {"target": model_with_gradients(), "every": 2}),
    "GradientMeter.compute": lambda _: (gradient_meter().compute, {"per_parameter": False}),
    "GradientStats.to_dict": lambda _: (
        pytracker.gradient_stats(model_with_gradients()).to_dict,
        {"per_parameter": False},
    ),
    "History": lambda _: (lambda series, **named: pytracker.History(series, **named), {"series": {}, "loss": [1.0]}),
    "History.truncate": lambda _: (pytracker.History(loss=[1.0]).truncate, {"step": 0}),
    "Run": lambda folder: (
        make_and_log,
        {
            **{"directory": folder, "name": "a", "config": {}, "flush_seconds": 2.0, "max_pending_bytes": 1 << 20},
            **{"resume": False, "every_step": False, "max_row_bytes": 1 << 20},
        },
    ),
    "Run.log": lambda folder: (
        lambda step, **metrics: recorded(folder).log(step, **metrics),
        {"step": 3, "loss": 1.0},
    ),
    "Run.log_many": lambda folder: (recorded(folder).log_many, {"steps": [1], "metrics": {"loss": [1.0]}}),
    "Run.set_meta": lambda folder: (recorded(folder).set_meta, {"fact": 1}),
    "Run.log_finding": lambda folder: (recorded(folder).log_finding, {"finding": finding().to_dict()}),
    "Run.truncate": lambda folder: (recorded(folder).truncate, {"step": 0}),
    "Run.flush": lambda folder: (recorded(folder).flush, {"timeout": 30.0}),
    "Run.finish": lambda folder: (
        recorded(folder).finish,
        {"state": "finished", "error": None, "timeout": 10.0},
    ),
    "Tracker": lambda folder: (make_and_step, tracker_arguments(folder)),
    "Tracker.every": lambda _: (lambda every: setattr(tracker(), "every", every), {"every": 3}),
    "Tracker.step": lambda _: (
        tracker().step,
        {"n": 1, "when": True, "gradients": None, "clip": 1.0, "loss": 1.0, "grad_scale": 1.0},
    ),
    "Tracker.clip": lambda _: (stepped().clip, {"max_norm": 1.0, "norm_type": 2.0}),
    "Tracker.log": lambda _: (tracker().log, {"val_loss": 1.0}),
    "Tracker.epoch": lambda _: (tracker().epoch, {"val_loss": 1.0}),
    "Tracker.close": lambda _: (tracker().close, {"error": None}),
    "Tracker.load_state_dict": lambda _: (tracker().load_state_dict, {"state": {"steps": 0, "epochs": 0}}),
    "MaxNorm": lambda _: (pytracker.MaxNorm, {"max_norm": 1.0, "norm_type": 2.0}),
    "ZClip": lambda _: (pytracker.ZClip, {"alpha": 0.97, "z": 2.5, "warmup": 25}),
    "AutoClip": lambda _: (pytracker.AutoClip, {"percentile": 10.0, "window": 10}),
    "AGC": lambda _: (pytracker.AGC, {"clipping": 0.01, "eps": 1e-3}),
    **{
        f"{name}.load_state_dict": lambda _, rule=rule: (rule().load_state_dict, {"state": rule().state_dict()})
        for name, rule in CLIP_RULES.items()
    },
    "locate_nonfinite": lambda _: (
        pytracker.locate_nonfinite,
        {"model": model_with_gradients(), "step_function": lambda: None},
    ),
    "clip_grad_norm_": lambda _: (
        pytracker.clip_grad_norm_,
        {
            **{"parameters": model_with_gradients(), "max_norm": 1.0, "norm_type": 2.0},
            **{"error_if_nonfinite": False, "foreach": None},
        },
    ),
    "compare": lambda folder: (pytracker.compare, {"runs": [recorded(folder).path], "thresholds": None}),
    "compute_gradient_stats": lambda _: (pytracker.compute_gradient_stats, {"model": model_with_gradients()}),
    "diagnose": lambda _: (
        pytracker.diagnose,
        {"history": pytracker.History(loss=[1.0]), "rules": None, "settings": None},
    ),
    "gradient_stats": lambda _: (pytracker.gradient_stats, {"target": model_with_gradients(), "grad_scale": 1.0}),
    "read_log": lambda folder: (pytracker.read_log, {"path": a_log(folder), "names": {"loss": "training loss"}}),
    "report": lambda folder: (pytracker.report, {"runs": recorded(folder).path}),
    "list_runs": lambda folder: (pytracker.list_runs, {"directory": folder}),
    "load_run": lambda folder: (pytracker.load_run, {"run": recorded(folder).path, "directory": folder}),
}

CALLED_BY_OTHERS = {
    "a tracker calls it, with what it made": (
        "CSVSink.open",
        "CSVSink.write",
        "CSVSink.late",
        "CSVSink.truncate",
        "Run.set_parameters",
        "Run.log_interval",
        "Run.log_rows",
        "Run.take_rows",
        "Run.before_finish",
    ),
    "it reads what a file or a rule holds, which may be anything": ("Diagnosis.as_recorded", "Finding.plain"),
    "gradient_stats makes it": ("GradientStats",),
    "those of a mapping, and what a series asks of its history": (
        "History.get",
        "History.setdefault",
        "History.pop",
        "History.join",
        "History.what_there_is",
    ),
    "tests/diagnostics/test_findings.py has its own": ("Finding",),
    "tests/distributed has a model in DistributedDataParallel": ("GradientNoiseScale",),
    "tests/cuda has graphs": ("Tracker.replayed",),
    "a tracker calls it, with a norm": (
        *(f"{rule}.{name}" for rule in CLIP_RULES for name in ("limit", "remember")),
        "AGC.factors",
    ),
    "it is to be derived from": ("ClipRule",),
}
"""What is not in the table, by the reason."""

OTHER_WORDS = {
    "model": ("the target", "parameter '0'"),
    "target": ("the target", "parameter '0'"),
    "parameters": ("the target", "parameter '0'"),
    "sinks": ("a sink",),
    "metrics": ("series",),
    "runs": ("path", "run at"),
    "directory": ("folder",),
    "why": ("withdrawn",),
    "path": ("no such file or folder", "it is no log"),
}
"""What a message calls an argument where it does not use its name."""


def public_callables() -> Iterator[str]:
    """Iterate over the functions, classes, methods and properties of ``__all__`` that take something."""
    for name in pytracker.__all__:
        thing = getattr(pytracker, name)
        if not inspect.isclass(thing):
            yield name
        elif not issubclass(thing, BaseException):
            yield name
            for attribute in dir(thing):
                member = inspect.getattr_static(thing, attribute)
                function = getattr(member, "__func__", member)
                ours = inspect.isfunction(function) and function.__module__.startswith("pytracker.")
                takes = ours and len(inspect.signature(function).parameters) > 1
                if not attribute.startswith("_") and (takes or getattr(member, "fset", None)):
                    yield f"{name}.{attribute}"


def test_everything_public_that_takes_something_is_in_the_table() -> None:
    assert set(public_callables()) == set(CALLS).union(*CALLED_BY_OTHERS.values())


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_as_it_should_be_works(name: str, tmp_path) -> None:
    function, arguments = CALLS[name](tmp_path)
    function(**arguments)
    close_all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_what_no_one_should_give_works_or_is_refused_by_name(name: str, tmp_path) -> None:
    assert list(faults_of(CALLS[name], tmp_path)) == []


def faults_of(make: Callable[[Path], Call], folder: Path) -> Iterator[str]:
    """Iterate over what is wrong with a call when each argument in turn is each of the hostile values."""
    arguments = make(folder / "valid")[1]
    close_all()
    for argument in arguments:
        for kind, value in HOSTILE.items():
            here = folder / f"{argument} {kind}"
            here.mkdir(parents=True)
            function, arguments = make(here)
            try:
                with contextlib.chdir(here):
                    function(**{**arguments, argument: value()})
            except PytrackerError as error:
                if not any(word in str(error) for word in (argument, *OTHER_WORDS.get(argument, ()))):
                    yield f"{argument} is {kind}: not named in {error}"
            except Exception as error:
                yield f"{argument} is {kind}: {type(error).__name__}: {error}"
            close_all()


def flags() -> Iterator[tuple[str, str]]:
    """Iterate over the public calls that take True or False, and the names of these arguments."""
    for name in public_callables():
        thing: Any = pytracker
        for part in name.split("."):
            thing = getattr(thing, part)
        if callable(thing):
            for argument, parameter in inspect.signature(thing).parameters.items():
                if re.search(r"\bbool\b", str(parameter.annotation)):
                    yield name, argument


@pytest.mark.parametrize(("name", "argument"), list(flags()))
def test_a_flag_is_true_or_false_and_nothing_that_is_taken_for_it(name: str, argument: str, tmp_path) -> None:
    for value in ("no", "", 0, 1, [], np.array([True]), torch.tensor(True), Raising()):
        function, arguments = CALLS[name](tmp_path)
        with pytest.raises(InvalidTypeError, match=rf"^{argument} is .*expected True or False"):
            function(**{**arguments, argument: value})
        close_all()
    for kind, value in {"Python's": False, "NumPy's": np.False_}.items():
        function, arguments = CALLS[name](tmp_path / kind)
        function(**{**arguments, argument: value})
        close_all()


def test_the_flags_that_are_known_are_among_those_that_are_found() -> None:
    assert {("Run", "resume"), ("Tracker", "check_replicas"), ("clip_grad_norm_", "foreach")} <= set(flags())


WHOLE: dict[str, Callable[[Path], Any]] = {
    **{name: lambda _, rule=rule: rule() for name, rule in CLIP_RULES.items()},
    "AverageMeter": lambda _: meter(),
    "CSVSink": lambda folder: pytracker.CSVSink(folder / "a.csv"),
    "Diagnosis": lambda _: pytracker.Diagnosis(settings={"constant": {"steps": 20}}),
    "Finding": lambda _: finding(),
    "GradientMeter": lambda _: gradient_meter(),
    "GradientNoiseScale": lambda _: pytracker.GradientNoiseScale.__new__(pytracker.GradientNoiseScale),
    "GradientStats": lambda _: pytracker.gradient_stats(model_with_gradients()),
    "History": lambda _: pytracker.History(loss=[1.0]),
    "Run": recorded,
    "Tracker": lambda _: tracker(),
    "a rule": lambda _: RULES["constant"],
    "a rule that is not known": lambda _: Rule("unknown", lambda view: [], {}),
    "an optimizer's series": lambda _: pytracker.History(loss=[1.0])["loss"],
    "findings": lambda _: pytracker.diagnose(pytracker.History(loss=[1.0])),
    "a comparison": lambda folder: pytracker.compare([recorded(folder).path]),
    "a stored run": lambda folder: pytracker.load_run(recorded(folder).path),
}


def test_every_public_class_is_copied_below() -> None:
    classes = (getattr(pytracker, name) for name in pytracker.__all__)
    ours = {each.__name__ for each in classes if inspect.isclass(each) and not issubclass(each, BaseException)}
    assert ours <= set(WHOLE)


@pytest.mark.parametrize("kept", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("name", WHOLE)
def test_a_copy_or_a_pickle_works_or_is_refused_in_words(name: str, kept: Callable[[Any], Any], tmp_path) -> None:
    with contextlib.suppress(PytrackerError):
        assert type(kept(WHOLE[name](tmp_path))) is type(WHOLE[name](tmp_path / "other"))
    close_all()


def test_a_diagnosis_that_was_pickled_goes_on_where_it_was() -> None:
    history = pytracker.History(loss=[1.0] * 150)
    diagnosis = pytracker.Diagnosis(["constant"], settings={"constant": {"steps": 20}})
    diagnosis.update(history)
    again = pickle.loads(pickle.dumps(diagnosis))
    assert again.findings == diagnosis.findings != []
    assert again.changed == diagnosis.changed
