"""scikit-learn's bundled data sets as standardised float32 tensors, split once into training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

REGRESSION = ("diabetes",)


@dataclass(frozen=True)
class Data:
    """Inputs float32 [n, features]; targets int64 [n] (classification) or float32 [n] (regression)."""

    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    outputs: int

    @property
    def regression(self) -> bool:
        return self.y.is_floating_point()

    def first(self, samples: int) -> Data:
        """Return the same data with only the first ``samples`` to train on."""
        return Data(self.x[:samples], self.y[:samples], self.x_val, self.y_val, self.outputs)


@cache
def load(name: str) -> Data:
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    regression = name in REGRESSION
    stratify = None if regression else y
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.3, random_state=0, stratify=stratify)
    scaler = StandardScaler().fit(x)
    x, x_val = scaler.transform(x), scaler.transform(x_val)
    if regression:
        mean, std = y.mean(), y.std()
        y, y_val = (y - mean) / std, (y_val - mean) / std
    kind = torch.float32 if regression else torch.int64
    tensors = [torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=kind)]
    tensors += [torch.tensor(x_val, dtype=torch.float32), torch.tensor(y_val, dtype=kind)]
    return Data(*tensors, outputs=1 if regression else int(y.max()) + 1)
