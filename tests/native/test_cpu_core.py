"""The CPU core against exact sums: every dtype, length, alignment and layout. `make sanitize` runs it instrumented."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import pytracker
from pytracker.columns import COLUMNS, TOTALS
from pytracker.core import native

if native.load()[0] is None:
    pytest.skip(f"there is no native core: {native.load()[1]}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 2047, 2048, 2049, 5000, 65_535, 65_536, 65_537, 200_003]


def exact_moments(gradient: torch.Tensor) -> list[float]:
    """Return the six moments of a tensor, from sums without rounding errors."""
    wide = gradient.detach().to(torch.complex128 if gradient.is_complex() else torch.float64).reshape(-1).numpy()
    parts = [wide.real, wide.imag] if gradient.is_complex() else [wide]
    size = np.abs(wide)
    finite = np.isfinite(size).all()
    with np.errstate(invalid="ignore"):
        total = math.fsum(parts[0]) if finite else float(parts[0].sum())
        squares = math.fsum(float(x) * float(x) for part in parts for x in part) if finite else float((size**2).sum())
    largest = math.nan if np.isnan(wide).any() else size.max(initial=0.0)
    return [
        total,
        squares,
        float(largest),
        *map(float, ((wide == 0).sum(), np.isnan(wide).sum(), np.isinf(wide).sum())),
    ]


def moments(gradient: torch.Tensor) -> list[float]:
    return torch.ops.pytracker.gradient_moments([gradient])[TOTALS:].tolist()


def assert_moments(gradient: torch.Tensor) -> None:
    got, expected = moments(gradient), exact_moments(gradient)
    elements = max(1, gradient.numel())
    slack = 1e-15 * elements * (0 if math.isnan(expected[2]) or math.isinf(expected[2]) else expected[2])
    assert got[0] == pytest.approx(expected[0], rel=1e-14, abs=slack, nan_ok=True)
    assert got[1] == pytest.approx(expected[1], rel=1e-14, nan_ok=True)
    assert got[2] == pytest.approx(expected[2], rel=1e-15, nan_ok=True)
    assert got[3:] == expected[3:]


def random(length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(length, dtype=wide, generator=generator).to(dtype)
    values[torch.rand(length, generator=generator) < 0.1] = 0
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_has_its_exact_moments(length: int, dtype: torch.dtype) -> None:
    assert_moments(random(length, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(length=st.integers(0, 300), offset=st.integers(0, 33), seed=st.integers(0, 2**31))
def test_any_alignment_has_its_exact_moments(dtype: torch.dtype, length: int, offset: int, seed: int) -> None:
    assert_moments(random(offset + length, dtype, seed)[offset:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    places=st.lists(st.tuples(st.integers(0, 4999), st.sampled_from([math.nan, math.inf, -math.inf, -0.0])), max_size=8)
)
@example(places=[(0, math.nan), (4999, math.inf)])
def test_values_that_are_not_finite_are_counted_and_propagate(
    dtype: torch.dtype, places: list[tuple[int, float]]
) -> None:
    gradient = random(5000, dtype)
    for place, value in places:
        gradient[place] = value
    assert_moments(gradient)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e-19, 1.0, 1e19, 1e30, 3e38])
def test_no_scale_of_fp32_overflows_or_vanishes(scale: float) -> None:
    assert_moments((torch.randn(3000, dtype=torch.float64).clamp(-1, 1) * scale).float())


VIEWS = {
    "transposed": lambda x: x.view(30, 40).t(),
    "every second column": lambda x: x.view(30, 40)[:, ::2],
    "one column": lambda x: x.view(30, 40)[:, 7],
    "an inner block": lambda x: x.view(10, 12, 10)[2:7, 3:9, 1:8],
    "permuted with gaps": lambda x: x.view(10, 12, 10)[:, ::3].permute(2, 0, 1),
    "channels last": lambda x: x.view(2, 4, 10, 15).contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x.view(1200, 1).expand(1200, 3),
    "expanded with gaps": lambda x: x.view(30, 40)[:, ::2].unsqueeze(0).expand(5, 30, 20),
    "a scalar": lambda x: x[5],
    "empty": lambda x: x[:0].view(0, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_view_has_its_exact_moments(view, dtype: torch.dtype) -> None:
    assert_moments(view(random(1200, dtype)))


def test_a_sparse_gradient_counts_what_it_does_not_store_as_zeros() -> None:
    indices, values = torch.tensor([[0, 2, 2], [1, 0, 0]]), torch.tensor([1.0, 2.0, 3.0])
    uncoalesced = torch.sparse_coo_tensor(indices, values, (3, 4), check_invariants=True)
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    parameter.grad = uncoalesced
    (row,) = native.make_plan([parameter], ["embedding"]).reduce()
    assert row[TOTALS:].tolist() == exact_moments(uncoalesced.to_dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_scaling_multiplies_every_element_once_and_rounds_as_torch_does(dtype: torch.dtype, factor: float) -> None:
    gradients = [random(length, dtype) for length in (0, 1, 17, 63, 70_001)]
    gradients.append(random(600, dtype).view(20, 30)[:, ::2])
    if not dtype.is_complex:  # of which torch multiplies the parts by zero, too
        gradients.append(torch.tensor([math.nan, math.inf, -math.inf] * 30).to(dtype))
    gradients.append((random(5000, torch.float64) * 2.0 ** torch.randint(-30, 15, (5000,)).double()).to(dtype))
    expected = [gradient * factor for gradient in gradients]
    torch.ops.pytracker.scale_gradients_(gradients, torch.tensor(factor, dtype=torch.float64))
    for gradient, scaled in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, scaled, rtol=0, atol=0, equal_nan=True)


def test_many_tensors_of_all_dtypes_have_the_totals_of_all() -> None:
    gradients = [random(length % 97, DTYPES[length % len(DTYPES)], length) for length in range(500)]
    row = torch.ops.pytracker.gradient_moments(gradients)
    each = np.array([exact_moments(gradient) for gradient in gradients])
    assert row[TOTALS:].view(-1, len(COLUMNS)).numpy() == pytest.approx(each, rel=1e-14, abs=1e-13)
    assert row[1].item() == pytest.approx(math.fsum(each[:, 1]), rel=1e-14)
    assert row[2].item() == each[:, 2].max()
    assert row[len(COLUMNS)].item() == pytest.approx(each[:, 1].max(), rel=1e-14)


def test_a_log_gives_back_every_row_when_its_ring_is_full() -> None:
    model = torch.nn.Linear(40, 3)
    with pytracker.Tracker(model, every=3, diagnosis=None) as tracker:
        for step in range(20):
            model.weight.grad = torch.full((3, 40), float(step))
            model.bias.grad = None if step % 2 else torch.ones(3)
            tracker.step(loss=float(step), extra=torch.tensor(step))
    _steps, rows = tracker.history.parameters.rows()
    assert rows[:, 0, 2].tolist() == [float(step) for step in range(20)]
    assert np.isnan(rows[1::2, 1]).all()
    assert tracker.history["extra"] == [float(step) for step in range(20)]


BITS = """
import sys

