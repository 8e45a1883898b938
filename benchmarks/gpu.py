"""Times the CUDA back end on a GPU, beside what torch, apex and Transformer Engine offer, where they are installed.

python -m benchmarks.gpu docs/results               every contender on every workload; writes <date>-gpu-<name>.md
python -m benchmarks.gpu --dry-run docs/results     one call of each on the smallest workload; times and writes nothing

Results are checked against a float64 norm before anything is timed. Before each timed call the L2 cache is written
over, as a backward pass does; that write also keeps the device busy while the host enqueues, so that the time between
two events is that of the device, and holds gaps only where a contender cannot enqueue as fast as it runs.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import pytracker
from benchmarks import contenders
from benchmarks.contenders import BF16, OURS, TORCH, Call, Contender
from benchmarks.table import duration, markdown
from benchmarks.workloads import DTYPES, ELEMENTS, WORKLOADS, Model, exact_norm

REPEATS = 50
SECONDS = 1.0  # at most, for the calls of one contender
COPY_BYTES = 1 << 30


def foreach_norm(model: torch.nn.Module) -> Call:
    """`torch._foreach_norm` and the norm of the norms: what clip_grad_norm_ is made of."""
    gradients = [p.grad for p in model.parameters()]
    return lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def total_norm(model: torch.nn.Module) -> Call:
    """`torch.nn.utils.get_total_norm`, its result left on the device."""
    gradients = [p.grad for p in model.parameters()]
    return lambda: torch.nn.utils.get_total_norm(gradients)


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


GPU_CONTENDERS = [
    Contender("original loop", contenders.original_loop, TORCH),
    Contender("get_total_norm + item", contenders.get_total_norm, TORCH),
    Contender("get_total_norm", total_norm, TORCH),
    Contender("torch._foreach_norm", foreach_norm, TORCH),
    Contender("torch clip_grad_norm_", contenders.clip_grad_norm, TORCH),
    Contender("apex multi_tensor_l2norm", multi_tensor_l2norm("amp_C", "apex.multi_tensor_apply"), TORCH),
    Contender(
        "Transformer Engine multi_tensor_l2norm",
        multi_tensor_l2norm("transformer_engine_torch", "transformer_engine.pytorch.optimizers"),
        TORCH,
    ),
    Contender("compute_gradient_stats", contenders.pytracker_compute, OURS),
    Contender("gradient_stats, six columns", lambda model: lambda: pytracker.gradient_stats(model)),
    Contender("pytracker clip_grad_norm_", contenders.pytracker_clip, BF16),
    Contender("Tracker.step, six columns", tracker_step),
]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: on the device (median and best), and until it returned to the host (median)."""

    device: float
    best: float
    host: float


def flusher() -> Callable[[], object]:
    """Return a call that writes over the whole L2 cache."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    memory = torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda")
    return memory.zero_


def measure(call: Callable[[], object], flush: Callable[[], object]) -> Timing:
    """Time a call that has been made before."""
    host = []
    while len(host) < REPEATS and sum(host) < SECONDS / 2:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)
    device = []
    for _ in range(len(host)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) / 1e3)
    return Timing(median(device), min(device), median(host))


def copy_bandwidth() -> float:
    """Return the bytes read and written each second by a copy on the device: the yardstick of its memory."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    return 2 * COPY_BYTES / measure(lambda: target.copy_(source), lambda: None).device


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
    except torch.AcceleratorError as error:
        return None, f"cannot run here: {str(error).splitlines()[0]}"
    if got is not None and not math.isclose(got, expected, rel_tol=contender.tolerance or 0):
        return None, f"wrong: {got:.9g}, the norm is {expected:.9g}"
    return call, "as expected" if got is not None else "ran"


def compare(flush: Callable[[], object], copy: float, console: Console) -> Iterator[tuple[str, ...]]:
    """Yield a line of the table for each contender on each workload."""
    for workload, shapes in WORKLOADS.items():
        for name, dtype in DTYPES.items():
            model, expected = on_device(shapes, dtype)
            size = ELEMENTS[workload] * dtype.itemsize
            for contender in GPU_CONTENDERS:
                console.print(f"{workload}, {name}: {contender.name}", style="dim")
                call, said = prepare(contender, model, expected)
                if call is None:
                    yield workload, name, contender.name, said, "", "", "", ""
                    continue
                timing = measure(call, flush)
                rate = size / timing.device
                times = (duration(timing.device), duration(timing.best), duration(timing.host))
                yield workload, name, contender.name, *times, f"{rate / 1e9:.0f}", f"{rate / copy:.0%}"


HEADER = ("workload", "dtype", "contender", "device, median", "device, best", "host", "GB/s", "of the copy's rate")


def dry_run(console: Console) -> None:
    """Make one call of each contender on the smallest workload and say how it went."""
    for name, dtype in DTYPES.items():
        model, expected = on_device(WORKLOADS["MLP, 8 parameters"], dtype)
        for contender in GPU_CONTENDERS:
            _, said = prepare(contender, model, expected)
            console.print(f"{name}, {contender.name}: {said}")


def main() -> None:
    """Read the command line; run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the Markdown file goes")
    parser.add_argument("--dry-run", action="store_true", help="one call of each, no times")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.dry_run:
        dry_run(console)
        return
    if "cudasim" in device:
        sys.exit("times under the simulator mean nothing; --dry-run shows that the benchmark works")
    now = datetime.now(timezone.utc)
    copy = copy_bandwidth()
    lines = list(compare(flusher(), copy, console))
    table = Table(*HEADER)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    text = [
        f"# GPU benchmarks on {device}, {now:%Y-%m-%d %H:%M} UTC",
        f"Command: `python -m benchmarks.gpu`. A copy on the device reads and writes {copy / 1e9:.0f} GB/s; CUDA "
        f"{torch.version.cuda}, torch {torch.__version__}, pytracker {pytracker.__version__}. Device: between two "
        "events, after the L2 cache has been written over. Host: until the call returns, on an idle device. GB/s: "
        f"bytes of gradients over the device's median. Medians of up to {REPEATS} calls. Norms were checked against "
        "float64 first; torch, apex and Transformer Engine compute the norms only, pytracker all six columns.",
        markdown(HEADER, lines),
    ]
    path = arguments.folder / f"{now:%Y-%m-%d}-gpu-{device.replace(' ', '-').lower()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
