"""Readers of text files: CSV, JSON, JSON lines, and lines of ``name: number``. Each returns tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .names import STEPS, split_of, step_unit, words
from .table import Table, as_number, flat, numbers_of

_DELIMITERS: Final = ",;\t|"
_STEP_WORDS: Final = "|".join(sorted({word for _, names in STEPS for word in names}, key=len, reverse=True))
_NUMBER: Final = r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b)"
_PAIR: Final = re.compile(
    rf"([A-Za-z_][\w/.\- ]*?)\s*[:=]\s*(?:tensor\()?({_NUMBER})(?![\w.])|"
    rf"\b((?:[A-Za-z]+[ _/])?(?:loss|lr)|{_STEP_WORDS})\s+\[?({_NUMBER})(?![\w.])",
    re.IGNORECASE,
)
_COUNTER: Final = re.compile(rf"^\W*({_STEP_WORDS})\s*[:=]?\s*\[?\s*(\d+)\s*/\s*\d+", re.IGNORECASE)
_EXPORTED: Final = re.compile(r"^(?:Group: )?(.+) - (.+?)$")


def read_text(path: Path) -> str:
    """Return a file as text, whatever bytes it has."""
    raw = path.read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return raw.decode(encoding, errors="replace").replace("\0", "")


def read_csv(path: Path, text: str) -> list[Table]:
    """Read a CSV file with a header. A header that comes again begins another run."""
    lines = text.splitlines(keepends=True)
    head = next((line for line in lines if line.strip()), "")
    delimiter = max(_DELIMITERS, key=head.count)
    table = Table(path, _csv_format(next(csv.reader([head], delimiter=delimiter), [])))
    names: list[str] = []
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            table.skip(reader.line_num, str(error))
            continue
        if not any(cell.strip() for cell in cells) or cells[0].startswith("#"):
            continue
        if not names or _is_header(cells, names):
            names = [cell.strip() for cell in cells]
            table.starts.add(len(table.rows))
        elif len(cells) != len(names):
            table.skip(reader.line_num, f"{len(cells)} cells under a header of {len(names)}")
        else:
            _add_cells(table, reader.line_num, names, cells)
    return _one_run_a_column(table) or [_ultralytics(_named_by_its_file(table))]


def _add_cells(table: Table, line: int, names: list[str], cells: list[str]) -> None:
    values, texts = numbers_of(zip(names, cells, strict=True))
    counted = [name for name in texts if step_unit(name)]
    if counted or (texts and not values):
        name = (counted or list(texts))[0]
        table.skip(line, f"{name} is {texts[name]!r:.40}, no number")
    elif values:
        table.add(values, texts)


def _is_header(cells: list[str], names: list[str]) -> bool:
    """Tell whether a row repeats the header, or is another one: it has names where others have numbers."""
    stripped = [cell.strip() for cell in cells]
    if stripped == names:
        return True
    known = sum(cell in names for cell in stripped if cell)
    return known >= 2 and not any(as_number(cell) is not None for cell in stripped)


def _csv_format(names: list[str]) -> str:
    found = {name.strip() for name in names}
    if any(name.startswith("train/box_loss") for name in found):
        return "Ultralytics results.csv"
    if {"epoch", "step"} <= found:
        return "Lightning metrics.csv"
    if "loss" in found and not found & {"step", "train_loss"}:
        return "Keras CSVLogger"
    return "CSV"


def _ultralytics(table: Table) -> Table:
    """Say that the losses of a detector are the parts of one, as its trainer adds them up."""
    if table.format.startswith("Ultralytics"):
        for role, prefix in (("loss", "train/"), ("val_loss", "val/")):
            table.sums[role] = [name for name in table.counts() if name.startswith(prefix) and name.endswith("_loss")]
    return table


def _named_by_its_file(table: Table) -> Table:
    """Give the column "Value" of a file that TensorBoard's page exported the name that its file has."""
    names = set(table.counts())
    if names == {"Wall time", "Step", "Value"}:
        tag = table.path.stem.rpartition("tag-")[2] or table.path.stem
        table.format = "TensorBoard CSV export"
        for row in table.rows:
            row.pop("Wall time", None)
            if "Value" in row:
                row[tag] = row.pop("Value")
    return table


