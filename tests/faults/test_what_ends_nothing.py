"""A run that was launched in a notebook outlives its kernel and server, and the clock may jump."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import urllib.request
from pathlib import Path

import psutil
from browser import TOKEN, jupyter_server
from conftest import need
from jupyter_client.blocking.client import BlockingKernelClient
from training_runs import config_of, losses
from waiting import wait_until

from hynb.config import to_yaml
from hynb.launch import Run, attach


def post(url: str, path: str) -> dict:
    """A request of JupyterLab's page; returns the answer."""
    headers = {"Authorization": f"token {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", headers=headers, method="POST")) as answer:
        return json.loads(answer.read() or b"{}")


def test_the_end_of_kernel_and_server_and_jumps_of_the_clock(files, ranks, tmp_path, monkeypatch):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need(library is not None, "libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    values = {"num_processes": 1, "lr_scheduler_type": "constant", "min_lr": None, "save_steps": 100_000}
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", **values)
    (tmp_path / "run.yaml").write_text(to_yaml(config.replace(max_steps=100_000)))
    runtime = tmp_path / "settings" / "RUNTIME"
    with jupyter_server("server", tmp_path, tmp_path / "settings") as (server, url):
        kernel = post(url, "api/kernels")["id"]
        client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        wait_until(lambda: is_ready(client), "the kernel")
        faked = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
        faked |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        code = "import os; from hynb.config import read_yaml; from hynb.launch import launch"
        code += f"\nos.environ.update({faked!r})\nlaunch(read_yaml('run.yaml').config(''))"
        reply = client.execute_interactive(code, timeout=300)
        assert reply["content"]["status"] == "ok", reply
        client.stop_channels()
        run = attach(tmp_path / "run")
        wait_for_steps(run, 1)
        post(url, f"api/kernels/{kernel}/interrupt")
        wait_for_steps(run, 5)
        (process,) = (item for item in psutil.Process(server.pid).children() if kernel in " ".join(item.cmdline()))
        process.kill()
        wait_for_steps(run, 5)
        os.kill(server.pid, signal.SIGKILL)
        wait_for_steps(run, 5)
    for shift in ("+2d", "-2d", "+0"):
        clock.write_text(shift)
        wait_for_steps(run, 20)
    written = (tmp_path / "run.yaml").stat().st_mtime
    days = {round((event["time"] - written) / 86400) for event in run.events()}
    assert days == {0, 2, -2}, "the ranks have seen the clock jump"
    status = run.stop(timeout_seconds=300)
    assert status.state == "stopped", status
    whole = ranks.train(config.replace(max_steps=status.global_step, output_dir=str(tmp_path / "whole")))
    assert losses(run) == losses(whole)


def is_ready(client: BlockingKernelClient) -> bool:
    """Whether a kernel that starts answers; until then it counts as dead."""
    with contextlib.suppress(RuntimeError):
        client.wait_for_ready(timeout=10)
        return True
    return False


def wait_for_steps(run: Run, count: int) -> None:
    """Waits for so many more steps of a run that every look sees live."""
    step = run.status().global_step

    def has_them() -> bool:
        status = run.status()
        assert status.state in ("starting", "running"), status
        return status.global_step >= step + count

    wait_until(has_them, f"{count} steps after step {step}")
