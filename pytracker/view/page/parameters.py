"""The parameters of one run as the page reads them: a cell for each parameter and interval, and how norms spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...columns import FORMATS
from ...history import Float64Array, Int64Array, ParameterHistory, update_ratios
from .thinning import groups

ROWS: Final = 200  # parameters; beyond it neighbours share a row, which shows the largest of them
COLUMNS: Final = 300  # intervals; likewise
MARKS: Final = 2000  # non-finite cells marked
PERCENTILES: Final = (0, 10, 25, 50, 75, 90, 100)  # of the norms, over parameters


def parameter_maps(
    parameters: ParameterHistory, packed: Callable[[NDArray[Any]], dict[str, str]]
) -> dict[str, Any] | None:
    """Return the heat maps of norm, zero fraction and largest element, and the bands of norms; None without intervals.

    Where updates were measured also that of their size relative to the parameter; where exponents were counted those of
    the shares that are subnormal. Tables are float32 [rows, columns], NaN where there was no gradient, or nothing
    measured; ``edges`` are the steps between the columns.
    """
    if not len(parameters) or not parameters.infos:
        return None
    rows, columns = groups(len(parameters.infos), ROWS), groups(len(parameters), COLUMNS)
    bad = np.argwhere(_largest(parameters.field("nans") + parameters.field("infs"), rows, columns) > 0)
    shown = bad[np.linspace(0, len(bad) - 1, min(len(bad), MARKS)).astype(np.int64)]
    norms = parameters.field("norm_max")
    tables = {name: parameters.field(name) for name in ("zero_fraction", "abs_max")} | {"norm": norms}
    updates = parameters.field("update_norm")
    if np.isfinite(updates).any():
        tables["update_ratio"] = update_ratios(updates, parameters.field("weight_norm"))
    subnormal = {name: parameters.field(name) for name in (f"subnormal_{format}_fraction" for format in FORMATS)}
    tables |= {name: shares for name, shares in subnormal.items() if np.isfinite(shares).any()}
    return {
        "labels": _labels(parameters.names, rows),
        "grouped": len(rows) < len(parameters.infos),
        "edges": packed(np.append(parameters.first_step[columns], parameters.last_step[-1] + 1)),
        "tables": {name: packed(_largest(table, rows, columns).astype(np.float32)) for name, table in tables.items()},
        "bad": shown.tolist(),
        "bands": {str(which): packed(band) for which, band in zip(PERCENTILES, _bands(norms, columns), strict=True)},
    }


def _labels(names: list[str], rows: Int64Array) -> list[str]:
    ends = [*rows[1:].tolist(), len(names)]
    return [
        names[start] if end - start == 1 else f"{names[start]} ... {names[end - 1]}"
        for start, end in zip(rows.tolist(), ends, strict=True)
    ]


def _largest(values: NDArray[Any], rows: Int64Array, columns: Int64Array) -> Float64Array:
    """Return [rows, columns]: the largest finite value of each cell, NaN where there is none."""
    filled = np.where(np.isfinite(values), values, -np.inf).astype(np.float64)
    table = np.maximum.reduceat(np.maximum.reduceat(filled, columns, axis=0), rows, axis=1).T
    return np.where(np.isneginf(table), np.nan, table)


def _bands(norms: NDArray[Any], columns: Int64Array) -> NDArray[np.float32]:
    """Return [percentiles, columns]: how the norms of the first interval of each column spread over parameters."""
    chosen = norms[columns].astype(np.float64)
    chosen[~np.isfinite(chosen)] = np.nan
    known = ~np.isnan(chosen).all(axis=1)
    bands = np.full((len(PERCENTILES), len(columns)), np.nan, np.float32)
    if known.any():
        bands[:, known] = np.nanpercentile(chosen[known], PERCENTILES, axis=1)
    return bands
