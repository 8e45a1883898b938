"""What is worth knowing about the process that writes a run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from typing import Any

_GIT_SECONDS = 5.0
_LONGEST = 100_000  # characters of a command that are kept
_LONGEST_DIFF = 1_000_000


def collect(working_directory: str, *, snapshot: bool = False) -> dict[str, Any]:
    """Return facts for people: command, host, versions, devices, and the git commit of ``working_directory``.

    With ``snapshot`` also what differs from that commit, and which packages are installed. It starts git, so it runs
    on the writer's thread.
    """
    facts = {
        "command": " ".join(sys.orig_argv)[:_LONGEST],
        "working_directory": working_directory,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "pytracker": _own_version(),
        **_git_facts(working_directory),
    }
    return facts | (_snapshot(working_directory) if snapshot else {})


def _snapshot(directory: str) -> dict[str, Any]:
    from importlib import metadata

    diff = _git(directory, "diff", "--no-color", "--no-ext-diff", "HEAD")
    if diff is not None and len(diff) > _LONGEST_DIFF:
        diff = f"{diff[:_LONGEST_DIFF]}\n[{len(diff) - _LONGEST_DIFF} more characters were left out]"
    packages = {str(each.name): str(each.version) for each in metadata.distributions() if each.name}
    return {"git_diff": diff, "packages": dict(sorted(packages.items()))}


def _own_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pytracker")
    except metadata.PackageNotFoundError:
        return "from source"


def torch_facts() -> dict[str, Any]:
    """Return torch's version and its devices, as far as the program has come: costs next to nothing.

    torch is asked only where it is imported already, and CUDA only where it is running: nothing is started from here.
    """
    torch: Any = sys.modules.get("torch")
    try:
        started = torch and torch.cuda.is_initialized()
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if started else []
        return {"torch": torch and str(torch.__version__), "devices": devices}
    except Exception:  # the program is in the middle of importing it
        return {"torch": None, "devices": []}


def _git_facts(directory: str) -> dict[str, Any]:
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "git_dirty": None}
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _git(directory: str, *arguments: str) -> str | None:
    command = ["git", "-C", directory, *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
