"""Counts what the CUDA back end asks of a GPU, under the simulator: `make cuda-counters`.

Two tables, printed and written to `<folder>/<date>-cuda-counters.md`: launches, waits, copies, bytes and instructions
of each call on each workload; registers and parameters of each kernel for each architecture. They are exact and
the same on any machine. How long a call takes is for gpu.py to say, on a GPU.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import cudasim
import torch
from rich.console import Console
from rich.table import Table

import pytracker
from benchmarks.contenders import NEVER_CLIPS
from benchmarks.machine_code import registers
from benchmarks.table import markdown
from benchmarks.workloads import WORKLOADS, Model, Shape, exact_norm
from pytracker.core import cuda, packs

EVERY = 10
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
OTHER_DTYPES: list[Shape] = [(16_000_000,)]  # for those that the named workloads are not measured in


def cases() -> Iterator[tuple[str, str, torch.nn.Module, float]]:
    """Yield the name, the dtype, the model on the device and the exact norm of each workload."""
    chosen = [(name, shapes, dtype) for name, shapes in WORKLOADS.items() for dtype in ("fp32", "bf16")]
    chosen += [("one tensor of 1.6e7", OTHER_DTYPES, dtype) for dtype in DTYPES]
    for name, shapes, dtype in chosen:
        model = Model(shapes, DTYPES[dtype])
        norm = exact_norm(model) if not DTYPES[dtype].is_complex else math.nan
        for parameter in model.parameters():
            gradient, parameter.grad = parameter.grad, None
            parameter.data = torch.empty_like(parameter, device="cuda")  # never read
            parameter.grad = gradient.cuda()
        yield name, dtype, model, norm


def gradient_stats(model: torch.nn.Module) -> Callable[[], object]:
    """All six columns of every parameter."""
    return lambda: pytracker.gradient_stats(model)


def tracker_step(model: torch.nn.Module, columns: Sequence[str] = ()) -> Callable[[], object]:
    """The columns, and those on request, loss, accuracy and learning rate into the log."""
    for parameter in model.parameters():
        parameter.data.copy_(torch.zeros(parameter.shape, dtype=parameter.dtype))  # a tracker measures the weights, too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pytracker.Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None, columns=columns)
    losses = itertools.cycle([torch.tensor(value).cuda() for value in (0.5, 0.25)])
    correct = torch.tensor(31).cuda()
    return lambda: tracker.step(loss=next(losses), accuracy=correct, n=32)


def gradient_meter(model: torch.nn.Module) -> Callable[[], object]:
    """The norms into a meter."""
    return pytracker.GradientMeter(model, every=EVERY).update


def clip(model: torch.nn.Module) -> Callable[[], object]:
    """The columns, the clip factor, and the gradients left as they are."""
    parameters = list(model.parameters())
    return lambda: pytracker.clip_grad_norm_(parameters, NEVER_CLIPS)


def count(name: str, call: Callable[[], object], model: torch.nn.Module, calls: int) -> tuple[str, ...]:
    """Return a line of the table: what `calls` calls did, divided by their number."""
    gradients = [parameter.grad for parameter in model.parameters()]
    bytes_each = sum(gradient.nbytes for gradient in gradients)
    elements = sum(gradient.numel() for gradient in gradients)
    for _ in range(2 * EVERY if calls > 1 else 2):  # everything is allocated, and the log has gone around
        call()
    with cudasim.count() as counted:
        for _ in range(calls):
            call()
    copies = counted["memcpy"]
    total = counted["total"]

    def each(number: float) -> str:
        return f"{number / calls:g}"

    return (
        name,
        each(counted["launch_calls"]),
        each(sum(counted["blocking"].values())),
        each(sum(copy["count"] for kind, copy in copies.items() if kind.startswith("H2D"))),
        each(sum(copy["count"] for kind, copy in copies.items() if kind.startswith("D2H"))),
        each(sum(n for kind, n in counted["calls"].items() if kind.startswith(("cudaMalloc", "cudaHostAlloc")))),
        f"{total['global_load_bytes'] / bytes_each / calls:.4f}",
        f"{32 * total['global_load_sectors'] / bytes_each / calls:.4f}",
        f"{total['thread_instructions'] / elements / calls:.2f}",
        each(total["local_load_bytes"] + total["local_store_bytes"]),
    )


CALL_HEADER = (
    "workload",
    "dtype",
    "call",
    "launches",
    "host waits",
    "copies to device",
    "copies to host",
    "allocations",
    "bytes read / gradient byte",
    "sectors read / gradient byte",
    "thread instructions / element",
    "local memory bytes",
)


def count_calls() -> list[tuple[str, ...]]:
    """Return the table of calls, after checking each workload's norm."""
    lines = []
    for workload, dtype, model, norm in cases():
        if not math.isnan(norm):
            got = pytracker.compute_gradient_stats(model)["grad_norm"]
            assert math.isclose(got, norm, rel_tol=1e-7), (workload, dtype, got, norm)
        lines.append((workload, dtype, *count("gradient_stats", gradient_stats(model), model, 1)))
        if workload in ("ResNet-50", "MLP, 8 parameters") and dtype == "fp32":
            lines.append((workload, dtype, *count("clip_grad_norm_", clip(model), model, 1)))
            lines.append((workload, dtype, *count("Tracker.step", tracker_step(model), model, 2 * EVERY)))
            lines.append((workload, dtype, *count("GradientMeter.update", gradient_meter(model), model, 2 * EVERY)))
        if workload == "ResNet-50":
            step = tracker_step(model, ("l1", "exponents"))
            lines.append((workload, dtype, *count("Tracker.step, all columns", step, model, 2 * EVERY)))
    return lines


