"""The further columns against exact sums and counts, of the native core and of the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_core import DTYPES, LENGTHS, VIEWS, capabilities, random

from pytracker import reference
from pytracker.columns import EXTRA_COLUMNS, EXTRAS, TOTALS
from pytracker.core import native

if native.load()[0] is None:
    pytest.skip(f"there is no native core: {native.load()[1]}", allow_module_level=True)

NORMAL = {"bf16": 2.0**-126, "fp16": 2.0**-14, "e4m3": 2.0**-6}
HIGH = {"bf16": 2.0**126, "fp16": 2.0**14, "e4m3": 2.0**7}


def exact_extras(gradient: torch.Tensor) -> dict[str, float]:
    """Return the further columns of a tensor on the CPU, from numbers that are exact."""
    wide = gradient.detach().to(torch.complex128 if gradient.is_complex() else torch.float64).reshape(-1).numpy()
    size = np.where(np.isnan(wide), np.nan, np.abs(wide))
    columns = {"l1": math.fsum(size) if np.isfinite(size).all() else float(size.sum())}
    for name in NORMAL:
        columns[f"subnormal_{name}"] = float(np.count_nonzero((size > 0) & (size < NORMAL[name])))
        columns[f"near_max_{name}"] = float(np.count_nonzero(size >= HIGH[name]))
    return columns


def row_of(gradients: list[torch.Tensor | None], module=None, grad_scale=None) -> np.ndarray:
    """Return what a log's row has of gradients, on the CPU, as one of the cores writes it."""
    module = module or native.load()[0]
    parameters = []
    for gradient in gradients:
        like = torch.zeros(()) if gradient is None else gradient
        parameters.append(torch.nn.Parameter(torch.empty(like.shape, dtype=like.dtype)))
        parameters[-1].grad = gradient
    plan = module.Plan(parameters, [f"p{i}" for i in range(len(parameters))], "gradient", [])
    log = module.StepLog(plan, 2, 3, True)
    reader = module.StepReader(None, lambda groups: [], set())
    given = {} if grad_scale is None else {"grad_scale": grad_scale}
    log.append(reader, 0, given | {"loss": 0.5})
    return log.rows[0][0].numpy()


def extras(gradients: list[torch.Tensor | None], module=None, grad_scale=None) -> list[dict[str, float]]:
    row = row_of(gradients, module, grad_scale)
    behind = TOTALS + 6 * len(gradients) + 3
    table = row[behind : behind + len(EXTRAS) * len(gradients)].reshape(len(gradients), len(EXTRAS))
    return [dict(zip(EXTRAS, line, strict=True)) for line in table.tolist()]


def assert_extras(gradients: list[torch.Tensor], module=None) -> None:
    for got, gradient in zip(extras(gradients, module), gradients, strict=True):
        expected = exact_extras(gradient)
        assert got.pop("l1") == pytest.approx(expected.pop("l1"), rel=1e-13, nan_ok=True)
        assert got == expected


def spread(length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return values of every exponent that fp32 has, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-140, 128, (length,), generator=generator)
    return (random(length, torch.float64, seed) * 2.0 ** exponents.double()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_has_its_exact_columns(dtype: torch.dtype) -> None:
    assert_extras([make(length, dtype) for length in LENGTHS for make in (random, spread)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [-126, -14, -6, 7, 14, 126])
def test_a_bound_itself_is_normal_or_near_overflow(power: int, dtype: torch.dtype) -> None:
    bound = torch.tensor(2.0**power, dtype=torch.float64)
    around = torch.stack([bound, -bound, bound * (1 - 2**-8), bound * (1 + 2**-7)]).to(dtype)
    assert_extras([around, around[2:3], around[:1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    length=st.integers(0, 200),
    offset=st.integers(0, 33),
    seed=st.integers(0, 2**31),
    value=st.sampled_from([0.0, math.nan, math.inf, -math.inf, 5e-324, 1e-45, 6e-8, 65504.0, 3e38]),
)
def test_any_alignment_and_value_has_its_exact_columns(
    dtype: torch.dtype, length: int, offset: int, seed: int, value: float
) -> None:
    gradient = spread(offset + length + 1, dtype, seed)[offset:]
    gradient[seed % len(gradient)] = value
    assert_extras([gradient])
    assert_extras([gradient], reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("core", ["native", "reference"])
def test_every_view_has_its_exact_columns(view, dtype: torch.dtype, core: str) -> None:
    assert_extras([view(spread(1200, dtype))], reference if core == "reference" else None)


@pytest.mark.parametrize("core", ["native", "reference"])
def test_a_missing_gradient_has_missing_columns_and_a_sparse_one_those_of_what_it_stores(core: str) -> None:
    module = reference if core == "reference" else None
    indices = torch.tensor([[0, 2, 2], [1, 0, 0]])
    sparse = torch.sparse_coo_tensor(indices, torch.tensor([1e-3, 2.0, 300.0]), (3, 4), check_invariants=True)
    missing, of_sparse = extras([None, sparse], module)
    assert all(math.isnan(value) for value in missing.values())
    assert of_sparse == pytest.approx(exact_extras(sparse.to_dense()))


@pytest.mark.parametrize("core", ["native", "reference"])
def test_a_scale_divides_the_norm_and_leaves_the_exponents_that_lie_in_memory(core: str) -> None:
    module = reference if core == "reference" else None
    gradient = torch.tensor([2.0**-8, 2.0**10])
    (got,) = extras([gradient], module, grad_scale=torch.tensor(1024.0))
    assert got == exact_extras(gradient) | {"l1": (2.0**-8 + 2.0**10) / 1024}


def test_what_else_a_row_has_is_the_same_with_them() -> None:
    gradients = [spread(length, dtype) for length in (0, 5, 70_000) for dtype in DTYPES]
    end = TOTALS + 6 * len(gradients)
    row = torch.ops.pytracker.gradient_moments(gradients).numpy()
    np.testing.assert_array_equal(row_of(gradients)[:end], row[:end])


def test_the_columns_say_what_they_count() -> None:
    assert [column.name for column in EXTRA_COLUMNS] == list(EXTRAS)
    for column in EXTRA_COLUMNS[1:]:
        kind, _, name = column.name.rpartition("_")
        assert f"{(NORMAL if kind == 'subnormal' else HIGH)[name]:g}" in column.meaning


BITS = """
import sys

import numpy as np
import torch
from test_extra_columns import extras

torch.set_num_threads(int(sys.argv[1]))
draw = np.random.default_rng(7)  # torch's own random numbers depend on the instruction set
dtypes = (torch.float32, torch.bfloat16, torch.float64)
found = extras([torch.from_numpy(draw.standard_normal(n)).to(d) for n in (3, 2049, 300_001) for d in dtypes])
print([value.hex() for columns in found for value in columns.values()])
"""


def test_the_bits_are_the_same_for_any_threads_and_instruction_set() -> None:
    rows = set()
    for threads, capability in [(1, each) for each in capabilities()] + [(3, capabilities()[-1])]:
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.path.dirname(__file__)}
        run = subprocess.run(
            [sys.executable, "-c", BITS, str(threads)], env=environment, capture_output=True, text=True, check=True
        )
        rows.add(run.stdout)
    assert len(rows) == 1
