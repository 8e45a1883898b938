"""Logs of other tools on the command line."""

from __future__ import annotations

import json

from test_cli import call

from pytracker.store import Run


def test_every_verb_takes_the_log_of_another_tool(tmp_path):
    log = tmp_path / "old.csv"
    rows = [f"{epoch},{2.0 / (epoch + 1)},{1.0 + 0.05 * abs(epoch - 5)}" for epoch in range(30)]
    log.write_text("epoch,train_loss,val_loss\n" + "\n".join(rows) + "\n")
    with Run(tmp_path, name="new") as run:
        for step in range(5):
            run.log(step, loss=1.0 / (step + 1))
    done = call("diagnose", log, "--fail-on", "warning")
    assert (done.returncode, "overfitting" in done.stdout) == (3, True)
    assert "loss = train_loss, val_loss = val_loss; a step is one epoch" in done.stderr
    compared = json.loads(call("compare", log, tmp_path / "new", "--json").stdout)
    assert compared["names"] == ["old", "new"]
    assert json.loads(call("show", log, "--json").stdout)["series"]["loss"]["count"] == 30
    assert len(call("export", log).stdout.splitlines()) == 31
    assert "val_loss" in call("watch", log, "--once").stdout


def test_a_run_in_a_log_of_several_is_chosen_by_its_number(tmp_path):
    log = tmp_path / "two.csv"
    log.write_text("step,loss\n" + "".join(f"{step},{step % 7}.5\n" for step in (0, 1, 2, 3, 0, 1)))
    done = call("export", log)
    assert (done.returncode, f"choose one of {log}#0 to {log}#1" in done.stderr) == (1, True)
    assert len(call("export", f"{log}#1").stdout.splitlines()) == 3
    assert "numbers 0 to 1" in call("show", f"{log}#2").stderr
    assert call("diagnose", log).stdout.count("no findings") == 2
