"""Whole training steps of two known models, with nothing, with pytracker and with what people use instead."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

import pytracker

HEADER = ("training", "with", "ms a step", "more than with nothing", "in percent")
AfterBackward = Callable[[Tensor], object]


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.attention(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """GPT-2 124M, with random weights."""

    def __init__(self, width: int = 768, layers: int = 12, context: int = 1024, vocabulary: int = 50257) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    """Return ResNet-50 with random weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


@dataclass
class Training:
    """A model, its optimizer, and a backward pass that returns the loss."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Callable[[], Tensor]

    def step(self, after: AfterBackward) -> None:
        """Make one step of the training."""
        loss = self.backward()
        after(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_gpt2(batch: int = 8, length: int = 1024) -> Training:
    """GPT-2 124M in bf16 with fused AdamW, on random tokens."""
    model = Gpt2().to("cuda", torch.bfloat16)
    tokens = torch.randint(50257, (batch, length + 1), device="cuda")

    def backward() -> Tensor:
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return Training(f"GPT-2 124M, bf16, batch {batch} x {length}", model, optimizer, backward)


def train_resnet50(batch: int = 128) -> Training:
    """ResNet-50 under bf16 autocast with fused SGD, on random images."""
    model = resnet50().cuda().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")

    def backward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    return Training(f"ResNet-50, bf16 autocast, batch {batch}", model, optimizer, backward)


# ---------------------------------------------------------------------------------------------------------------------
# What is added to a step. Each returns what is called after the backward pass, and what ends it.

Added = tuple[AfterBackward, Callable[[], object]]


def nothing(training: Training) -> Added:
    """The training by itself."""
    return lambda loss: None, lambda: None


def tracked(training: Training) -> Added:
    """`Tracker.step(loss=...)`."""
    tracker = pytracker.Tracker(training.model, training.optimizer)
    return lambda loss: tracker.step(loss=loss), tracker.close


def tracked_on_disk(training: Training) -> Added:
    """The same with a run on disk."""
    folder = tempfile.TemporaryDirectory()
    tracker = pytracker.Tracker(training.model, training.optimizer, run=pytracker.Run(folder.name))

    def end() -> None:
        tracker.close()
        folder.cleanup()

    return lambda loss: tracker.step(loss=loss), end


def clipped_by_tracker(training: Training) -> Added:
    """`Tracker.step(loss=..., clip=1.0)`: watch and clip in one read, the factor applied by the fused optimizer."""
    tracker = pytracker.Tracker(training.model, training.optimizer)
    return lambda loss: tracker.step(loss=loss, clip=1.0), tracker.close


def torch_clips(training: Training) -> Added:
    """The clip_grad_norm_ of torch, which reads and writes all gradients."""
    parameters = list(training.model.parameters())
    return lambda loss: torch.nn.utils.clip_grad_norm_(parameters, 1.0), lambda: None


def pytracker_clips(training: Training) -> Added:
    """The clip_grad_norm_ of pytracker."""
    parameters = list(training.model.parameters())
    return lambda loss: pytracker.clip_grad_norm_(parameters, 1.0), lambda: None


def original_loop(training: Training) -> Added:
    """Every parameter's norm with .item()."""

    def after(loss: Tensor) -> None:
        for _name, param in training.model.named_parameters():
            param.grad.data.norm(2).item()

    return after, lambda: None


def histograms(training: Training) -> Added:
    """A hook on each parameter that brings a histogram of its gradient home: what wandb.watch does, at every step."""

    def hook(gradient: Tensor) -> None:
        flat = gradient.detach().float()
        low, high = flat.min().item(), flat.max().item()
        torch.histc(flat, bins=64, min=low, max=high).cpu().tolist()

    handles = [parameter.register_hook(hook) for parameter in training.model.parameters()]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return lambda loss: None, end


ADDED: dict[str, Callable[[Training], Added]] = {
    "nothing": nothing,
    "Tracker.step": tracked,
    "Tracker.step, run on disk": tracked_on_disk,
    "Tracker.step(clip=1.0)": clipped_by_tracker,
    "torch clip_grad_norm_": torch_clips,
    "pytracker clip_grad_norm_": pytracker_clips,
    "original loop": original_loop,
    "histogram hooks, as wandb.watch": histograms,
}


def seconds_a_step(training: Training, after: AfterBackward, steps: int) -> float:
    """Return the mean time of some steps, the device's work included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        training.step(after)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def compare(make: Callable[[], Training], rounds: int, steps: int) -> Iterator[tuple[str, ...]]:
    """Yield a line for each addition: medians over rounds, in each of which all take their turn."""
    training = make()
    seconds_a_step(training, lambda loss: None, 5)
    times: dict[str, list[float]] = {name: [] for name in ADDED}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, add in ADDED.items():
            if name in failed:
                continue
            try:
                after, end = add(training)
                try:
                    seconds_a_step(training, after, 2)
                    times[name].append(seconds_a_step(training, after, steps))
                finally:
                    end()
            except Exception as error:  # one contender's failure is no other's
                failed[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    alone = median(times["nothing"])
    for name, measured in times.items():
        if name in failed:
            yield training.name, name, failed[name], "", ""
            continue
        more = median(each - base for each, base in zip(measured, times["nothing"], strict=True))
        told = ("", "") if name == "nothing" else (f"{more * 1e6:.0f} us", f"{more / alone:.1%}")
        yield training.name, name, f"{median(measured) * 1e3:.2f}", *told
