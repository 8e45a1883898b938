"""TRL's trainers inherit that of transformers: what is recorded of them is what an oracle sees before the clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradients
import pytest
import torch

pytest.importorskip("trl", reason="the trainers of TRL are not installed")
import datasets
import hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from pytracker.integrations.transformers import track


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(hf.WORDS - 3))]
    known = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences() -> list[dict[str, str]]:
    return [{"text": " ".join(f"w{first * second % 17}" for second in range(1, 5))} for first in range(12)]


def pairs() -> list[dict[str, str]]:
    return [{"prompt": "w1 w2", "chosen": f" w{n % 9} w3", "rejected": f" w{(n + 4) % 9} w5"} for n in range(12)]


def prompts() -> list[dict[str, str]]:
    return [{"prompt": f"w1 w{number % 9}"} for number in range(12)]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


TRAINERS: dict[str, tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, sentences, {"max_length": 8}, {}),
    "DPO": (DPOTrainer, DPOConfig, pairs, {"max_length": 8}, {"ref_model": hf.model}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        prompts,
        {"num_generations": 2, "max_completion_length": 3},
        {"reward_funcs": lambda: length},
    ),
}
LOGGED = {"SFT": "mean_token_accuracy", "DPO": "rewards/margins", "GRPO": "reward"}


@pytest.mark.parametrize("name", TRAINERS)
def test_each_step_of_a_trainer_of_trl_is_recorded_before_the_clip(name: str, tmp_path: Path) -> None:
    kind, config, data, settings, parts = TRAINERS[name]

    class Watched(kind):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.norms: list[float] = []
            self.losses: list[float] = []
            self.summed = 0.0

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **named)
            self.summed += float(loss)
            if self.accelerator.sync_gradients:
                self.norms.append(gradients.total(self.model))
                self.losses.append(self.summed)
                self.summed = 0.0
            return loss

    arguments = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=0.05,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **settings,
    )
    trainer = Watched(
        model=hf.model(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(data()),
        processing_class=tokenizer(),
        **{part: make() for part, make in parts.items()},
    )
    with track(trainer, diagnosis=None) as tracking:
        trainer.train()
    history = tracking.tracker.history
    assert len(trainer.norms) == trainer.state.global_step >= 3
    assert history["grad_norm"][:] == pytest.approx(trainer.norms, rel=1e-9)
    assert max(trainer.norms) > 0.05  # so a clip came, and after the row
    assert history["loss"][:] == pytest.approx(trainer.losses, abs=1e-6)
    assert len(history[LOGGED[name]]) == trainer.state.global_step
    assert history.meta.get("objective") == ("reinforcement" if name == "GRPO" else None)
