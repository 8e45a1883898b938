"""Run on two ranks by `torchrun`: each trainer with DDP, Lightning with FSDP2 too, beside the oracle on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import accelerate
import gradients
import hf
import lightning.pytorch as pl
import numpy as np
import pl_model
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker
from pytracker import Tracker
from pytracker.integrations.accelerate import step
from pytracker.integrations.lightning import PytrackerCallback
from pytracker.integrations.transformers import track


def check(tracker: Tracker, norms: list[float]) -> None:
    """The first rank has recorded what every rank has seen."""
    if dist.get_rank() == 0:
        assert len(norms) > 2
        np.testing.assert_allclose(tracker.history["grad_norm"][:], norms, rtol=1e-6)


def transformers_trainer(folder: Path) -> None:
    trainer = hf.trainer(folder, ddp_backend="gloo", eval_strategy="epoch")
    with track(trainer, run=folder / "hf", diagnosis=None, check_replicas=True) as tracking:
        trainer.train()
        trainer.evaluate(hf.sentences(4))
    check(tracking.tracker, trainer.norms)
    if dist.get_rank() == 0:
        names = {info.name for info in tracking.tracker.history.parameters.infos}
        assert names == {name for name, _ in trainer.model.named_parameters()}
        assert len(tracking.tracker.history["eval_loss"]) == 3


def accelerate_loop(folder: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    data = torch.utils.data.DataLoader(pl_model.DATA, 2)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    norms = []
    with Tracker(model, optimizer=optimizer, run=folder / "accelerate", diagnosis=None) as tracker:
        for x in data:
            with accelerator.accumulate(model):
                loss = model(x).square().mean()
                accelerator.backward(loss)
                step(tracker, accelerator, loss=loss)
                if accelerator.sync_gradients:
                    norms.append(gradients.total(model))
                    accelerator.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()
    check(tracker, norms)


class Sharded(type(pl_model.module(pl))):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (self.layers[0], self.layers[2], self):
            fully_shard(part, mesh=mesh)


def lightning_trainer(folder: Path, strategy: str | ModelParallelStrategy, model: pl.LightningModule) -> None:
    seen, callback = pl_model.oracle(pl), PytrackerCallback(run=folder, diagnosis=None)
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        callbacks=[callback, seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=0.01 if strategy == "ddp" else None,
        accumulate_grad_batches=2,
    ).fit(model, pl_model.loader(2), pl_model.loader(12))
    check(callback.tracker, seen.norms)
    if dist.get_rank() == 0:
        names = {info.name for info in callback.tracker.history.parameters.infos}
        assert names == {name for name, _ in pl_model.module(pl).named_parameters()}
        assert len(callback.tracker.history["val_loss"]) == 2


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    transformers_trainer(folder)
    accelerate_loop(folder)
    lightning_trainer(folder / "ddp", "ddp", pl_model.module(pl))
    lightning_trainer(folder / "fsdp", ModelParallelStrategy(2, 1), Sharded())
    dist.barrier()
    if dist.get_rank() == 0:
        for name in ("hf", "accelerate", "ddp", "fsdp"):
            (run,) = pytracker.list_runs(folder / name)
            assert run.state == "finished", run
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
