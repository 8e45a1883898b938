from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pytracker.diagnostics import Finding
from pytracker.diagnostics.roots import with_roots
from pytracker.errors import InvalidTypeError, InvalidValueError


def finding(severity="warning", first=10, last=20, **changes):
    return Finding("loss_spike", severity, first, last, changes.pop("evidence", "a spike"), **changes)


def test_a_grown_finding_spans_both_and_forgets_no_parameter():
    grown = finding(parameters=("a", "b")).merge(finding(first=5, last=40, parameters=("c", "a"), evidence="more"))
    assert (grown.first_step, grown.last_step) == (5, 40)
    assert grown.parameters == ("c", "a", "b")
    assert grown.evidence == "more"


def test_a_milder_sighting_keeps_the_words_of_the_severe_one():
    grown = finding("critical", evidence="it blew up").merge(finding("info", last=99, evidence="it is calm"))
    assert (grown.severity, grown.evidence, grown.last_step) == ("critical", "it blew up", 99)


def test_a_finding_survives_json():
    original = finding(parameters=("layer.weight",), numbers={"z": 12.5}, cause="a batch", action="skip it")
    assert Finding.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_what_is_stored_has_the_key_that_a_run_replaces_by():
    assert finding().to_dict()["key"] == finding(first=11, parameters=("x",)).to_dict()["key"]


def test_an_unknown_severity_is_refused_by_name():
    with pytest.raises(InvalidValueError, match=r"severity: expected one of info, warning, critical, got 'severe'"):
        finding("severe")


REFUSED = [
    ({"severity": ["info"]}, InvalidTypeError, r"severity: expected a text, got \['info'\]"),
    ({"evidence": None}, InvalidTypeError, "evidence: expected a text, got None"),
    ({"cause": 5}, InvalidTypeError, "cause: expected a text, got 5"),
    ({"action": "\ud800"}, InvalidValueError, r"action: expected a text without lone surrogates, got '\\ud800'"),
    ({"last": "the end"}, InvalidTypeError, "last_step: expected a whole number, got 'the end'"),
    ({"first": True}, InvalidTypeError, "first_step: expected a whole number, got True"),
    ({"first": -5}, InvalidValueError, "first_step: expected a step from 0 .*, got -5"),
    ({"last": 2**63}, InvalidValueError, "last_step: expected a step from 0 .*, got 9223372036854775808"),
    ({"first": 21}, InvalidValueError, "first_step: expected at most last_step, 20, got 21"),
    ({"parameters": None}, InvalidTypeError, "parameters: expected names, got None"),
    ({"parameters": "fc.weight"}, InvalidTypeError, "parameters: expected names, got 'fc.weight'"),
    ({"parameters": (1, 2)}, InvalidTypeError, r"parameters: expected names, got \(1, 2\)"),
    ({"numbers": [1]}, InvalidTypeError, r"numbers: expected a mapping of names to numbers, got \[1\]"),
    ({"numbers": {3: 1.0}}, InvalidTypeError, "a name in numbers: expected a text, got 3"),
    ({"numbers": {"z": np.arange(3)}}, InvalidTypeError, r"numbers\['z'\] is array"),
    ({"numbers": {"z": "1.5"}}, InvalidTypeError, r"numbers\['z'\] is '1.5', of type str"),
    ({"numbers": {"z": 10**400}}, InvalidValueError, r"numbers\['z'\] is 1000"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_what_no_run_could_keep_is_refused_by_name_and_value(changes, kind, message):
    with pytest.raises(kind, match=f"finding 'loss_spike': {message}"):
        finding(**changes)


def test_a_rule_whose_name_is_no_text_is_refused():
    with pytest.raises(InvalidTypeError, match="rule: expected a text, got None"):
        Finding(None, "warning", 0, 1, "x")


def test_what_a_rule_is_likely_to_give_becomes_plain_values():
    numbers = {"a": np.float32(0.5), "b": torch.tensor(2), "c": 3}
    made = finding(first=np.int32(3), last=np.int64(4), parameters=(name for name in "ab"), numbers=numbers)
    assert (made.parameters, made.numbers) == (("a", "b"), {"a": 0.5, "b": 2.0, "c": 3.0})
    assert {type(value) for value in (made.first_step, made.last_step)} == {int}
    assert {type(value) for value in made.numbers.values()} == {float}
    assert finding(parameters=["é", "\ud800"]).parameters == ("é", "\\ud800")


def test_findings_with_the_same_nan_are_the_same():
    assert finding(numbers={"z": float("nan")}) == finding(numbers={"z": np.float32("nan")})
    assert finding(numbers={"z": float("nan")}) != finding(numbers={"z": 1.0})


def test_a_stored_finding_of_an_older_version_loads_whatever_that_allowed():
    stored = {"rule": "mine", "severity": "info", "first_step": 9, "last_step": True, "evidence": None}
    stored |= {"parameters": [1, "b"], "numbers": {"a": None, "b": 2, "c": float("nan")}, "key": "mine", "more": 1}
    loaded = Finding.from_dict(stored)
    assert (loaded.first_step, loaded.last_step, loaded.parameters) == (1, 9, ("1", "b"))
    assert loaded == Finding("mine", "info", 1, 9, "None", ("1", "b"), numbers={"b": 2, "c": float("nan")})
    assert Finding.from_dict({**stored, "numbers": [1], "parameters": None, "first_step": -1}).numbers == {}


def of(rule, severity="warning", first=0):
    return Finding(rule, severity, first, 99, "x")


@pytest.mark.parametrize(
    ("found", "roots"),
    [
        ([of("update_ratio"), of("loss_diverged", "critical"), of("dead_parameter", first=50)], ["loss_diverged"]),
        ([of("gradient_nonfinite", "critical", 50), of("loss_diverged", "critical", 51)], ["gradient_nonfinite"]),
        ([of("gradient_nonfinite", "critical", 50), of("loss_diverged", "critical", 20)], ["loss_diverged"]),
        ([of("learning_rate", first=50), of("loss_oscillating", first=60)], ["learning_rate"]),
        ([of("loss_oscillating", first=10), of("learning_rate", first=50)], ["loss_oscillating", "learning_rate"]),
        ([of("gradients_add_up"), of("constant")], ["gradients_add_up"]),
        ([of("gradients_add_up"), of("constant", "critical")], ["constant", "gradients_add_up"]),
        ([of("loss_diverged", "info"), of("update_ratio")], ["update_ratio"]),
        ([of("overfitting"), of("layer_imbalance")], ["layer_imbalance", "overfitting"]),
    ],
)
def test_one_root_first_and_what_follows_from_it_is_information(found, roots):
    told = with_roots(found)
    assert [each.rule for each in told if each.rank] == roots
    assert {each.rule for each in told} == {each.rule for each in found}
    follows = [each for each in told if each.follows_from]
    assert all(each.severity == "info" and each.follows_from in roots for each in follows)
    place = {each.rule: index for index, each in enumerate(told)}
    assert all(place[each.follows_from] < place[each.rule] for each in follows)


def test_what_was_withdrawn_and_what_follows_survive_the_disk():
    kept = finding("critical").withdraw("the loss fell after all")
    assert (kept.severity, kept.withdrawn) == ("info", "the loss fell after all")
    assert "It was critical" in str(kept)
    assert Finding.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
