"""The pictures of the page in README: four trainings of a small network, one of which diverges, opened in Chromium.

    python -m benchmarks.page_pictures [--out docs/pictures]

Needs torch, scikit-learn, plotly, starlette, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from pytracker import Run, Tracker
from pytracker.view import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "view"))
from browser import DRAWN, Browser

SETTINGS = (
    ("baseline", 0.1, 32),
    ("wider", 0.1, 128),
    ("cautious", 0.01, 32),
    ("too-fast", 4.0, 32),
)


def train(folder: Path, name: str, lr: float, width: int) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small only waits for its own threads
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    config = {"lr": lr, "model": {"width": width}, "batch": 32, "max_steps": 12 * 43}
    with Run(folder, name=name, config=config) as run, Tracker(model, optimizer, run=run, every=10) as tracker:
        for _ in range(12):
            for batch in torch.randperm(1400)[: 43 * 32].view(43, 32):
                optimizer.zero_grad()
                outputs = model(images[batch])
                loss = nn.functional.cross_entropy(outputs, labels[batch])
                loss.backward()
                tracker.step(loss=loss, accuracy=(outputs.argmax(1) == labels[batch]).float().mean())
                optimizer.step()
            with torch.no_grad():
                outputs = model(images[1400:])
            right = (outputs.argmax(1) == labels[1400:]).float().mean()
            tracker.epoch(val_loss=nn.functional.cross_entropy(outputs, labels[1400:]), val_accuracy=right)
    return run.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "runs")
        paths = [train(folder, *setting) for setting in SETTINGS]
        browser = Browser()
        try:
            browser.resize(1400, 1500)
            browser.open(write_report(paths, Path(scratch, "four.html")))
            shoot(browser, out / "report-four-runs.png", 1500)
            browser.scheme("dark")
            browser.resize(1400, 4000)
            browser.open(write_report(paths[:1], Path(scratch, "one.html")))
            shoot(browser, out / "report-one-run-dark.png", 1500, of="#parameters")
            browser.scheme("light")
            command = [sys.executable, "-um", "pytracker", "serve", str(folder), "--port", "0"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout is not None
                found = re.search(r"http://\S+", server.stdout.readline())
                assert found is not None
                browser.resize(420, 3000)
                browser.open(found[0])
                browser.wait("[...pageRuns.values()].every((run) => run.curves)")
                shoot(browser, out / "live-page-narrow.png", 1500)
            finally:
                server.terminate()
                server.wait()
        finally:
            browser.close()


def shoot(browser: Browser, path: Path, height: int, of: str | None = None) -> None:
    browser.wait(DRAWN)
    top = 0 if of is None else browser.run(f"return document.querySelector({of!r}).getBoundingClientRect().top")
    browser.screenshot(path, top=top, height=height)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
