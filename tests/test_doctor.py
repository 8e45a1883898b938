"""The doctor says what works, and for what does not, why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytracker import _doctor

BUILT = {
    "built": True,
    "reason": "",
    "torch": "0.0.1",
    "isa": ["default"],
    "cuda": None,
    "archs": [],
    "cuda_reason": "torch is built without CUDA",
}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path of a build record that the doctor reads instead of the real one."""
    monkeypatch.setattr(_doctor, "__file__", str(tmp_path / "_doctor.py"))
    return tmp_path / "_build_info.json"


def examined(path: Path, info: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(info))
    return _doctor.examine()


def test_the_report_is_plain_data() -> None:
    report = _doctor.examine()
    assert json.loads(json.dumps(report)) == report


def test_a_failed_build_is_told_with_its_reason_for_every_native_back_end(build: Path) -> None:
    report = examined(build, {"built": False, "reason": "g++: not found", "cuda": None})
    for name in ("cpu", "cuda"):
        assert report["back_ends"][name] == {"available": False, "detail": "", "reason": "g++: not found"}
    assert report["back_ends"]["reference"]["available"]
    assert "g++: not found" in _doctor.describe(report)


def test_a_package_that_was_never_built_says_how_to_build_it(build: Path) -> None:
    assert "--no-build-isolation" in _doctor.examine()["back_ends"]["cpu"]["reason"]


def test_an_unreadable_build_record_is_named(build: Path) -> None:
    build.write_text("{")
    assert str(build) in _doctor.examine()["back_ends"]["cpu"]["reason"]


def fail_for(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    real = _doctor.importlib.import_module

    def fake(name: str) -> Any:
        if name == broken:
            raise ImportError(f"{name} is broken")
        return real(name)

    monkeypatch.setattr(_doctor.importlib, "import_module", fake)


def test_a_library_built_for_another_torch_is_told_apart_from_a_broken_one(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_for(monkeypatch, "pytracker._C")
    torch_version = _doctor.examine()["versions"]["torch"]
    assert "built for torch 0.0.1" in examined(build, BUILT)["back_ends"]["cpu"]["reason"]
    same = examined(build, {**BUILT, "torch": torch_version})
    assert "cannot be loaded: pytracker._C is broken" in same["back_ends"]["cpu"]["reason"]


def test_without_torch_the_doctor_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for(monkeypatch, "torch")
    report = _doctor.examine()
    assert report["versions"]["torch"] is None
    assert not any(state["available"] for state in report["back_ends"].values())
    assert "torch cannot be imported" in _doctor.describe(report)


def test_a_missing_extra_says_how_to_install_it() -> None:
    report = _doctor.examine()
    report["extras"] = {"report": False}
    assert "pip install pytracker[report]" in _doctor.describe(report)
