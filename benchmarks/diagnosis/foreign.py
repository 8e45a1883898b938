"""What the rules say of logs that other people's trainings left, against what an expert says of each.

Run with ``python -m benchmarks.diagnosis.foreign FOLDER``, or with the folder in ``PYTRACKER_FOREIGN_LOGS``. The folder
holds the logs and ``verdicts.tsv``: the file, the run in it ("run3", or nothing where it has one), and a verdict that
begins with "nothing" or names a rule. The logs are nobody's to hand on, so they are not part of the project.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from pytracker import diagnose
from pytracker.diagnostics import RULES, Finding
from pytracker.logs import read_log

IN_OTHER_WORDS = {"validation loss flat": "overfitting"}


@dataclass
class Judged:
    """One run: the verdict, and what the rules said."""

    name: str
    verdict: str
    findings: list[Finding]

    @property
    def wanted(self) -> set[str]:
        """The rules that the verdict names."""
        named = {rule for rule in RULES if self.verdict.startswith(rule)}
        return named | {rule for words, rule in IN_OTHER_WORDS.items() if self.verdict.startswith(words)}

    def is_right(self, finding: Finding) -> bool:
        return finding.rule in self.wanted


def judge_all(folder: Path) -> list[Judged]:
    """Read and judge every run that has a verdict."""
    judged, known = [], {}
    for line in (folder / "verdicts.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, run, verdict = line.split("\t")
        if file not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of damaged lines
                known[file] = read_log(folder / file)
        history = known[file][int(run.removeprefix("run")) if run else 0]
        judged.append(Judged(f"{file} {run}".strip(), verdict, diagnose(history)))
    return judged


def report(judged: list[Judged]) -> str:
    """Return the counts, and every finding that was wrong or missing."""
    said = [(one, finding) for one in judged for finding in one.findings]
    alarms = [(one, finding) for one, finding in said if finding.rank > 0]
    wanted = [(one, rule) for one in judged for rule in sorted(one.wanted)]
    found = [(one, rule) for one, rule in wanted if rule in {finding.rule for finding in one.findings}]
    lines = [
        f"{len(judged)} runs of {len({one.name.split()[0] for one in judged})} logs.",
        "",
        "| what | said | right | share |",
        "| --- | --- | --- | --- |",
        _row("warnings and criticals", alarms),
        _row("everything, information too", said),
        f"| named by the expert | {len(wanted)} | {len(found)} found | {len(found) / max(1, len(wanted)):.2f} |",
        "",
    ]
    lines += [f"- wrong: {one.name}: {finding}" for one, finding in said if not one.is_right(finding)]
    lines += [f"- missed: {one.name}: {rule}" for one, rule in wanted if (one, rule) not in found]
    return "\n".join(lines)


def _row(what: str, said: list[tuple[Judged, Finding]]) -> str:
    right = sum(one.is_right(finding) for one, finding in said)
    return f"| {what} | {len(said)} | {right} | {right / max(1, len(said)):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("PYTRACKER_FOREIGN_LOGS"))
    folder = parser.parse_args().folder
    if folder is None:
        parser.error("give the folder of the logs, or set PYTRACKER_FOREIGN_LOGS")
    print(report(judge_all(Path(folder))))


if __name__ == "__main__":
    main()
