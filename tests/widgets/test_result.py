"""What stays of a run in a saved notebook."""

from __future__ import annotations

import pytest

from hynb.runs import RunWriter
from hynb.widgets.curve import Curve
from hynb.widgets.result import result_table


@pytest.mark.parametrize("is_adapter", [True, False])
def test_the_table_has_the_numbers_and_the_folder_of_the_result(tmp_path, start_writer, is_adapter):
    run = start_writer(tmp_path / "run", steps=4)
    if is_adapter:
        (run.output_dir / "checkpoint-4" / "adapter_config.json").write_text("{}")
    table = dict(result_table(run, run.status(), Curve.of(run.events())).rows)
    assert table["state"] == "finished, step 4 of 4"
    assert table["loss"].startswith("1.0000 (first 4.0000")
    assert table["lowest loss"] == "1.0000 at step 4"
    assert table["checkpoints"] == "checkpoint-4"
    assert table["LoRA adapter" if is_adapter else "trained model"] == str(run.output_dir / "checkpoint-4")
    assert table["time"].endswith("from the first step to the last save")


def test_a_run_whose_losses_are_all_nan_has_a_table_too(tmp_path, start_writer):
    run = start_writer(tmp_path / "run", steps=0)
    RunWriter(run.output_dir).event("log", 1, loss=float("nan"))
    table = dict(result_table(run, run.status(), Curve.of(run.events())).rows)
    assert "lowest loss" not in table and table["checkpoints"] == "none"