import numpy as np
import torch

import pytracker.core.native

torch.set_num_threads(int(sys.argv[1]))
draw = np.random.default_rng(7)  # torch's own random numbers depend on the instruction set
dtypes = (torch.float32, torch.bfloat16, torch.float64)
tensors = [torch.from_numpy(draw.standard_normal(n)).to(d) for n in (3, 2049, 300_001) for d in dtypes]
print(pytracker.core.native.load()[0].isa(), torch.ops.pytracker.gradient_moments(tensors).numpy().tobytes().hex())
"""


def capabilities() -> list[str]:
    """Return the instruction sets that this processor has, of those that the kernels are compiled for."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    run = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    known = ["DEFAULT", "AVX2", "AVX512"]
    best = run.stdout.strip()
    return [name.lower() for name in known[: known.index(best) + 1]] if best in known else ["default"]


def bits(threads: int, capability: str) -> tuple[str, str]:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [sys.executable, "-c", BITS, str(threads)], env=environment, capture_output=True, text=True, check=True
    )
    isa, row = run.stdout.split()
    return isa, row


def test_the_bits_are_the_same_for_any_threads_and_instruction_set() -> None:
    present = capabilities()
    runs = [bits(threads, capability) for threads in (1, 2, 3) for capability in present]
    assert len({row for _isa, row in runs}) == 1
    assert {isa.lower() for isa, _row in runs} == set(present)


FORKED = """
import os
import signal

import torch

model = torch.nn.Linear(2000, 2000)
model.weight.grad = torch.ones(2000, 2000)
torch.set_num_threads(2)
{first}  # starts the threads
child = os.fork()
if child == 0:
    import pytracker

    signal.alarm(60)  # ends a child that waits for ever
    os._exit(0 if pytracker.compute_gradient_stats(model)["grad_norm"] == 2000 else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(
    "first",
    [
        "import pytracker; assert pytracker.compute_gradient_stats(model)['grad_norm'] == 2000",
        "import pytracker; assert model.weight.grad.sum() == 4_000_000",
        "assert model.weight.grad.sum() == 4_000_000",
    ],
    ids=["the core", "torch, with pytracker imported", "torch alone"],
)
def test_the_child_of_a_fork_measures_though_its_parent_had_threads(first: str) -> None:
    script = FORKED.replace("{first}", first)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
