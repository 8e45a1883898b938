"""A Lightning module for both packages of Lightning, and a callback that keeps what an oracle sees before the clip."""

from __future__ import annotations

from typing import Any

import gradients
import torch
from torch import nn

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


def loader(batch: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA, DATA.sum(1, keepdim=True)), batch)


def module(package: Any, base: type | None = None, **behaviour: Any) -> Any:
    """Return a module with one optimizer, which logs its validation loss."""

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            self.skipped, self.fail_at = behaviour.get("skipped", ()), behaviour.get("fail_at", -1)

        def training_step(self, batch: Any, index: int) -> Any:
            if self.global_step == self.fail_at:
                raise RuntimeError("the data are broken")
            if self.global_step in self.skipped:
                return None
            loss = (self.layers(batch[0]) - batch[1]).square().mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", (self.layers(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Module()


def oracle(package: Any) -> Any:
    """Return a callback that keeps the exact norm before each step of an optimizer."""

    class Oracle(package.Callback):
        def __init__(self) -> None:
            self.norms: list[float] = []
            self.validations: list[tuple[int, float]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.norms.append(gradients.total(pl_module))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                loss = float(trainer.callback_metrics["val_loss"])
                self.validations.append((trainer.global_step - 1, loss))

    return Oracle()
