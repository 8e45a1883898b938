"""Lightning, training a small model, beside an oracle in the same hook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pytracker
from pytracker import Run

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'pytracker[lightning]'")

import pl_model

from pytracker.integrations.lightning import PytrackerCallback, PytrackerLogger

EXACT = {"rtol": 1e-12}


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **arguments,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


def fit(folder: Path, callback: PytrackerCallback, model: Any = None, **arguments: Any) -> Any:
    """Train and return the oracle."""
    seen = pl_model.oracle(pl)
    trainer(folder, callback, seen, **arguments).fit(
        model or pl_model.module(pl), pl_model.loader(), pl_model.loader(12)
    )
    return seen


def test_gradients_before_the_clip_through_accumulation_and_validation_at_its_steps(tmp_path: Path) -> None:
    callback = PytrackerCallback(run=Run(tmp_path / "runs", name="a"), diagnosis=None)
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "val_check_interval": 2}
    seen = fit(tmp_path, callback, **settings)
    history = callback.tracker.history
    np.testing.assert_allclose(history["grad_norm"][:], seen.norms, **EXACT)
    assert len(seen.norms) == 6
    assert min(seen.norms) > 0.01
    recorded = history["val_loss"]
    assert list(zip(recorded.steps.tolist(), recorded[:], strict=True)) == seen.validations
    assert len(seen.validations) == 6  # three an epoch, two of them before it ends
    assert history["epoch"].steps.tolist() == [2, 5]
    assert history.meta["clip_threshold"] == 0.01
    assert "train_loss" not in history
    assert pytracker.load_run(tmp_path / "runs" / "a").state == "finished"


def test_the_loss_is_the_mean_over_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    callback = PytrackerCallback(diagnosis=None)
    fit(tmp_path, callback, max_epochs=1, accumulate_grad_batches=3)
    layers = pl_model.module(pl).layers
    batches = pl_model.DATA[:12]
    expected = (layers(batches) - batches.sum(1, keepdim=True)).square().mean().item()
    np.testing.assert_allclose(callback.tracker.history["loss"][0], expected, rtol=1e-5)


def test_a_training_step_that_returns_none_is_a_step_without_a_gradient(tmp_path: Path) -> None:
    callback = PytrackerCallback(diagnosis=None)
    seen = fit(tmp_path, callback, pl_model.module(pl, skipped=(2, 3)), max_epochs=1)
    steps, norms = callback.tracker.history.parameters.norms()
    assert steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(norms[[2, 3]]).all()
    there = [0, 1, 4, 5]
    np.testing.assert_allclose(np.sqrt((norms[there] ** 2).sum(axis=1)), np.array(seen.norms)[there], **EXACT)
    assert callback.tracker.history["loss"].steps.tolist() == there


def test_a_training_resumed_from_a_checkpoint_after_a_crash_goes_on_from_its_step(tmp_path: Path) -> None:
    before, after = pl_model.oracle(pl), pl_model.oracle(pl)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=4)
    callback = PytrackerCallback(run=Run(tmp_path / "runs", name="a"), diagnosis=None)
    first = trainer(tmp_path, callback, before, checkpoints, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="the data are broken"):
        first.fit(pl_model.module(pl, fail_at=7), pl_model.loader())
    kept = pytracker.load_run(tmp_path / "runs" / "a")
    assert (kept.state, kept.history.last_step) == ("failed", 6)
    callback = PytrackerCallback(run=Run(tmp_path / "runs", name="a", resume=True), diagnosis=None)
    trainer(tmp_path, callback, after).fit(
        pl_model.module(pl), pl_model.loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    norms = callback.tracker.history["grad_norm"]
    assert norms.steps.tolist() == list(range(4 + len(after.norms)))
    np.testing.assert_allclose(norms[:], [*before.norms[:4], *after.norms], **EXACT)


def test_several_optimizers_are_players_of_one_run(tmp_path: Path) -> None:
    class Players(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(4, 1), nn.Linear(1, 1)
            self.norms: dict[str, list[float]] = {"a": [], "b": []}

        def training_step(self, batch: Any, index: int) -> None:
            for name, optimizer in zip("ab", self.optimizers(), strict=True):
                if name == "b" and index % 2:
                    continue
                optimizer.zero_grad()
                self.manual_backward(self.b(self.a(batch[0])).square().mean())
                own = [parameter.grad.double().numpy().ravel() for parameter in getattr(self, name).parameters()]
                self.norms[name].append(np.linalg.norm(np.concatenate(own)))
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.a, self.b)]

    model, callback = Players(), PytrackerCallback(run=Run(tmp_path / "runs", name="two"), diagnosis=None)
    trainer(tmp_path, callback, max_epochs=1).fit(model, pl_model.loader())
    history = pytracker.load_run(tmp_path / "runs" / "two").history
    for name, norms in model.norms.items():
        np.testing.assert_allclose(history[f"{name}/grad_norm"][:], norms, **EXACT)
        assert len(history[f"{name}/loss"]) == len(history[f"{name}/lr"]) == len(norms)
    assert (len(model.norms["a"]), len(model.norms["b"])) == (6, 3)
    assert history["b/grad_norm"].steps.tolist() == [1, 4, 7]
    assert "grad_norm" not in history


def test_the_logger_writes_what_lightning_logs_by_itself_and_into_the_callback_s_run(tmp_path: Path) -> None:
    for callbacks in ([], [PytrackerCallback(diagnosis=None)]):
        directory = tmp_path / str(len(callbacks))
        logger = PytrackerLogger(str(directory), name="a")
        model = pl_model.module(pl)
        model.save_hyperparameters({"width": 8})
        fitted = trainer(tmp_path, *callbacks, logger=logger, log_every_n_steps=1)
        fitted.fit(model, pl_model.loader(), pl_model.loader(12))
        some = torch.utils.data.Subset(pl_model.loader().dataset, range(8))
        fitted.validate(model, torch.utils.data.DataLoader(some, 8), verbose=False)
        logger.experiment.finish()
        run = pytracker.load_run(directory / "a")
        assert run.state == "finished"
        assert len(run.history["train_loss"]) == 12
        assert len(run.history["val_loss"]) == 3
        assert run.history.meta["hyperparameters"] == {"width": 8}
        assert ("grad_norm" in run.history) == bool(callbacks)


def test_the_callback_serves_lightning_under_its_other_name_too(tmp_path: Path) -> None:
    """In a process of its own, which has not loaded the first."""
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    program = """
import numpy as np, pytorch_lightning as pl
import pl_model
from pytracker.integrations.lightning import PytrackerCallback, PytrackerLogger
seen, callback, logger = pl_model.oracle(pl), PytrackerCallback(diagnosis=None), PytrackerLogger("runs")
assert isinstance(callback, pl.Callback) and isinstance(logger, pl.loggers.Logger)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=logger, callbacks=[callback, seen],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.01)
trainer.fit(pl_model.module(pl), pl_model.loader(), pl_model.loader())
np.testing.assert_allclose(callback.tracker.history["grad_norm"][:], seen.norms, rtol=1e-12)
assert len(seen.norms) == 6
"""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
