"""The `hynb` command; runs themselves are started by the tests of training and supervision."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc

import pytest
from tiny import tiny_data, tiny_model

from hynb.cli import main
from hynb.config import parameters, read_yaml
from hynb.runs import RunWriter

STEP = {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9.0, "step_seconds": 1.0}
EVALUATION = {"eval_loss": 0.5, "eval_tokens": 100, "eval_perplexity": 1.65, "eval_seconds": 2.0}


# Every command, with arguments that satisfy it.
COMMANDS = {
    "launch": [],
    "status": ["runs/x"],
    "attach": ["runs/x"],
    "stop": ["runs/x"],
    "check": ["--config", "x.yaml"],
    "parameters": [],
    "merge": ["--base_model_path", "b", "--adapter_model_path", "a", "--output_path", "o"],
    "check-data": ["data.jsonl"],
    "preflight": ["--config", "x.yaml"],
    "hosts": ["show"],
    "checkpoints": ["run"],
    "models": ["folder"],
    "ask": ["folder", "question"],
    "demo": [],
}


def usage_error(argv, capsys) -> str:
    """What a command prints when it refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = re.findall(r"^    ([a-z-]+)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_names_itself_where_it_refuses_a_flag(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"usage: hynb {command}" in capsys.readouterr().out
    name = "hynb hosts show" if command == "hosts" else f"hynb {command}"
    for argv in ([command, *COMMANDS[command], "--bogus"], [command, *COMMANDS[command], "--bogus=3"]):
        text = usage_error(argv, capsys)
        assert text.startswith(f"usage: {name} [-h]"), text
        assert text.endswith(f"\n{name}: unknown flag --bogus; see `{name} --help`\n"), text
    if command != "hosts":
        # Also where something else is missing, which may be what the unknown flag meant.
        assert f"{name}: unknown flag --bogus; see" in usage_error([command, "--bogus"], capsys)
    text = usage_error([command, *COMMANDS[command], "-Z"], capsys)
    assert text.startswith(f"usage: {name} [-h]") and text.endswith(f"argument -Z; see `{name} --help`\n"), text


@pytest.mark.parametrize("command", ["status", "attach", "stop", "check", "merge"])
def test_a_missing_argument_is_named_by_the_command(command, capsys):
    text = usage_error([command], capsys)
    assert text.startswith(f"usage: hynb {command} ") and f"\nhynb {command}: the following arguments are" in text


def test_the_nearest_flag_and_the_way_to_give_a_parameter_are_named(capsys):
    assert "unknown flag --folow (did you mean --follow?)" in usage_error(["launch", "--folow"], capsys)
    assert "unknown flag --overwite (did you mean --overwrite?)" in usage_error(["merge", "--overwite"], capsys)
    text = usage_error(["launch", "--learning_rate", "1e-4"], capsys)
    assert "--set learning_rate=VALUE, or in the file of --config" in text


def test_without_a_command_and_with_an_unknown_one_the_commands_are_named(capsys):
    assert "hynb: the following arguments are required: COMMAND; see `hynb --help`" in usage_error([], capsys)
    assert "hynb: unexpected argument --bogus before the command" in usage_error(["--bogus", "status", "x"], capsys)
    text = usage_error(["lunch"], capsys)
    assert "hynb: argument COMMAND: invalid choice: 'lunch'" in text and "launch" in text


def test_a_mistake_ends_in_its_message_alone(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nothing")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("hynb: ") and str(tmp_path / "nothing") in output.err
    assert "Traceback" not in output.err and output.out == ""
    assert main(["launch", "--set", "learning_rate=fast", "--set", "no_such=1"]) == 2
    assert capsys.readouterr().err.count("hynb: ") >= 2


def test_parameters_are_listed_as_text_and_as_yaml(tmp_path, capsys):
    assert main(["parameters"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"--{p.name}" for p in parameters()]
    assert main(["parameters", "--yaml"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert read_yaml(tmp_path / "run.yaml").problems == []


def test_status_shows_the_phase_the_last_step_and_the_checkpoints(tmp_path, capsys):
    writer = RunWriter(tmp_path)
    writer.event("log", 3, **STEP)
    writer.status("running", global_step=3, max_steps=9)
    writer.phase("saving")
    writer.dir.checkpoint(2).mkdir()
    assert main(["status", str(tmp_path)]) == 0
    state, step, checkpoints = capsys.readouterr().out.splitlines()
    assert state == "running, step 3 of 9, saving"
    assert step.startswith("step 3/9  loss 1.0000") and checkpoints == "checkpoints: checkpoint-2"
    writer.status("failed", global_step=3, max_steps=9, reason="out of memory")
    assert main(["status", str(tmp_path)]) == 1
    assert "out of memory" in capsys.readouterr().out


def test_attach_prints_each_phase_and_event_once_until_the_run_ends(tmp_path):
    writer = RunWriter(tmp_path)
    writer.phase("checking data")
    command = [sys.executable, "-m", "hynb.cli", "attach", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "starting, checking data\n"
        writer.phase("loading")
        assert process.stdout.readline() == "starting, loading\n"
        writer.phase("training")
        writer.status("running", global_step=1, max_steps=2)
        writer.event("log", 1, **STEP)
        lines = {process.stdout.readline() for _ in range(2)}
        assert "running, step 1 of 2\n" in lines and any(line.startswith("step 1/2  loss") for line in lines)
        writer.phase("saving")
        assert process.stdout.readline() == "running, step 1 of 2, saving\n"
        writer.phase("training")
        writer.event("save", 1, path="checkpoint-1", seconds=0.5)
        assert process.stdout.readline() == "saved checkpoint-1 in 0.5 s\n"
        writer.event("eval", 2, **EVALUATION)
        assert process.stdout.readline().startswith("evaluation at step 2: loss 0.5000")
        writer.status("finished", global_step=2, max_steps=2)
        assert process.stdout.read() == "finished, step 2 of 2\n"
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_check_notes_what_a_run_changes_in_a_deepspeed_file(tmp_path, capsys):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data.jsonl", 4)
    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {"min_loss_scale": 1e-10}, "zero_optimization": {"stage": 2}}')
    values = {"model_name_or_path": model, "train_data_file": data, "output_dir": tmp_path / "run", "deepspeed": path}
    run = tmp_path / "run.yaml"
    run.write_text("bf16: true\n" + "".join(f"{name}: {value}\n" for name, value in values.items()))
    assert main(["check", "--config", str(run)]) == 0
    out = capsys.readouterr().out
    note = f"hynb: deepspeed = {path}: fp16.min_loss_scale = 1e-10 is left out, because fp16 is off"
    assert note in out and out.index(note) < out.index("no problems found")


def test_a_long_run_is_shown_from_its_end_in_little_memory(tmp_path, capsys):
    writer = RunWriter(tmp_path)
    writer.event("log", 1, **STEP)
    line = writer.dir.events.read_bytes()
    with writer.dir.events.open("ab") as file:
        for _ in range(100):
            file.write(line * 2_000)
    for step in range(200_000, 200_030):
        writer.event("log", step, **STEP)
    for step in range(1000):
        writer.dir.checkpoint(step).mkdir()
    writer.status("finished", global_step=200_029, max_steps=200_029)
    tracemalloc.start()
    assert main(["status", str(tmp_path)]) == 0
    _, step, checkpoints = capsys.readouterr().out.splitlines()
    assert step.startswith("step 200029/200029") and checkpoints.startswith(
        "checkpoints: 990 earlier ones, checkpoint-990,"
    )
    assert main(["attach", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines[0].startswith(f"earlier lines are in {writer.dir.events}; the last 20:")
    assert [line.split("/")[0] for line in lines[1:-1]] == [f"step {number}" for number in range(200_010, 200_030)]
    assert peak < writer.dir.events.stat().st_size / 4
