"""The Hugging Face Trainer: one line, and every step's gradients before the clip are in the run."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from pytracker.integrations.transformers import track

torch.manual_seed(0)
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
start = torch.randint(32, (512, 1))
data = [{"input_ids": row, "labels": row} for row in (start + torch.arange(16)) % 32]  # each counts on from its start
arguments = TrainingArguments(
    "trainer",
    num_train_epochs=2,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    eval_strategy="epoch",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, eval_dataset=data[:64])

with track(trainer, run="runs") as tracking:  # the one line
    trainer.train()

history = tracking.tracker.history
print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, eval_loss {history['eval_loss'][-1]:.3f}")
print(*tracking.tracker.findings or ["no findings"], sep="\n")
