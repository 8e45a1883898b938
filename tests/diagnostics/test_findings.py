from __future__ import annotations

import json

import pytest

from pytracker.diagnostics import Finding
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
    with pytest.raises(InvalidValueError, match=r"'severe'.*info, warning, critical"):
        finding("severe")


def test_a_step_that_is_no_whole_number_is_refused():
    with pytest.raises(InvalidTypeError, match="'loss_spike': expected a whole number for a step, got 'the end'"):
        finding(last="the end")
