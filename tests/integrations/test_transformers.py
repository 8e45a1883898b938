"""The Hugging Face Trainer, training a small language model, beside an oracle in the same hook."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import pytracker
from pytracker import Run

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pytracker[transformers]'")

import hf
from transformers import Trainer

from pytracker.integrations.transformers import TrackedTrainerMixin, track

EXACT = {"rtol": 1e-12}


def check(tracker: pytracker.Tracker, trainer: hf.Watched, first: int = 0) -> None:
    """Compare what the tracker has recorded from step ``first`` with what the oracle has seen."""
    norms, losses = tracker.history["grad_norm"], tracker.history["loss"]
    assert norms.steps.tolist() == list(range(first + len(trainer.norms)))
    np.testing.assert_allclose(norms[first:], trainer.norms, **EXACT)
    np.testing.assert_allclose(losses[first:], trainer.losses, rtol=1e-6)  # a sum of float32


def test_gradients_before_the_clip_and_the_trainer_s_loss_through_accumulation(tmp_path: Path) -> None:
    trainer = hf.trainer(tmp_path, weight_decay=0.1)
    with track(trainer, run=Run(tmp_path / "runs"), diagnosis=None) as tracking:
        trainer.train()
    check(tracking.tracker, trainer)
    assert len(trainer.norms) == trainer.state.global_step == 6
    assert min(trainer.norms) > 0.05  # every one was clipped
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(tracking.tracker.history["loss"][:], logged, rtol=1e-4)  # the Trainer rounds its own
    history = tracking.tracker.history
    assert history["lr/0"][0] == history["lr/1"][0] == 0.01
    assert history["lr/0"][-1] < 0.01
    assert history["epoch"].steps.tolist() == [2, 5]
    assert history.meta["clip_threshold"] == 0.05
    assert pytracker.list_runs(tmp_path / "runs")[0].state == "finished"


def test_evaluations_in_mid_epoch_by_epoch_and_after_the_end_are_at_their_steps(tmp_path: Path) -> None:
    for strategy, steps in (("steps", [1, 3, 5, 5]), ("epoch", [2, 5, 5])):
        trainer = hf.trainer(tmp_path, eval_strategy=strategy, eval_steps=2)
        with track(trainer, diagnosis=None) as tracking:
            trainer.train()
            trainer.evaluate(hf.sentences(4))
        recorded = tracking.tracker.history["eval_loss"]
        assert recorded.steps.tolist() == steps
        assert recorded[:] == [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert not {"eval_runtime", "train_loss", "grad_norm/0"} & set(tracking.tracker.history)


def test_a_training_resumed_from_a_checkpoint_goes_on_from_its_step(tmp_path: Path) -> None:
    whole = hf.trainer(tmp_path / "whole")
    whole.train()
    first = hf.trainer(tmp_path, save_strategy="steps", save_steps=2)
    first.fail_at = 5
    tracking = track(first, run=Run(tmp_path / "runs", name="a"), diagnosis=None)
    with pytest.raises(RuntimeError, match="the data are broken"):
        first.train()
    assert tracking.tracker.closed
    kept = pytracker.load_run(tmp_path / "runs" / "a")
    assert (kept.state, kept.history.last_step) == ("failed", 4)
    again = hf.trainer(tmp_path, save_strategy="steps", save_steps=2)
    run = Run(tmp_path / "runs", name="a", resume=True)
    with track(again, run=run, diagnosis=None) as tracking:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    check(tracking.tracker, again, first=4)
    np.testing.assert_allclose(tracking.tracker.history["grad_norm"][:], whole.norms, rtol=1e-5)


def test_the_scale_of_fp16_is_taken_out(tmp_path: Path) -> None:
    plain = hf.trainer(tmp_path, max_steps=3, max_grad_norm=0)
    plain.train()
    scaled = hf.trainer(tmp_path, max_steps=3, max_grad_norm=0)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with track(scaled, diagnosis=None) as tracking:
        scaled.train()
    np.testing.assert_allclose(tracking.tracker.history["grad_norm"][:], plain.norms, rtol=1e-5)
    np.testing.assert_allclose(np.array(scaled.norms) / 1024, plain.norms, rtol=1e-5)


def test_a_batch_size_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    class Full(hf.Watched):
        def training_step(self, model: torch.nn.Module, inputs: dict, *rest: object) -> torch.Tensor:
            if len(inputs["input_ids"]) > 3 and self.state.global_step == 1:
                self.norms.clear()
                self.losses.clear()
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *rest)

    trainer = hf.trainer(tmp_path, Full, auto_find_batch_size=True, num_train_epochs=1)
    with track(trainer, run=Run(tmp_path / "runs"), diagnosis=None) as tracking:
        trainer.train()
    check(tracking.tracker, trainer)
    assert len(trainer.norms) == 4  # of 8 batches of 3


def test_a_second_training_goes_on_counting(tmp_path: Path) -> None:
    trainer = hf.trainer(tmp_path, max_steps=2)
    with track(trainer, diagnosis=None) as tracking:
        trainer.train()
        trainer.train()
    check(tracking.tracker, trainer)
    assert len(trainer.norms) == 4


def test_a_trainer_class_can_track_itself(tmp_path: Path) -> None:
    class Mine(TrackedTrainerMixin, hf.Watched):
        tracker_options: ClassVar = {"diagnosis": None}

    trainer = hf.trainer(tmp_path, Mine, max_steps=2)
    trainer.train()
    trainer.tracking.close()
    check(trainer.tracking.tracker, trainer)


def test_what_heirs_of_the_trainer_log_is_recorded(tmp_path: Path) -> None:
    class Rewarded(Trainer):
        def training_step(self, *arguments: object) -> torch.Tensor:
            loss = super().training_step(*arguments)
            if self.accelerator.sync_gradients:
                step = float(self.state.global_step)
                self.log({"rewards/mean": 0.5 + step, "note": "a text", "lr": 3.0 + step})
            return loss

    trainer = hf.trainer(tmp_path, Rewarded, max_steps=2)
    with track(trainer, diagnosis=None) as tracking:
        trainer.train()
    assert tracking.tracker.history["rewards/mean"] == [0.5, 1.5]
    assert tracking.tracker.history["logged/lr"] == [3.0, 4.0]


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(pytracker.InvalidTypeError, match=r"expected a transformers\.Trainer"):
        track(torch.nn.Linear(1, 1))
