"""A run that was launched in a notebook outlives its kernel and server, and the clock may jump."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
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

# libfaketime changes what a sleep waits for too (0.9.10, clock_nanosleep), as no jump of the clock does.
CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {{
    int result = syscall(SYS_clock_gettime, id, now);
    if (result == 0 && id == CLOCK_REALTIME) {{
        char text[32] = "";
        int file = open("{file}", O_RDONLY | O_CLOEXEC);
        if (file >= 0) {{ if (read(file, text, 31) > 0) now->tv_sec += atol(text); close(file); }}
    }}
    return result;
}}
int gettimeofday(struct timeval *now, void *zone) {{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}}
time_t time(time_t *now) {{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}}
"""
DAY = 86400


def clock_library(folder: Path) -> tuple[Path, Path]:
    """A library for LD_PRELOAD that shifts a process's clock, and the file with the seconds, read at each look."""
    need(shutil.which("cc") is not None, "needs a C compiler")
    file, library = folder / "clock", folder / "clock.so"
    file.write_text("0")
    (folder / "clock.c").write_text(CLOCK.format(file=file))
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, folder / "clock.c"], check=True)
    return library, file


def post(url: str, path: str) -> dict:
    """A request of JupyterLab's page; returns the answer."""
    headers = {"Authorization": f"token {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", headers=headers, method="POST")) as answer:
        return json.loads(answer.read() or b"{}")


def test_the_end_of_kernel_and_server_and_jumps_of_the_clock(files, ranks, tmp_path, monkeypatch):
    library, clock = clock_library(tmp_path)
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
        code = "import os; from hynb.config import read_yaml; from hynb.launch import launch"
        code += f"\nos.environ['LD_PRELOAD'] = {str(library)!r}\nlaunch(read_yaml('run.yaml').config(''))"
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
    for days in (2, -2, 0):
        clock.write_text(f"{days * DAY}")
        wait_for_steps(run, 20)
    written = (tmp_path / "run.yaml").stat().st_mtime
    seen = {round((event["time"] - written) / DAY) for event in run.events()}
    assert seen == {0, 2, -2}, "the ranks have seen the clock jump"
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
