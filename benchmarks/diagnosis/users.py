"""The third part: trainings of the kinds that users have. What is said of them, and what following it does.

Run with ``python -m benchmarks.diagnosis.users``. Each training of ``kinds.py`` is judged as a Tracker judges it. A
warning or worse on a healthy training is wrong; on a troubled one it is right where it names what may rightly be named.
Where a healthy training whose loss falls gets a warning, its advice is applied and the training repeated: it must not
end worse.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from pytracker.diagnostics import Diagnosis, Finding

from .fit import EVERY, Change, Trained, advised, no_worse
from .kinds import HEALTHY, TROUBLED, Kind

RESULTS = Path("docs/results")
SEEDS = tuple(range(10))  # the rules were made with a look at the trainings of the first two


@dataclass
class Judged:
    """One training: what was said of it, online, and what following the advice led to."""

    kind: str
    seed: int
    healthy: bool
    right: frozenset[str]
    fell: bool
    merit: float
    findings: list[Finding]
    ever: list[Finding]  # all that was a warning at some drain
    followed: list[tuple[str, Change, float, bool]]  # rule, change, merit after it, whether no worse

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.rank > 0]


def judge_online(trained: Trained) -> tuple[list[Finding], list[Finding]]:
    """Return the findings at the end, and every one that was a warning at some drain."""
    diagnosis, ever = Diagnosis(), {}
    end = trained.history.last_step + 1
    for stop in [*range(EVERY, end, EVERY), end]:
        for finding in diagnosis.update(trained.history, stop=stop):
            if finding.rank > 0:
                ever.setdefault(finding.rule, finding)
    return diagnosis.findings, list(ever.values())


def train_and_judge(task: tuple[int, bool, int]) -> Judged:
    """Train one kind with one seed, judge it, and follow what was said."""
    index, healthy, seed = task
    kind: Kind = (HEALTHY if healthy else TROUBLED)[index]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    def train(change: Change) -> Trained:
        torch.manual_seed(seed)
        return kind.train(change)

    trained = train(Change())
    findings, ever = judge_online(trained)
    followed = []
    if healthy and trained.fell:
        for finding in ever:
            for change in advised(finding):
                again = train(change)
                followed.append((finding.rule, change, again.merit, no_worse(trained, again)))
    return Judged(kind.name, seed, healthy, kind.right, trained.fell, trained.merit, findings, ever, followed)


def report(judged: list[Judged]) -> str:
    """Return the counts and each training as Markdown."""
    alarms = [(one, finding) for one in judged for finding in one.alarms]
    right = [finding for one, finding in alarms if finding.rule in one.right]
    troubled = [one for one in judged if not one.healthy]
    named = [one for one in troubled if {finding.rule for finding in one.alarms} & one.right]
    followed = [each for one in judged for each in one.followed]
    everything = [(one, finding) for one in judged for finding in one.findings]
    fair = [finding for one, finding in everything if finding.rank == 0 or finding.rule in one.right]
    lines = [
        f"- Warnings and criticals at the end: {len(alarms)}, right {len(right)}, "
        f"precision {len(right) / max(1, len(alarms)):.2f}.",
        f"- Everything that was said, information too: {len(everything)}, not wrong {len(fair)}, "
        f"{len(fair) / max(1, len(everything)):.2f} (information counts as not wrong).",
        f"- Troubled trainings named: {len(named)} of {len(troubled)}.",
        f"- Healthy trainings with a warning at some drain: {sum(bool(one.ever) for one in judged if one.healthy)} of "
        f"{sum(one.healthy for one in judged)}; at the end: "
        f"{sum(bool(one.alarms) for one in judged if one.healthy)}.",
        f"- Advice followed on healthy trainings whose loss falls: {len(followed)} times, no worse "
        f"{sum(fine for *_, fine in followed)}.",
        "",
        "| training | seed | loss fell | merit | warnings and criticals | information | taken back |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in judged:
        end = {finding.rule for finding in one.alarms}
        said = ", ".join(f"{each.rule}{'' if each.rule in one.right else ' (wrong)'}" for each in one.alarms)
        quiet = ", ".join(each.rule for each in one.findings if each.rank == 0)
        back = ", ".join(each.rule for each in one.ever if each.rule not in end)
        name = one.kind if one.healthy else f"*{one.kind}*"
        lines.append(
            f"| {name} | {one.seed} | {'yes' if one.fell else 'no'} | {one.merit:.3g} | {said} | {quiet} | {back} |"
        )
    lines += [""] + [
        f"- {one.kind}, seed {one.seed}: {rule}, {change}: {one.merit:.3g} -> {merit:.3g}{'' if fine else ' WORSE'}"
        for one in judged
        for rule, change, merit, fine in one.followed
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only trainings whose name holds this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    begin = time.monotonic()
    tasks = [
        (index, healthy, seed)
        for healthy, kinds in ((True, HEALTHY), (False, TROUBLED))
        for index, kind in enumerate(kinds)
        for seed in arguments.seeds
        if arguments.only in kind.name
    ]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        text = report(list(pool.map(train_and_judge, tasks, chunksize=2)))
    others = "" if tuple(arguments.seeds) == SEEDS else f" --seeds {' '.join(map(str, arguments.seeds))}"
    head = (
        f"# Trainings of the kinds that users have, {datetime.date.today()}\n\n"
        f"Command: `python -m benchmarks.diagnosis.users{others}`. {len(tasks)} trainings, those in italics with a "
        f"trouble planted; {time.monotonic() - begin:.0f} s on {os.cpu_count()} cores of {platform.machine()}, torch "
        f"{torch.__version__}.\n\n"
    )
    print(head + text)
    if not arguments.only and not others:
        (RESULTS / f"{datetime.date.today()}-diagnosis-users.md").write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