def _one_run_a_column(table: Table) -> list[Table]:
    """Return a table for each run where the columns are "RUN - METRIC", as W&B exports charts; else none."""
    parts = {name: _EXPORTED.match(name) for name in table.counts() if not step_unit(name)}
    known = {name: found for name, found in parts.items() if found is not None}
    if not known or len(known) < 0.8 * len([name for name in parts if not name.startswith("Relative")]):
        return []
    shared = [name for name in table.counts() if name not in known and not name.startswith("Relative")]
    made: dict[str, Table] = {}
    for name, found in known.items():
        run, metric = found.groups()
        if metric.endswith(("__MIN", "__MAX")) or metric.startswith("_"):
            continue
        of_run = made.setdefault(run, Table(table.path, "W&B CSV export", run=run, skipped=table.skipped))
        for index, row in enumerate(table.rows):
            if name in row:
                counted = {each: row[each] for each in shared if each in row} or {"Step": float(index)}
                of_run.add({**counted, metric: row[name]})
    return [_merged(each) for each in made.values()]


def _merged(table: Table) -> Table:
    """Join the rows that count the same step: a run's columns were read one after the other."""
    counts = [name for name in table.counts() if step_unit(name)]
    joined: dict[tuple[float, ...], dict[str, float]] = {}
    for row in table.rows:
        joined.setdefault(tuple(row.get(name, -1.0) for name in counts), {}).update(row)
    table.rows = [joined[key] for key in sorted(joined)]
    table.texts = [{} for _ in table.rows]
    return table


def read_json(path: Path, document: Any) -> list[Table]:
    """Read a JSON file: Hugging Face's trainer_state.json, a Keras history, or a list of records."""
    if isinstance(document, Mapping) and isinstance(document.get("log_history"), list):
        table = _of_records(path, "Hugging Face trainer_state.json", document["log_history"])
        for name in ("logging_steps", "eval_steps", "max_steps", "num_train_epochs"):
            if isinstance(document.get(name), (int, float)):
                table.meta[name] = document[name]
        return [table]
    if isinstance(document, list) and any(isinstance(each, Mapping) for each in document):
        return [_of_records(path, "JSON records", document)]
    if isinstance(document, Mapping):
        series = {name: each for name, each in document.items() if isinstance(each, list) and len(each) > 1}
        if series:
            length = max(map(len, series.values()))
            records = [{name: each[at] for name, each in series.items() if at < len(each)} for at in range(length)]
            return [_of_records(path, "JSON of lists", records)]
    return []


def _of_records(path: Path, format_: str, records: Sequence[Any]) -> Table:
    table = Table(path, format_)
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            table.skip(index + 1, f"a record is {record!r:.40}, no mapping")
            continue
        table.add(*numbers_of(flat(record)))
    return table


def read_json_lines(path: Path, text: str) -> list[Table]:
    """Read JSON lines: detectron2's metrics.json, mmengine's scalars.json, or a home-made log."""
    table = Table(path, "JSON lines")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            table.skip(number, f"no JSON: {error}")
            continue
        if isinstance(record, Mapping):
            values, texts = numbers_of(flat(record))
            if values:
                table.add(values, texts)
        else:
            table.skip(number, f"{record!r:.40} is no record")
    names = table.counts()
    if "total_loss" in names and "iteration" in names:
        table.format = "detectron2 metrics.json"
    elif "data_time" in names and {"iter", "step"} & names.keys():
        table.format = "mmengine scalars.json" if "step" in names else "mmdetection log.json"
        _of_evaluations(table)
    return [table] if table.rows and len(table.skipped) < len(lines) / 2 else []


def _of_evaluations(table: Table) -> None:
    """Name what mmdetection wrote in rows of mode "val" as validation metrics; their "iter" counts something else."""
    for index, texts in enumerate(table.texts):
        if texts.get("mode") in ("val", "test"):
            row = table.rows[index]
            table.rows[index] = {
                (name if split_of(name) or step_unit(name) else f"val_{name}"): value
                for name, value in row.items()
                if name != "iter"
            }


def read_lines(path: Path, text: str) -> list[Table]:
    """Read lines that people and progress bars print: ``epoch: 3, loss: 0.52``, or ``iter 10: loss 4.2``."""
    table = Table(path, "text")
    for line in text.replace("\r", "\n").splitlines():
        found = dict(_pairs(line))
        if any("loss" in words(name) or split_of(name) for name in found) or len(found) > 2:
            table.add(found)
        elif found and all(step_unit(name) for name in found) and table.rows is not None:
            table.texts.append({})
            table.rows.append(found)
    return [table] if sum(len(row) > 1 for row in table.rows) >= 3 else []


def _pairs(line: str) -> Iterator[tuple[str, float]]:
    counter = _COUNTER.match(line)
    if counter is not None:
        yield counter.group(1).lower(), float(counter.group(2))
        line = line[counter.end() :]
    for name, value, other, number in _PAIR.findall(line):
        label = (name or other).strip(" -|").lower() if other else name.strip(" -|")
        if label and not re.match(r"^\d", label):
            yield label, float(value or number)
