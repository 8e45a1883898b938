"""A network that fails for longer than rank_timeout ends no training: each rank goes on, and its close is bounded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import parted
import pytest

import pytracker


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two hosts, as far as the network goes: namespaces of their own, with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    names = [f"pytracker-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
            for rank, name in enumerate(names):
                ip("-n", name, "addr", "add", f"{parted.FIRST_HOST[:-1]}{rank + 1}/24", "dev", f"cable{rank}")
                ip("-n", name, "link", "set", f"cable{rank}", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_ranks_that_the_network_parts_go_on_and_close(hosts: list[str], tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, parted.__file__, str(rank), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": f"cable{rank}"},
        )
        for rank, name in enumerate(hosts)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
        ip("-n", hosts[0], "link", "set", "cable0", "down")
        said = [rank.communicate("\n", timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "of 2 ranks: no answer from ranks [1]" in said[0]
    assert "of 2 ranks: their store does not answer either" in said[1]
    run = pytracker.load_run(tmp_path / "job")
    assert (run.state, run.error) == ("finished", None)
    assert "no answer from ranks [1]" in run.history.meta["rank_fault"]
    assert run.history["loss"][:] == list(range(40))
    assert run.history["grad_norm"].steps.tolist() == list(range(10))
