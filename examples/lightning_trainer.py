"""Lightning: one callback, in place of logging `grad_norm(self, 2)` in `on_before_optimizer_step`."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pytracker.integrations.lightning import PytrackerCallback


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return (self.layers(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("val_loss", (self.layers(batch[0]) - batch[1]).square().mean())

    # def on_before_optimizer_step(self, optimizer):
    #     self.log_dict(grad_norm(self, norm_type=2))     a kernel and a wait for each parameter

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


pl.seed_everything(0, verbose=False)
x = torch.randn(2048, 20)
data = TensorDataset(x, x.sum(1, keepdim=True))
callback = PytrackerCallback(run="runs")
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], gradient_clip_val=10.0, **quiet)
trainer.fit(Module(), DataLoader(data, 32), DataLoader(data, 512))

history = callback.tracker.history
print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, val_loss {history['val_loss'][-1]:.3f}")
print(*callback.tracker.findings or ["no findings"], sep="\n")
