"""Files of a run that are damaged before it begins, or cut while it reads them."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from training_runs import config_of

from hynb.config import to_yaml
from hynb.errors import ConfigError
from hynb.launch import attach, launch


def test_a_base_whose_weights_are_cut_is_refused_by_the_file(files, tmp_path):
    model = shutil.copytree(files["hunyuan_v1_dense"], tmp_path / "model")
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(ConfigError, match=rf"{weights}: .* Download or copy the file again"):
        launch(config_of(files | {"cut": model}, "cut", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_cut_is_named_with_its_line_and_the_run_goes_on_once_it_is_restored(
    files, ranks, tmp_path, monkeypatch
):
    data = shutil.copy(files["data"], tmp_path / "train.jsonl")
    half = data.stat().st_size // 2
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.setenv("KEPT_BYTES", str(half))
    values = {"max_steps": 60, "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 1, "min_lr": None}
    config = config_of(files | {"data": data}, "hunyuan_v1_dense", tmp_path / "run", **values)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    done = ranks.run(path, ranks=2, before="faults.breaking:data_is_cut_at_step_3")
    assert done.returncode == 2, done.stderr[-3000:]
    status = attach(config.output_dir).status()
    found = re.search(rf"{data}:(\d+): the file has become shorter since it was checked", status.reason)
    assert status.state == "failed" and found, status
    assert int(found[1]) >= len(data.read_bytes().splitlines()), "a line of the second half"
    assert "in a process that reads batches ahead" in status.reason and "Traceback" not in status.reason
    shutil.copy(files["data"], data)
    last = int(attach(config.output_dir).checkpoints()[-1].name.rpartition("-")[2])
    changed = {"max_steps": last + 1, "allow_changed": ["max_steps"], "resume_from_checkpoint": "last"}
    assert ranks.train(config.replace(**changed)).status().global_step == last + 1
