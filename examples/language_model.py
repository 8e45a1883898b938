"""A GPT-like model of characters, on a text that ships with Python: accumulation, clipping, warm-up, norms by block."""

import pydoc_data.topics

import torch
from torch import nn

import pytracker
from pytracker.sinks import CSVSink

CONTEXT, WIDTH = 32, 48
text = "".join(pydoc_data.topics.topics.values())[:200_000]
letters = sorted(set(text))
data = torch.tensor([letters.index(letter) for letter in text])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(letters), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = {"d_model": WIDTH, "nhead": 4, "dim_feedforward": 4 * WIDTH, "dropout": 0.0, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer, batch_first=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, len(letters))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.letters(x) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
sinks = [CSVSink("language_model.csv", per_parameter="norm", depth=2)]  # blocks.0, blocks.1, ...
with pytracker.Tracker(model, optimizer=optimizer, sinks=sinks, meta={"clip_threshold": 1.0}) as tracker:
    for _ in range(150):
        total = torch.zeros(())
        for _ in range(2):  # micro-batches
            start = torch.randint(len(data) - CONTEXT, (8, 1)) + torch.arange(CONTEXT + 1)
            batch = data[start.clamp(max=len(data) - 1)]
            outputs = model(batch[:, :-1]).flatten(0, 1)
            loss = nn.functional.cross_entropy(outputs, batch[:, 1:].flatten()) / 2
            loss.backward()
            total += loss.detach()
        tracker.step(loss=total)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
print(f"loss {tracker.history['loss'][0]:.3f} -> {tracker.history['loss'][-1]:.3f} of {len(text):,} characters")
