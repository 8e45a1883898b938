"""The code on the pages of the guide runs, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
README = "../README.md"
WITH_CODE = (README, "index.md", "tracker.md", "sinks.md", "control.md", "players.md", "migration.md")
PAGES = [README, *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "sinks.md":
        pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'pytracker[tensorboard]'")
    model = torch.nn.Linear(4, 1)
    loader = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(5)]
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": loader,
        "loss_function": torch.nn.functional.mse_loss,
        "x": loader[0][0],
        "y": loader[0][1],
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_to_files(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    own = [target for target in targets if "://" not in target]
    assert [target for target in own if not ((DOCS / page).parent / target).exists()] == []
