"""Logs of other tools, in the formats that these tools write: small ones, made here."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytracker import read_log
from pytracker.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingExtraError,
    RunFormatError,
    RunNotFoundError,
)
from pytracker.logs import is_log


def written(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def columns(history):
    return history.meta["log"]["columns"]


def test_hugging_face_logs_training_and_evaluation_in_rows_of_their_own(tmp_path):
    rows = [
        {"loss": 2.0 - 0.1 * step, "learning_rate": 1e-4, "grad_norm": 1.5, "step": 10 * step} for step in range(1, 6)
    ]
    rows.insert(3, {"eval_loss": 1.9, "eval_runtime": 3.0, "step": 30})
    rows.append({"train_loss": 1.7, "train_runtime": 60.0, "step": 50})
    path = written(tmp_path, "trainer_state.json", json.dumps({"log_history": rows, "max_steps": 50}))
    (history,) = read_log(path)
    assert history["loss"].steps.tolist() == [10, 20, 30, 40, 50]
    assert history["val_loss"] == [1.9]
    assert history["val_loss"].steps.tolist() == [30]
    assert set(columns(history)) == {"loss", "val_loss", "lr", "grad_norm"}
    assert history.meta["log"]["unit"] == "step"
    assert not [name for name in history if "runtime" in name]


def test_of_the_checkpoints_in_a_folder_the_longest_is_read(tmp_path):
    for steps in (2, 4):
        rows = [{"loss": 1.0 / step, "step": step} for step in range(1, steps + 1)]
        written(tmp_path, f"checkpoint-{steps}/trainer_state.json", json.dumps({"log_history": rows}))
    (history,) = read_log(tmp_path)
    assert len(history["loss"]) == 4


def test_lightning_leaves_most_cells_empty(tmp_path):
    lines = ["epoch,lr-Adam,step,train_loss_epoch,train_loss_step,val_loss"]
    for step in range(0, 40, 10):
        lines += [f"0,0.001,{step},,{2.0 - step / 100},"]
    lines += ["0,,39,1.8,,", "0,,39,,,1.9"]
    (history,) = read_log(written(tmp_path, "metrics.csv", "\n".join(lines) + "\n"))
    assert columns(history) == {"loss": "train_loss_step", "val_loss": "val_loss", "lr": "lr-Adam"}
    assert history["loss"].steps.tolist() == [0, 10, 20, 30]
    assert (history["val_loss"][0], history["val_loss"].steps[0]) == (1.9, 39)


def test_keras_counts_epochs(tmp_path):
    text = "epoch,accuracy,loss,val_accuracy,val_loss\n" + "".join(
        f"{epoch},0.{epoch}5,{1 - epoch / 10},0.{epoch}4,{1.1 - epoch / 10}\n" for epoch in range(5)
    )
    (history,) = read_log(written(tmp_path, "training.csv", text))
    assert history.meta["log"]["unit"] == "epoch"
    assert {"loss", "val_loss", "accuracy", "val_accuracy"} <= set(history)


def test_rows_without_a_step_are_counted(tmp_path):
    (history,) = read_log(written(tmp_path, "a.csv", "loss,val_loss\n" + "1.0,1.1\n0.9,1.0\n0.8,0.9\n"))
    assert history["loss"].steps.tolist() == [0, 1, 2]
    assert history.meta["log"] | {"path": ""} == {
        "path": "",
        "format": "Keras CSVLogger",
        "columns": {"loss": "loss", "val_loss": "val_loss"},
        "step": "row",
        "unit": "epoch",
    }


def test_the_losses_of_a_detector_are_added_up_because_its_format_says_so(tmp_path):
    text = "epoch, train/box_loss, train/cls_loss, val/box_loss, val/cls_loss, lr/pg0, lr/pg1\n" + "".join(
        f"{epoch}, 1.0, {2.0 - epoch}, 1.5, 2.5, 0.01, 0.02\n" for epoch in range(3)
    )
    (history,) = read_log(written(tmp_path, "results.csv", text))
    assert history["loss"] == [3.0, 2.0, 1.0]
    assert history["val_loss"] == [4.0, 4.0, 4.0]
    assert {"lr/0", "lr/1"} <= set(history)


def test_parts_of_a_loss_are_not_added_up_where_no_format_says_so(tmp_path):
    text = "step,loss_a,loss_b\n" + "".join(f"{step},1.0,2.0\n" for step in range(4))
    (history,) = read_log(written(tmp_path, "a.csv", text))
    assert "loss" not in history
    assert {"loss_a", "loss_b"} <= set(history)


def test_detectron2_writes_json_lines_and_starts_again_in_the_same_file(tmp_path):
    rows = [{"iteration": step, "total_loss": 2.0, "loss_cls": 1.0, "lr": 0.01} for step in (19, 39, 59, 19, 39)]
    path = written(tmp_path, "metrics.json", "".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_log(path)
    assert (first["loss"].steps.tolist(), second["loss"].steps.tolist()) == ([19, 39, 59], [19, 39])
    assert [each.meta["log"]["run"] for each in (first, second)] == ["run0", "run1"]
    assert first.meta["log"]["format"] == "detectron2 metrics.json"


def test_evaluations_that_count_epochs_do_not_begin_a_run(tmp_path):
    rows = []
    for epoch in range(1, 4):
        rows += [{"loss": 1.0 / epoch, "data_time": 0.1, "iter": 100 * epoch, "step": 100 * epoch, "epoch": epoch}]
        rows += [{"accuracy/top1": 40.0 + epoch, "data_time": 0.1, "step": epoch}]
    (history,) = read_log(written(tmp_path, "scalars.json", "".join(json.dumps(row) + "\n" for row in rows)))
    assert history["loss"].steps.tolist() == [100, 200, 300]
    assert history["accuracy"].steps.tolist() == [100, 200, 300]


def test_a_step_that_begins_again_in_each_epoch_goes_on_counting(tmp_path):
    rows = [
        {"mode": "train", "epoch": epoch, "iter": step, "loss": 1.0, "data_time": 0.1}
        for epoch in (1, 2, 3)
        for step in (50, 100)
    ]
    rows.insert(2, {"mode": "val", "epoch": 1, "iter": 500, "bbox_mAP": 0.3, "loss": 1.2, "lr": 0.01})
    (history,) = read_log(written(tmp_path, "a.log.json", "".join(json.dumps(row) + "\n" for row in rows)))
    assert len(history["loss"]) == 6
    assert (np.diff(history["loss"].steps) > 0).all()
    assert history["val_loss"] == [1.2]


def test_an_export_of_wandb_has_one_run_a_column(tmp_path):
    names = [f"{run} - train/loss{end}" for run in ("brave-sun-1", "calm-sea-2") for end in ("", "__MIN", "__MAX")]
    lines = [",".join(f'"{name}"' for name in ["Step", *names])]
    lines += [f'"{step}","{2 - step / 10}","0","9","","",""' for step in range(0, 6, 2)]
    lines += [f'"{step}","","","","{3 - step / 10}","0","9"' for step in range(1, 6, 2)]
    first, second = read_log(written(tmp_path, "wandb_export.csv", "\n".join(lines)))
    assert [each.meta["log"]["run"] for each in (first, second)] == ["brave-sun-1", "calm-sea-2"]
    assert (first["loss"].steps.tolist(), second["loss"].steps.tolist()) == ([0, 2, 4], [1, 3, 5])
    assert set(first) == {"loss"}


def test_tensorboard_event_files_are_read_by_its_own_reader(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "version_0") as writer:
        for step in range(5):
            writer.add_scalar("train/loss", 1.0 / (step + 1), step)
            writer.add_scalar("val/loss", 2.0, step)
    (history,) = read_log(tmp_path)
    assert history["loss"].values == pytest.approx([1.0 / (step + 1) for step in range(5)], rel=1e-6)
    assert columns(history) == {"loss": "train/loss", "val_loss": "val/loss"}
    assert history.meta["log"]["run"] == "version_0"


def test_a_store_whose_tool_is_missing_says_what_to_install(tmp_path, monkeypatch):
    written(tmp_path, "events.out.tfevents.1", "")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(MissingExtraError, match=r"pytracker\[tensorboard\]"):
        read_log(tmp_path)


def test_mlflow_runs_are_read_by_its_own_client(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run = client.create_run(client.create_experiment("e"), run_name="first")
    for step in range(4):
        client.log_metric(run.info.run_id, "train_loss", 1.0 - step / 10, step=step)
        client.log_metric(run.info.run_id, "val_loss", 2.0, step=step)
    (history,) = read_log(tmp_path / "mlruns")
    assert history["loss"] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert history.meta["log"]["run"] == "first"


TRACKIO = """
import trackio
for name in ("first", "second"):
    trackio.init(project="digits", name=name)
    for step in range(4):
        trackio.log({"train_loss": 1.0 - step / 10, "val_loss": 2.0}, step=step)
    trackio.finish()
