"""Starting a run, attaching to it again, and waiting for its end."""

from __future__ import annotations

import asyncio

import pytest
from shown_html import make_config

from hynb.config import to_yaml
from hynb.errors import RunFailedError
from hynb.launch import Run
from hynb.runs import RunWriter
from hynb.widgets import finished, session, start_or_attach

# -- waiting for the end


def test_waiting_prints_plain_lines_and_ends_with_the_run(tmp_path, start_writer, capsys):
    run = start_writer(tmp_path / "run", steps=60, seconds=0.02)
    status = asyncio.run(finished(run))
    assert status.state == "finished"
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert 5 <= len(steps) <= 30
    assert steps[-1].startswith("step 60/60  loss 0.0667")
    assert "saved checkpoint-60 in 0.25 s" in lines
    assert lines[-1] == "finished, step 60 of 60"


def test_evaluations_are_printed(tmp_path, start_writer, capsys):
    run = start_writer(tmp_path, steps=2)
    RunWriter(tmp_path).event("eval", 2, eval_loss=0.5, eval_tokens=1234, eval_perplexity=2.0, eval_seconds=0.5)
    asyncio.run(finished(run))
    assert "evaluation at step 2: loss 0.5000 over 1,234 tokens, perplexity 2" in capsys.readouterr().out


def test_each_phase_before_the_first_step_is_printed(tmp_path, capsys):
    async def run_phases() -> None:
        writer = RunWriter(tmp_path)
        writer.phase("checking data")
        waiting = asyncio.create_task(finished(Run(tmp_path)))
        for phase in ("loading", None):
            printed = ""
            while "starting" not in printed:
                await asyncio.sleep(0.05)
                printed = capsys.readouterr().out
                out.append(printed)
            if phase:
                writer.phase(phase)
        writer.status("finished", global_step=1, max_steps=1)
        await waiting

    out: list[str] = []
    asyncio.run(asyncio.wait_for(run_phases(), 300))
    assert "".join(out).splitlines() == ["starting, checking data", "starting, loading"]


def test_waiting_for_a_failed_run_raises_its_reason(tmp_path, start_writer, capsys):
    run = start_writer(tmp_path / "run", steps=5, fails=3)
    with pytest.raises(RunFailedError) as caught:
        asyncio.run(finished(run))
    assert "the GPU's memory is <not> enough" in str(caught.value)
    assert "the last line <of it>" in str(caught.value)
    assert "lowest loss" in capsys.readouterr().out


# -- starting and attaching


@pytest.fixture
def launches(monkeypatch):
    """The Configs that would be launched; launching itself is tested with real processes elsewhere."""
    launched = []

    def launch(config):
        launched.append(config)
        writer = RunWriter(config.output_dir)
        writer.dir.config.write_text(to_yaml(config.replace(overwrite_output_dir=False)))
        writer.status("running", global_step=1, max_steps=2)
        return Run(config.output_dir)

    monkeypatch.setattr(session, "launch", launch)
    monkeypatch.setattr(session, "_started", {})
    return launched


def end(folder, state):
    RunWriter(folder).status(state, global_step=2, max_steps=2)


def test_starting_again_attaches_to_a_live_or_ended_run(tmp_path, launches, capsys):
    config = make_config(output_dir=str(tmp_path / "run"))
    start_or_attach(config)
    assert "it goes on when this notebook is closed" in capsys.readouterr().out
    start_or_attach(config)
    end(tmp_path / "run", "finished")
    start_or_attach(config)
    assert len(launches) == 1
    assert capsys.readouterr().out.count("attached to the run in ") == 2


def test_a_live_run_with_other_values_is_attached_to_and_the_values_are_named(tmp_path, launches, capsys):
    start_or_attach(make_config(output_dir=str(tmp_path / "run")))
    start_or_attach(make_config(output_dir=str(tmp_path / "run"), max_steps=9))
    assert len(launches) == 1
    assert "which has other values: max_steps = None (here 9)" in capsys.readouterr().out


def test_other_values_for_an_ended_run_are_launched(tmp_path, launches):
    """And refused there, unless the folder may be overwritten."""
    start_or_attach(make_config(output_dir=str(tmp_path / "run")))
    end(tmp_path / "run", "finished")
    start_or_attach(make_config(output_dir=str(tmp_path / "run"), max_steps=9))
    assert len(launches) == 2


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_run_that_did_not_finish_is_resumed_if_the_config_resumes(tmp_path, launches, state):
    config = make_config(output_dir=str(tmp_path / "run"), resume_from_checkpoint="last")
    start_or_attach(config)
    end(tmp_path / "run", state)
    start_or_attach(config)
    assert len(launches) == 2
    end(tmp_path / "run", "finished")
    start_or_attach(config)
    assert len(launches) == 2


def test_overwriting_starts_again_except_after_its_own_finished_run(tmp_path, launches, monkeypatch):
    config = make_config(output_dir=str(tmp_path / "run"), overwrite_output_dir=True)
    start_or_attach(config)
    end(tmp_path / "run", "finished")
    start_or_attach(config)
    assert len(launches) == 1
    monkeypatch.setattr(session, "_started", {})
    start_or_attach(config)
    assert len(launches) == 2
