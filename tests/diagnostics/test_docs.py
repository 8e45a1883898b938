"""docs/diagnosis.md says what the rules are: their settings with today's defaults, and a picture of each."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from pytracker.diagnostics import RULES, diagnose
from pytracker.history import History

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "diagnosis.md").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0].strip(): section for section in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]}


def defaults(name: str) -> dict[str, float]:
    parameters = list(inspect.signature(RULES[name].function).parameters.values())[1:]
    return {parameter.name: float(parameter.default) for parameter in parameters}


def told(section: str) -> dict[str, float]:
    """Return the table of settings."""
    rows = section.partition("| setting | default | meaning |\n")[2].splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert all(len(row) == 3 and row[2] for row in cells)
    return {name: float(default) for name, default, _ in cells}


def test_there_is_a_section_and_a_line_of_the_overview_for_each_rule():
    assert list(SECTIONS) == list(dict.fromkeys(re.findall(r"^\| \[(\w+)\]\(#\1\) \|", TEXT, re.MULTILINE)))
    assert set(SECTIONS) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rules_settings_are_listed_with_their_defaults(name):
    assert told(SECTIONS[name]) == defaults(name)


@pytest.mark.parametrize("name", RULES)
def test_a_section_explains_source_tuning_false_alarms_and_blind_spots(name):
    points = re.findall(r"^- ([\w ]+):", SECTIONS[name], re.MULTILINE)
    wanted = ["Thresholds", "Tuning", "False alarms", "It cannot see"]
    assert points == (wanted if defaults(name) else wanted[1:])


@pytest.mark.parametrize("name", RULES)
def test_a_rules_picture_is_there_opaque_and_small(name):
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", SECTIONS[name])
    picture = (DOCS / path).read_text(encoding="utf-8")
    assert path == f"pictures/{name}.svg"
    assert len(picture) < 200_000
    assert re.search(r'id="patch_1">\s*<path[^>]*fill: #ffffff', picture)
    assert "nothing found by " + name in picture
    assert re.search(r">(warning|critical|info, follows from \w+): ", picture)


def test_every_picture_is_shown():
    assert {path.name for path in (DOCS / "pictures").glob("*.svg")} == {f"{name}.svg" for name in RULES}


def test_links_within_the_page_lead_somewhere():
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= SECTIONS.keys()


def test_the_rule_of_five_lines_works_as_printed():
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "@rule\n" in block)
    before = dict(RULES)
    try:
        exec(compile(ast.parse(code), "docs/diagnosis.md", "exec"), {})
        (finding,) = diagnose(History(accuracy=[0.3] * 120))
    finally:
        RULES.clear()
        RULES.update(before)
    assert (finding.rule, finding.evidence) == ("accuracy_low", "accuracy is 0.30 after 120 steps")
    assert len(code.partition("@rule\n")[2].strip().splitlines()) <= 5


def test_prose_is_at_most_120_wide():
    long = [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith(("|", "!"))]
    assert not long
