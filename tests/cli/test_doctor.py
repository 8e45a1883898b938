"""The doctor says what works, and for what does not, why."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pytracker.cli import doctor
from pytracker.core import native


def without_core(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, reason))


def test_the_report_is_plain_data() -> None:
    report = doctor.examine()
    assert json.loads(json.dumps(report)) == report


def test_a_missing_core_is_told_with_its_reason_for_every_native_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    without_core(monkeypatch, "g++: not found")
    report = doctor.examine()
    for name in ("cpu", "cuda"):
        assert report["back_ends"][name] == {"available": False, "detail": "", "reason": "g++: not found"}
    assert report["back_ends"]["reference"]["available"]
    assert "g++: not found" in doctor.describe(report)


def test_the_instruction_set_in_use_is_told() -> None:
    core, reason = native.load()
    if core is None:
        pytest.skip(reason)
    assert doctor.examine()["back_ends"]["cpu"]["detail"].startswith(core.isa())


def test_each_device_is_asked_to_run_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        class cuda:  # noqa: N801 - as torch names it
            device_count = staticmethod(lambda: 2)
            get_device_name = staticmethod(lambda index: "H100")

        class ops:  # noqa: N801
            class pytracker:  # noqa: N801
                @staticmethod
                def gradient_moments(gradients: list[torch.Tensor]) -> torch.Tensor:
                    raise RuntimeError("an illegal instruction")

        tensor = staticmethod(lambda values: torch.tensor(values, device="meta").to("meta"))

    class Kernels:
        reason_without_kernels = staticmethod(lambda index: "no image fits" if index else "")

    assert "H100) fails: " in doctor._device(Kernels, Torch, 0)
    assert doctor._device(Kernels, Torch, 1) == "cuda:1 (H100) is served by plain torch: no image fits"


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_damaged_build_record_is_told(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "cli" / "doctor.py"))
    without_core(monkeypatch, "")
    if content is not None:
        (tmp_path / "_build_info.json").write_text(content)
    build = doctor.examine()["build"]
    assert not build["built"]
    assert ("no record" if content is None else "cannot be read") in build["reason"]


def test_without_torch_the_doctor_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.import_module

    def no_torch(name: str) -> ModuleType:
        if name == "torch":
            raise ImportError("no torch here")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", no_torch)
    report = doctor.examine()
    assert report["versions"]["torch"] is None
    assert not any(state["available"] for state in report["back_ends"].values())
    assert "torch cannot be imported" in doctor.describe(report)


def test_the_exit_status_tells_whether_the_native_core_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_core(monkeypatch, "g++: not found")
    assert doctor.main(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["back_ends"]["cpu"]["reason"] == "g++: not found"


def test_a_missing_extra_says_how_to_install_it() -> None:
    report = doctor.examine()
    report["extras"] = {"report": False}
    assert "pip install 'pytracker[report]'" in doctor.describe(report)


def test_the_doctor_looks_for_every_extra_that_a_user_may_install() -> None:
    offered = {*metadata.metadata("pytracker").get_all("Provides-Extra")}
    assert set(doctor.EXTRAS) == offered - {"torch", "all", "dev", "dev-integrations", "docs", "site"}
