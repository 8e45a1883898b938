"""Passes over given gradients: statistics, norms and clips, each checked against float64 before it is timed."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch

import pytracker
from benchmarks import contenders
from benchmarks.contenders import BF16, OURS, TORCH, Call, Contender
from benchmarks.gpu.timing import REPEATS, Timing, measure
from benchmarks.table import duration
from benchmarks.workloads import DTYPES, ELEMENTS, WORKLOADS, Model, exact_norm

HEADER = ("workload", "dtype", "contender", "median", "mean", "best", "host", "GB/s", "of the read limit")
QUICK = ("one tensor of 1e8", "GPT-2 124M", "MLP, 8 parameters")
IN_A_GRAPH = 100


def foreach_norm(model: torch.nn.Module) -> Call:
    """`torch._foreach_norm` and the norm of the norms: what clip_grad_norm_ is made of."""
    gradients = [p.grad for p in model.parameters()]
    return lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def total_norm(model: torch.nn.Module) -> Call:
    """`torch.nn.utils.get_total_norm`, its result left on the device."""
    gradients = [p.grad for p in model.parameters()]
    return lambda: torch.nn.utils.get_total_norm(gradients)


def six_columns_of_torch(model: torch.nn.Module) -> Call:
    """The six columns in torch's own operators, by foreach where there is one, stacked and left on the device."""
    gradients = [p.grad for p in model.parameters()]

    def call() -> torch.Tensor:
        norms = torch.stack(torch._foreach_norm(gradients))
        torch.stack(torch._foreach_norm(gradients, math.inf))
        torch.stack([gradient.sum() for gradient in gradients])
        torch.stack([gradient.numel() - gradient.count_nonzero() for gradient in gradients])
        torch.stack([gradient.isnan().sum() for gradient in gradients])
        torch.stack([gradient.isinf().sum() for gradient in gradients])
        return torch.linalg.vector_norm(norms)

    return call


def multi_tensor_l2norm(extension: str, applier: str) -> Callable[[torch.nn.Module], Call]:
    """Return the contender of an extension with the multi_tensor_l2norm that apex began: the total only."""

    def prepare(model: torch.nn.Module) -> Call:
        kernel = importlib.import_module(extension).multi_tensor_l2norm
        apply = importlib.import_module(applier).multi_tensor_applier
        overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
        gradients = [p.grad for p in model.parameters()]
        return lambda: apply(kernel, overflow, [gradients], False)[0]

    return prepare


def tracker_step(model: torch.nn.Module) -> Call:
    """`Tracker.step` with a loss on the device, drains included. Returns no norm."""
    tracker = pytracker.Tracker(model, diagnosis=None)
    loss = torch.tensor(0.5).cuda()
    return lambda: tracker.step(loss=loss)


def tracker_clips(model: torch.nn.Module) -> Call:
    """`Tracker.step` and `Tracker.clip`, under a threshold that is never reached."""
    tracker = pytracker.Tracker(model, diagnosis=None)

    def call() -> torch.Tensor:
        tracker.step()
        return tracker.clip(contenders.NEVER_CLIPS)

    return call


def clipping(clip: Callable[..., torch.Tensor]) -> Callable[[torch.nn.Module], Call]:
    """Return a clip that has to scale at each call: each bound lies below the one before."""

    def prepare(model: torch.nn.Module) -> Call:
        parameters = list(model.parameters())
        bound = float(clip(parameters, math.inf))
        bounds = (bound * 0.99**k for k in itertools.count(1))
        return lambda: clip(parameters, next(bounds))

    return prepare


CONTENDERS = [
    Contender("original loop", contenders.original_loop, TORCH),
    Contender("get_total_norm + item", contenders.get_total_norm, TORCH),
    Contender("get_total_norm", total_norm, TORCH),
    Contender("torch._foreach_norm", foreach_norm, TORCH),
    Contender("six columns in torch's operators", six_columns_of_torch, TORCH),
    Contender("apex multi_tensor_l2norm", multi_tensor_l2norm("amp_C", "apex.multi_tensor_apply"), TORCH),
    Contender(
        "Transformer Engine multi_tensor_l2norm",
        multi_tensor_l2norm("transformer_engine_torch", "transformer_engine.pytorch.optimizers"),
        TORCH,
    ),
    Contender("compute_gradient_stats", contenders.pytracker_compute, OURS),
    Contender("gradient_stats, six columns", lambda model: lambda: pytracker.gradient_stats(model)),
    Contender("Tracker.step, six columns", tracker_step),
    Contender("torch clip_grad_norm_, within the bound", contenders.clip_grad_norm, TORCH),
    Contender("pytracker clip_grad_norm_, within the bound", contenders.pytracker_clip, BF16),
    Contender("Tracker.step and clip, within the bound", tracker_clips, OURS),
    # The last: they change the gradients.
    Contender("torch clip_grad_norm_, clips", clipping(torch.nn.utils.clip_grad_norm_)),
    Contender("pytracker clip_grad_norm_, clips", clipping(pytracker.clip_grad_norm_)),
]