"""


def test_trackio_projects_are_read_by_its_own_storage(tmp_path):
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", TRACKIO], env=environment, check=True, capture_output=True)
    histories = read_log(tmp_path / "digits.db")
    assert sorted(history.meta["log"]["run"] for history in histories) == ["first", "second"]
    for history in histories:
        assert history["loss"] == pytest.approx([1.0, 0.9, 0.8, 0.7])
        assert history["val_loss"][:] == [2.0] * 4


def test_two_players_have_losses_that_are_not_meant_to_fall(tmp_path):
    text = "epoch,batch,Gen Loss,Disc Loss\n" + "".join(f"{row // 4},{row % 4},0.7,1.3\n" for row in range(12))
    (history,) = read_log(written(tmp_path, "gan.csv", text))
    assert (columns(history)["loss"], history.meta["objective"]) == ("Gen Loss", "adversarial")
    assert history["loss"].steps.tolist() == list(range(12))


def test_a_header_that_comes_again_begins_a_run(tmp_path):
    part = "episode,step,loss\n1,100,0.5\n2,200,0.4\n3,300,0.3\n"
    assert [
        len(each["loss"]) for each in read_log(written(tmp_path, "a.csv", part + part.replace("1,100,0.5\n", "")))
    ] == [
        3,
        2,
    ]


def test_lines_that_a_training_prints_are_read(tmp_path):
    text = "loading data ...\n" + "".join(
        f"Epoch: {epoch}, Training Loss: {1 / epoch:.4f}, Validation Loss: {2 / epoch:.4f}\n" for epoch in range(1, 6)
    )
    (history,) = read_log(written(tmp_path, "train.log", text))
    assert history["loss"].steps.tolist() == [1, 2, 3, 4, 5]
    assert columns(history) == {"loss": "Training Loss", "val_loss": "Validation Loss"}
    printed = "".join(f"iter {step}: loss {4 - step / 100:.4f}, time 3.0ms\n" for step in range(0, 50, 10))
    (history,) = read_log(written(tmp_path, "nano.log", printed))
    assert history["loss"].steps.tolist() == [0, 10, 20, 30, 40]


def test_cells_that_say_nothing_are_missing_and_tensors_are_numbers(tmp_path):
    text = "step,loss,val_loss\n0,\"tensor(1.5, device='cuda:0')\",\n1,nan,None\n2,0.5,0.25\n3,inf,\n4,0.3,null\n"
    (history,) = read_log(written(tmp_path, "a.csv", text))
    assert history["loss"][0] == 1.5
    assert math.isnan(history["loss"][1])
    assert history["loss"][3] == math.inf
    assert history["val_loss"] == [0.25]
    assert history["val_loss"].steps.tolist() == [2]


def test_a_column_that_is_nan_where_nothing_was_measured_is_sparse(tmp_path):
    text = "step,loss,val_loss\n" + "".join(f"{step},1.0,{2.0 if step % 5 == 4 else 'nan'}\n" for step in range(15))
    (history,) = read_log(written(tmp_path, "a.csv", text))
    assert history["val_loss"].steps.tolist() == [4, 9, 14]
    diverged = "step,loss\n" + "".join(f"{step},{1.0 if step < 5 else 'nan'}\n" for step in range(15))
    (history,) = read_log(written(tmp_path, "b.csv", diverged))
    assert np.isnan(history["loss"].values).sum() == 10


def test_a_damaged_line_is_named_and_left_out(tmp_path):
    path = written(tmp_path, "a.csv", "step,loss\n0,1.0\n1,0.9,7\n2,0.8\nthree,0.7\n4,0.6\n5")
    with pytest.warns(
        RuntimeWarning, match=r"a\.csv: left out line 3: 3 cells under a header of 2; line 5: step is 'thr"
    ):
        (history,) = read_log(path)
    assert history["loss"].steps.tolist() == [0, 2, 4]
    assert len(history.meta["log"]["skipped"]) == 3
    lines = written(tmp_path, "b.json", '{"step": 0, "loss": 1.0}\n{"step": 1, "lo\n{"step": 2, "loss": 0.5}\n')
    with pytest.warns(RuntimeWarning, match="line 2: no JSON"):
        (history,) = read_log(lines)
    assert history["loss"].steps.tolist() == [0, 2]


def test_names_say_what_a_column_is(tmp_path):
    path = written(tmp_path, "a.csv", "it,J,loss\n5,1.0,7\n6,0.9,7\n7,0.8,7\n")
    (history,) = read_log(path, names={"loss": "J", "step": "it"})
    assert (history["loss"][:], history["loss"].steps.tolist()) == ([1.0, 0.9, 0.8], [5, 6, 7])
    with pytest.raises(InvalidValueError, match=r"names\['loss'\].*no column 'K'; it has it, J, loss"):
        read_log(path, names={"loss": "K"})
    with pytest.raises(InvalidTypeError, match=r"names is .*; expected a mapping"):
        read_log(path, names=["loss"])


def test_what_is_no_log_is_refused_by_name(tmp_path):
    with pytest.raises(RunNotFoundError, match="nowhere"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(RunFormatError, match=r"a\.csv: no log that is known"):
        read_log(written(tmp_path, "a.csv", "once upon a time\n"))
    with pytest.raises(RunFormatError, match="no log that is known"):
        read_log(written(tmp_path, "b.json", "{}"))
    (tmp_path / "c.bin").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(RunFormatError, match="no log that is known"):
        read_log(tmp_path / "c.bin")


def test_a_run_of_pytracker_is_no_foreign_log(tmp_path):
    from pytracker import Run

    with Run(tmp_path, name="a") as run:
        run.log(0, loss=1.0)
    assert not is_log(tmp_path / "a")
    assert is_log(written(tmp_path, "b.csv", "step,loss\n0,1\n"))


NUMBERS = st.floats(allow_nan=False) | st.just(math.inf)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(NUMBERS, st.one_of(st.none(), NUMBERS)), min_size=3, max_size=30),
    delimiter=st.sampled_from(",;\t"),
    stride=st.integers(1, 1000),
)
def test_what_is_written_as_csv_is_read_bit_for_bit(tmp_path_factory, rows, delimiter, stride):
    lines = [delimiter.join(("step", "loss", "val_loss"))]
    lines += [
        delimiter.join((str(stride * index), repr(loss), "" if other is None else repr(other)))
        for index, (loss, other) in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("logs") / "a.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    (history,) = read_log(path)
    assert history["loss"][:] == [loss for loss, _ in rows]
    assert history["loss"].steps.tolist() == [stride * index for index in range(len(rows))]
    known = [(stride * index, other) for index, (_, other) in enumerate(rows) if other is not None]
    if known:
        assert list(zip(history["val_loss"].steps.tolist(), history["val_loss"][:], strict=True)) == known


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_no_file_raises_anything_but_what_is_documented(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("logs") / "a.csv"
    path.write_bytes(content)
    with warnings.catch_warnings(), contextlib.suppress(RunFormatError, MissingExtraError):
        warnings.simplefilter("ignore", RuntimeWarning)
        assert all(len(history) for history in read_log(path))


def test_reading_a_log_needs_no_torch(tmp_path):
    path = written(tmp_path, "a.csv", "step,loss\n0,1.0\n1,0.9\n2,0.8\n")
    code = f"import sys, pytracker; pytracker.read_log({str(path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
