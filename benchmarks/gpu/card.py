"""The card: what it is, in which state it is, and the most that its memory gives."""

from __future__ import annotations

import subprocess
import time

import torch

from benchmarks.gpu.timing import measure

BYTES = 1 << 30
ASKED = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "ecc.mode.current")

READ_ONLY = """
extern "C" __global__ void read_only(const uint4* data, long long vectors, unsigned* sink) {
  unsigned seen = 0;
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < vectors; i += 4 * stride) {
    const uint4 a = data[i], b = data[i + stride], c = data[i + 2 * stride], d = data[i + 3 * stride];
    seen |= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < vectors; i += stride) seen |= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
  if (seen == 0x9e3779b9u) *sink = seen;  // never, and the compiler does not know
}
"""


def state() -> str:
    """Return what nvidia-smi says of the card now."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not say ({error})"
    values = [value.strip() for value in said.strip().split(",")]
    return ", ".join(f"{name} {value}" for name, value in zip(ASKED, values, strict=False))


def warm_up(seconds: float = 1.0) -> None:
    """Keep the card busy until its clocks are up."""
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            square @ square
        torch.cuda.synchronize()


def copy_rate() -> float:
    """Return the bytes read and written each second by a copy on the device."""
    source, target = (torch.empty(BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    return 2 * BYTES / measure(lambda: target.copy_(source), lambda: None).median


def read_rate() -> float:
    """Return the bytes read each second by a kernel that only reads: the limit of every pass over gradients."""
    kernel = torch.cuda._compile_kernel(READ_ONLY, "read_only")
    data = torch.ones(BYTES // 4, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    best = 0.0
    for blocks in (4, 8):  # of 256 threads on a processor
        grid = (blocks * processors, 1, 1)
        call = lambda grid=grid: kernel(grid=grid, block=(256, 1, 1), args=[data, data.numel() // 4, sink])  # noqa: E731
        call()
        best = max(best, BYTES / measure(call, lambda: None).median)
    return best
