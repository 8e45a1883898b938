"""A language model of 1,500 parameters, and a Trainer that keeps what an oracle sees before the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradients
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

WORDS = 20


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    words = torch.randint(WORDS, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]


class Watched(Trainer):
    """Keeps the exact norm and the loss of every step: what the tracker should say."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.fail_at = -1
        self._sum = 0.0

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self._sum += float(loss)
        if self.accelerator.sync_gradients:
            if len(self.norms) == self.fail_at:
                raise RuntimeError("the data are broken")
            self.norms.append(gradients.total(self.model))
            self.losses.append(self._sum)
            self._sum = 0.0
        return loss


def trainer(folder: Path, kind: type[Trainer] = Watched, **arguments: Any) -> Any:
    """Return a Trainer of 3 batches of 4 an epoch and two micro-batches a step: 2 steps an epoch of unequal size."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 0.05,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    parts = {"train_dataset": sentences(24), "eval_dataset": sentences(8)}
    return kind(model(), TrainingArguments(str(folder), **settings), **parts)
