"""The gradients that are measured: the shapes of known models, by formula, and two extremes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

Shape = tuple[int, ...]


def resnet50() -> Iterator[Shape]:
    """Yield the 161 parameter shapes of ResNet-50 (25.6 million elements)."""

    def convolution(outputs: int, inputs: int, kernel: int) -> Iterator[Shape]:
        yield from [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # the last two: batch normalisation

    yield from convolution(64, 3, 7)
    inputs = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            yield from convolution(width, inputs, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from [(1000, 2048), (1000,)]


def gpt2(width: int = 768, layers: int = 12, context: int = 1024, vocabulary: int = 50257) -> Iterator[Shape]:
    """Yield the 148 parameter shapes of GPT-2 124M."""
    yield from [(vocabulary, width), (context, width)]
    for _ in range(layers):
        yield from [(width,), (width,)]
        for inputs, outputs in [(width, 3 * width), (width, width)]:
            yield from [(inputs, outputs), (outputs,)]
        yield from [(width,), (width,)]
        for inputs, outputs in [(width, 4 * width), (4 * width, width)]:
            yield from [(inputs, outputs), (outputs,)]
    yield from [(width,), (width,)]


def mlp() -> Iterator[Shape]:
    """Yield the 8 parameter shapes of a small multi-layer perceptron (64-64-64-64-10)."""
    for outputs in (64, 64, 64, 10):
        yield from [(outputs, 64), (outputs,)]


WORKLOADS: dict[str, list[Shape]] = {
    "one tensor of 1e8": [(100_000_000,)],
    "ResNet-50": list(resnet50()),
    "GPT-2 124M": list(gpt2()),
    "10,000 tensors of 64": [(64,)] * 10_000,
    "100 tensors of 64": [(64,)] * 100,
    "MLP, 8 parameters": list(mlp()),
}
ELEMENTS = {name: sum(math.prod(shape) for shape in shapes) for name, shapes in WORKLOADS.items()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(torch.nn.Module):
    """A module with parameters of the given shapes and random gradients; the parameters' own values are all zero."""

    def __init__(self, shapes: list[Shape], dtype: torch.dtype) -> None:
        """Draw the gradients from a normal distribution of deviation 0.01, always the same ones."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(shapes):
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            parameter.grad = torch.empty(shape, dtype=dtype).normal_(std=0.01, generator=generator)
            self.register_parameter(f"p{index}", parameter)


def exact_norm(model: torch.nn.Module) -> float:
    """Return the total L2 norm of the gradients, from float64 sums of pieces short enough to convert."""
    pieces = (piece for p in model.parameters() for piece in p.grad.flatten().split(1 << 20))
    return math.sqrt(math.fsum(float(piece.double().square().sum()) for piece in pieces))


assert ELEMENTS["ResNet-50"] == 25_557_032
assert ELEMENTS["GPT-2 124M"] == 124_439_808