def describe_kernels() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the lines of the table of kernels, as they are shipped."""
    targets = cuda.manifest()["targets"]
    images = {target: packs.unpack((cuda.PACKS / f"{target}.tar.xz").read_bytes()) for target in targets}
    machines = [target for target in targets if target.startswith("sm_")]
    (ptx,) = (images[target] for target in targets if target.startswith("compute_"))
    lines = []
    for which, pointers in enumerate(packs.SIZES):
        sizes = re.findall(r"\.entry (\w+)\(\s*\.param .*?\[(\d+)\]", ptx[which].decode())
        of_machines = [registers(images[target][which]) for target in machines]
        lines += [
            (kernel, pointers, size, *(str(found[kernel]) for found in of_machines)) for kernel, size in sorted(sizes)
        ]
    return ("kernel", "pointers", "parameter bytes", *machines), lines


def main(folder: str) -> None:
    """Print both tables, and write them."""
    now = datetime.now(timezone.utc)
    calls = count_calls()
    kernel_header, kernels = describe_kernels()
    console = Console(width=None if sys.stdout.isatty() else 220)
    for title, header, lines in [("Calls", CALL_HEADER, calls), ("Registers", kernel_header, kernels)]:
        table = Table(*header, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    text = [
        f"# What the CUDA back end asks of a GPU, {now:%Y-%m-%d %H:%M} UTC",
        "Command: `make cuda-counters`. Counted by the simulator (../shared/cudasim), which executes the PTX that "
        f"is shipped; torch {torch.__version__}, pytracker {pytracker.__version__}. Nothing here is a time: no GPU was "
        "there.",
        "## Calls",
        "Figures are for one call; those of Tracker.step and GradientMeter.update are means over two intervals of "
        f"{EVERY} calls, after two more. Thread instructions are PTX instructions; the machine code has about a "
        "quarter fewer. All six columns of every parameter are computed in each call. The norm of each workload was "
        "checked against float64 first.",
        markdown(CALL_HEADER, calls),
        "## Registers",
        "Registers of a thread in the machine code that is shipped, for launches of few pointers (4 KB of parameters), "
        "some (1,024) and many (3,840). None is spilled: `make kernels` takes that for an error.",
        markdown(kernel_header, kernels),
    ]
    path = Path(folder) / f"{now:%Y-%m-%d}-cuda-counters.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
