"""Names that shells, globs, option parsers and formats treat specially: each works, or is refused with its reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import config_of, losses

from hynb.cli import main
from hynb.errors import ConfigError
from hynb.runs import check_run

NAMES = {
    "a shell's": """$(touch pwned) `touch pwned` ; touch pwned & | > 'one' "two" \\ ~ # !""",
    "a glob's": "all [ab]* of {them}?",
    "a format's": "50% %s %(name)s {0} {name}",
    "an option's": "--config",
    "Chinese": "训练 数据",
    "a line's": "two\nlines\ttab",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_run_its_checkpoints_its_data_and_its_merge(files, ranks, tmp_path, monkeypatch, capsys, name):
    folder = tmp_path / name
    folder.mkdir()
    model, data = folder / f"model {name}", folder / f"{name}.jsonl"
    shutil.copytree(files["hunyuan_v1_dense"], model)
    shutil.copy(files["few"], data)
    values = {"train_data_file": str(data), "max_steps": 2, "save_steps": 1, "use_lora": True, "num_processes": None}
    run_folder = str(folder / f"run {name}")
    if "*" in name:
        refused = config_of(files | {"odd": model}, "odd", Path(run_folder), **values)
        with pytest.raises(ConfigError, match="is read as a pattern where a checkpoint is loaded"):
            check_run(refused)
        run_folder = str(tmp_path / "run")
    config = config_of(files | {"odd": model}, "odd", Path(run_folder), **values)
    assert list(losses(ranks.train(config))) == [1, 2]
    resumed = config.replace(max_steps=3, resume_from_checkpoint="last", allow_changed=["max_steps"])
    assert list(losses(ranks.train(resumed))) == [1, 2, 3]
    monkeypatch.chdir(folder)
    assert main(["checkpoints", run_folder]) == 0 and " 3 " in capsys.readouterr().out
    merged, adapter = folder / f"merged {name}", f"{run_folder}/checkpoint-3"
    paths = [f"--base_model_path={model}", f"--adapter_model_path={adapter}", f"--output_path={merged}"]
    assert main(["merge", *paths]) == 0, capsys.readouterr().err
    assert (merged / "model.safetensors").is_file()
    assert main(["check-data", f"./{name}.jsonl", f"--tokenizer_name_or_path={model}"]) == 0, capsys.readouterr().err
    assert "10 " in capsys.readouterr().out
    assert not list(tmp_path.rglob("pwned"))