def on_device(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[torch.nn.Module, float]:
    """Return a workload's model on the device and its exact norm."""
    model = Model(shapes, dtype)
    expected = exact_norm(model)
    for parameter in model.parameters():
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.cuda()
        parameter.grad = gradient.cuda()
    return model, expected


def prepare(contender: Contender, model: torch.nn.Module, expected: float) -> tuple[Call | None, str]:
    """Return a call whose result has been checked, or None and why there is none."""
    try:
        call = contender.prepare(model)
        result = call()
        got = None if contender.tolerance is None else float(result)
    except ImportError as error:
        return None, f"not installed ({error})"
    if got is not None and not math.isclose(got, expected, rel_tol=contender.tolerance or 0):
        return None, f"wrong: {got:.9g}, the norm is {expected:.9g}"
    return call, "as expected" if got is not None else "ran"


def cells(timing: Timing, size: int, limit: float) -> tuple[str, ...]:
    """Return a line's figures."""
    rate = size / timing.median
    times = [duration(seconds) for seconds in (timing.median, timing.mean, timing.best, timing.host)]
    return (*times, f"{rate / 1e9:.0f}", f"{rate / limit:.0%}")


def compare(flush: Callable[[], object], limit: float, *, quick: bool) -> Iterator[tuple[str, ...]]:
    """Yield a line for each contender on each workload. What fails is a line, too."""
    for workload in QUICK if quick else WORKLOADS:
        for name, dtype in DTYPES.items():
            model, expected = on_device(WORKLOADS[workload], dtype)
            for contender in CONTENDERS:
                try:
                    call, said = prepare(contender, model, expected)
                    if call is not None:
                        timing = measure(call, flush, 15 if quick else REPEATS)
                        figures = cells(timing, ELEMENTS[workload] * dtype.itemsize, limit)
                        yield workload, name, contender.name, *figures
                        continue
                except Exception as error:  # one contender's failure is no other's
                    said = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
                yield workload, name, contender.name, said, *[""] * 5


def special_values(flush: Callable[[], object], limit: float) -> Iterator[tuple[str, ...]]:
    """Yield how long the six columns take where the values are such as a slow path might be made for."""
    kinds = {"normal": 0.01, "all NaN": math.nan, "all denormal (1e-40)": 1e-40, "all zero": 0.0}
    for kind, value in kinds.items():
        model, _ = on_device(WORKLOADS["GPT-2 124M"], torch.float32)
        if kind != "normal":
            for parameter in model.parameters():
                parameter.grad.fill_(value)
        call = lambda model=model: pytracker.gradient_stats(model)  # noqa: E731
        call()
        yield (
            "GPT-2 124M",
            "fp32",
            f"gradient_stats, {kind}",
            *cells(measure(call, flush), ELEMENTS["GPT-2 124M"] * 4, limit),
        )


def in_graphs(flush: Callable[[], object]) -> Iterator[tuple[str, str, str]]:
    """Yield the time of one pass over a small model, of 100 in a CUDA graph: what a launch costs the device."""
    model, _ = on_device(WORKLOADS["MLP, 8 parameters"], torch.float32)
    gradients = [p.grad for p in model.parameters()]
    passes: dict[str, Call] = {
        "gradient_moments, six columns": lambda: torch.ops.pytracker.gradient_moments(gradients),
        "torch._foreach_norm": foreach_norm(model),
        "get_total_norm": total_norm(model),
    }
    for name, call in passes.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_A_GRAPH):
                call()
        graph.replay()
        timing = measure(graph.replay, flush)
        yield name, duration(timing.median / IN_A_GRAPH), duration(timing.best / IN_A_GRAPH)
