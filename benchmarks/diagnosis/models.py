"""The four architectures of the benchmark. Each maps inputs [batch, features] to [batch, outputs]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROW = 8  # digits are 8 x 8 images; a sequence model reads them row by row


def as_sequence(x: Tensor) -> Tensor:
    """Return [batch, 8, 8] for digits, and one token of one number for each feature otherwise."""
    return x.view(len(x), ROW, ROW) if x.shape[1] == ROW * ROW else x.unsqueeze(-1)


def sequence_length(features: int) -> int:
    """Return the number of tokens that ``as_sequence`` makes of one sample."""
    return ROW if features == ROW * ROW else features


def mlp(
    features: int,
    outputs: int,
    *,
    width: int = 32,
    depth: int = 2,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(features if index == 0 else width, width), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class CNN(nn.Module):
    """Two convolutions: over the image for digits, along the features otherwise."""

    def __init__(self, features: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = features == ROW * ROW
        if self.image:
            self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
            flat = 16 * 4 * 4
        else:
            self.conv1, self.conv2 = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 16, 3, padding=1)
            flat = 16 * features
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(flat, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 1, ROW, ROW) if self.image else x.unsqueeze(1)
        return self.head(self.drop(self.conv2(self.conv1(x).relu()).relu().flatten(1)))


class RNN(nn.Module):
    """A recurrent cell over the sequence and a linear head on the last state."""

    def __init__(self, features: int, outputs: int, cell: str = "GRU", width: int = 24) -> None:
        super().__init__()
        step = ROW if features == ROW * ROW else 1
        self.cell = (
            nn.GRU(step, width, batch_first=True)
            if cell == "GRU"
            else nn.RNN(step, width, batch_first=True, nonlinearity=cell.lower())
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(as_sequence(x))[0][:, -1])


class Transformer(nn.Module):
    """Two pre-norm encoder blocks over the sequence, mean pooling, and a linear head."""

    def __init__(self, features: int, outputs: int, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        length, step = (ROW, ROW) if features == ROW * ROW else (features, 1)
        self.embed = nn.Linear(step, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(as_sequence(x)) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(dim=1))


def build(name: str, features: int, outputs: int, dropout: float) -> nn.Module:
    if name == "mlp":
        return mlp(features, outputs, dropout=dropout)
    if name == "cnn":
        return CNN(features, outputs, dropout)
    if name == "rnn":
        return RNN(features, outputs)
    return Transformer(features, outputs, dropout=dropout)
