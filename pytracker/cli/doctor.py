"""What is installed here, which back ends work, and why one does not: `pytracker doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import in_words

# What each optional package is for, by the name of the extra that installs it.
EXTRAS = {
    "report": "plotly",
    "pandas": "pandas",
    "parquet": "pyarrow",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "keras": "keras",
    "serve": "uvicorn",
    "demo": "sklearn",
}


def examine() -> dict[str, Any]:
    """Return versions, back ends and optional packages as plain data, ready for JSON.

    Nothing is raised for what is missing or broken: saying so is the purpose.

    Example:
        >>> from pytracker.cli.doctor import examine
        >>> report = examine()
        >>> sorted(report["back_ends"])
        ['cpu', 'cuda', 'reference']
        >>> report["back_ends"]["reference"]["available"]
        True
    """
    build = _build_info()
    torch_version, torch_cuda, torch_reason = _torch()
    core, reason = (None, torch_reason) if torch_reason else _core()
    return {
        "versions": {
            "pytracker": _version("pytracker"),
            "python": platform.python_version(),
            "torch": torch_version,
            "torch_cuda": torch_cuda,
            "numpy": _version("numpy"),
            "platform": platform.platform(),
        },
        "build": build,
        "back_ends": {
            "cpu": _cpu(build, core, reason),
            "cuda": _cuda(core, reason),
            "reference": {
                "available": not torch_reason,
                "detail": "the same statistics in plain torch, for devices without a native back end",
                "reason": torch_reason,
            },
        },
        "extras": {extra: importlib.util.find_spec(package) is not None for extra, package in EXTRAS.items()},
    }


def describe(report: dict[str, Any]) -> str:
    """Return what `examine` found as lines for a person."""
    versions = report["versions"]
    lines = [f"{name:<13}{version or 'none'}" for name, version in versions.items()]
    if report["build"].get("compiler"):
        lines.append(f"{'compiler':<13}{report['build']['compiler']}")
    lines += ["", "back ends"]
    for name, state in report["back_ends"].items():
        verdict = "yes" if state["available"] else "no"
        lines.append(f"  {name:<10}{verdict:<5}{state['detail'] if state['available'] else state['reason']}")
    lines += ["", "extras"]
    for extra, installed in report["extras"].items():
        remedy = f"no: pip install 'pytracker[{extra}]'"
        lines.append(f"  {extra:<13}{'yes' if installed else remedy}")
    return "\n".join(lines)


def main(*, as_json: bool = False) -> int:
    """Print the report; return 0 where the native core works, else 1."""
    report = examine()
    print(json.dumps(report, indent=2) if as_json else describe(report))
    return 0 if report["back_ends"]["cpu"]["available"] else 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_info() -> dict[str, Any]:
    path = Path(__file__).parents[1].joinpath("_build_info.json")
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"built": False, "reason": "there is no record of a build"}
    except (OSError, ValueError) as error:
        return {"built": False, "reason": f"{path} cannot be read: {error}"}
    return info


def _torch() -> tuple[str | None, str | None, str]:
    """Return torch's version, its CUDA's, and why torch cannot be imported."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return None, None, f"torch cannot be imported: {error}"
    return str(torch.__version__), torch.version.cuda, ""


def _core() -> tuple[Any, str]:
    """Return the native core and "", or None and the reason why it is not used."""
    core, reason = importlib.import_module("pytracker.core.native").load()
    return core, reason


def _cpu(build: dict[str, Any], core: Any, reason: str) -> dict[str, Any]:
    if core is None:
        return {"available": False, "detail": "", "reason": reason}
    return {"available": True, "detail": f"{core.isa()} kernels, chosen of {', '.join(build['isa'])}", "reason": ""}


def _cuda(core: Any, reason: str) -> dict[str, Any]:
    """Say of each device which kernels it uses, after one has run there."""
    if core is None:
        return {"available": False, "detail": "", "reason": reason}
    cuda = importlib.import_module("pytracker.core.cuda")
    _, reason = cuda.library()
    if reason:
        return {"available": False, "detail": "", "reason": reason}
    torch = importlib.import_module("torch")
    devices = [_device(cuda, torch, index) for index in range(torch.cuda.device_count())]
    said = "; ".join(devices) or "there is no CUDA device here"
    works = bool(devices) and all("runs" in device for device in devices)
    return {"available": works, "detail": said if works else "", "reason": "" if works else said}


def _device(cuda: Any, torch: Any, index: int) -> str:
    name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    reason = cuda.reason_without_kernels(index)
    if reason:
        return f"{name} is served by plain torch: {reason}"
    try:
        gradient = torch.tensor([3.0, 4.0], device=f"cuda:{index}")
        moments = torch.ops.pytracker.gradient_moments([gradient]).cpu().tolist()
    except Exception as error:  # whatever stops a device
        return f"{name} fails: {in_words(error)}"
    if moments[:2] != [7.0, 25.0]:
        return f"{name} computes wrongly: the sum of squares of 3 and 4 is {moments[1]}"
    return f"{name} runs {cuda.used(index)}"
