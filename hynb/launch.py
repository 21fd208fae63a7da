"""Starts a detached `deepspeed` job, and watches, stops or kills it from any process."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from hynb import data_read, hostfile, launch_hosts, run_checks, zero
from hynb.config import Config
from hynb.config_io import to_yaml
from hynb.errors import ClusterError, ConfigError, RunError, RunFailedError
from hynb.node_guard import LAUNCH_VARIABLE, processes_of
from hynb.run_dir import ProcessId, RunDir, RunReader, RunStatus, read_json, replace_text, write_json

_START_SECONDS = 30.0
_KILL_SECONDS = 5.0
_PATHS = (
    *("model_name_or_path", "tokenizer_name_or_path", "output_dir", "hostfile", "ssh_config"),
    "resume_from_checkpoint",
)


class Run:
    """A run known by its folder; any number of these, in any process, may look at the same one."""

    def __init__(self, output_dir: str | Path) -> None:
        self.dir = RunDir(output_dir)
        self.reader = RunReader(output_dir)

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return self.dir.path

    def status(self) -> RunStatus:
        """The state, derived from the run folder and the processes that are there."""
        return self.reader.status()

    def events(self) -> list[dict[str, Any]]:
        """All events in force so far."""
        return self.reader.events()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return self.dir.checkpoints()

    def follow(self, *, timeout_seconds: float | None = None) -> Iterator[tuple[RunStatus, list[dict[str, Any]]]]:
        """Yields the status and the events that are new, about once a second, until the run has ended.

        Raises:
            RunError: the run is still live after the timeout.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            status = self.status()
            yield status, self.reader.new_events()
            if not status.live:
                return
            if deadline is not None and time.monotonic() > deadline:
                raise RunError(f"{self.output_dir}: still {status} after {timeout_seconds:g} seconds")
            time.sleep(0.5)

    def wait(self, *, timeout_seconds: float | None = None, check: bool = False) -> RunStatus:
        """Waits for the end of the run and of its processes.

        Args:
            timeout_seconds: the longest wait; None for no bound.
            check: raise when the run failed.

        Raises:
            RunError: the run is still live after the timeout.
            RunFailedError: with the reason and the end of the log, if `check`.
        """
        reader = RunReader(self.output_dir)
        for status, _ in Run(self.output_dir).follow(timeout_seconds=timeout_seconds):
            last = status
        launcher = self._launcher()
        if launcher is not None:
            # The ranks have said how they ended; the processes take a moment to go.
            deadline = time.monotonic() + 60
            while launcher.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            # Of several hosts the supervisor knows best why the run ended, and says it last.
            last = self.status()
        if check and last.state == "failed":
            raise RunFailedError(f"{self.output_dir}: {last}\nThe end of its log:\n{reader.log_tail()}")
        return last

    def stop(self, *, wait: bool = True, timeout_seconds: float | None = None) -> RunStatus:
        """Asks all ranks to save a checkpoint at the end of their step and to end.

        Args:
            wait: return only when the run has ended.

        Raises:
            RunError: the run is still live after the timeout.
        """
        status = self.status()
        if not status.live:
            return status
        replace_text(self.dir.stop_request, f"{time.time()}\n")
        return self.wait(timeout_seconds=timeout_seconds) if wait else self.status()

    def kill(self) -> RunStatus:
        """Ends every process of the run at once; what came after the last checkpoint is lost."""
        launcher = self._launcher()
        launch = read_json(self.dir.launch)
        if launch is None or launcher is None:
            raise RunError(f"{self.output_dir}: was not started by hynb launch; end it where it was started")
        live = self.status().live
        if "membership" in launch:
            launch_hosts.kill(self.dir, launch, supervisor_alive=launcher.alive() is not False, seconds=_KILL_SECONDS)
        if launcher.alive():
            os.killpg(launcher.pid, signal.SIGKILL)
        left = processes_of(launch["id"])
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)
        deadline = time.monotonic() + 5
        while launcher.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if live:
            kept = self.checkpoints()
            what = f"the last checkpoint is {kept[-1].name}" if kept else "there is no checkpoint"
            reason = f"killed on request; {what}"
            write_json(self.dir.exit, {"state": "stopped", "exit_code": -signal.SIGKILL, "reason": reason})
            # A killed process is seen until the system has cleared it away.
            while self.status().live and time.monotonic() < deadline:
                time.sleep(0.02)
        return self.status()

    def paste_lines(self) -> str:
        """What a person pastes on the other hosts, where launcher is no_ssh and they have not joined; else empty."""
        return launch_hosts.paste_lines(self.dir)

    def _launcher(self) -> ProcessId | None:
        launch = read_json(self.dir.launch)
        return ProcessId(**launch["process"]) if launch else None


def launch(config: Config) -> Run:
    """Checks everything, writes the run folder and starts a detached `deepspeed` job.

    The job outlives this process, the notebook's kernel and the terminal.

    Raises:
        ConfigError: every mistake in the config, at once; nothing was started or overwritten.
        ClusterError: what keeps a run over several hosts from starting, with the host.
        RunError: another launch into the same folder is under way, or the job did not start.
    """
    config = absolute_paths(config)
    if problems := config.check():
        raise ConfigError(problems)
    run_dir = RunDir(config.output_dir)
    run_checks.check_run(config)
    plan = launch_hosts.make_plan(config) if launch_hosts.over_hosts(config) else None
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with _launch_lock(run_dir):
        # Again under the lock: two launches at the same moment must not both go on.
        run_checks.check_run(config)
        run_checks.clear_run_folder(config)
        replace_text(run_dir.config, to_yaml(config.replace(overwrite_output_dir=False)))
        run_dir.log.mkdir(exist_ok=True)
        launch_id = uuid.uuid4().hex
        ours = _environment(config)
        environment = os.environ | ours
        listeners: list[socket.socket] = []
        if config.hostfile is not None:
            hostfile.write(run_dir.hostfile, launch_hosts.whole_hosts(launch_hosts.chosen_hosts(config)))
        if plan is None:
            start = {"id": launch_id, "argv": deepspeed_command(config, run_dir), "cwd": str(Path.cwd())}
            environment |= {LAUNCH_VARIABLE: launch_id}
        else:
            # The supervisor carries no mark of the launch: it is the one that outlives its processes.
            environment.pop(LAUNCH_VARIABLE, None)
            start = {"id": launch_id} | launch_hosts.prepare(plan, config, run_dir, launch_id, ours)
            listeners = start.pop("listeners")
            start["fds"] = [listener.fileno() for listener in listeners]
        with run_dir.launcher_log.open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "hynb.launch", str(run_dir.path), json.dumps(start)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[listener.fileno() for listener in listeners],
                check=False,
            )
        for listener in listeners:
            listener.close()
        deadline = time.monotonic() + _START_SECONDS
        while not run_dir.launch.exists():
            if time.monotonic() > deadline:
                raise RunError(f"{run_dir.path}: the launcher did not start: {run_dir.launcher_log}")
            time.sleep(0.02)
    return Run(run_dir.path)


def attach(output_dir: str | Path) -> Run:
    """The run in a folder, whoever started it, live or ended.

    Raises:
        RunError: there is no run in the folder.
    """
    run = Run(output_dir)
    status = run.status()
    if status.state == "absent":
        raise RunError(f"{output_dir}: {status.reason}")
    return run


def deepspeed_command(config: Config, run_dir: RunDir) -> list[str]:
    """The command that starts the ranks, as a person could type it."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if config.hostfile is None:
        # A path that is not there: DeepSpeed would else take /job/hostfile where a machine has one.
        command += ["--hostfile", str(run_dir.path / "no_hostfile"), "--num_gpus", str(rank_count(config))]
        command += ["--master_addr", "127.0.0.1"]
    else:
        # One host, which is this one: `launch` writes it down in DeepSpeed's form.
        (host,) = launch_hosts.chosen_hosts(config)
        command += ["--hostfile", str(run_dir.hostfile), "--no_ssh_check", "--master_addr", "127.0.0.1"]
        if host.slot_ids is not None:
            command += ["--include", launch_hosts.filter_text(host)]
    command += ["--master_port", str(config.master_port or run_checks.free_port())]
    command += ["--enable_each_rank_log", str(run_dir.log)]
    return [*command, "--module", "hynb.train_entry", str(run_dir.config)]


def command_text(config: Config) -> str:
    """The command in one line, with `deepspeed` by its short name.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name is unknown here.
    """
    run_dir = RunDir(config.output_dir)
    if launch_hosts.over_hosts(config):
        command = launch_hosts.preview(config, run_dir)
    else:
        command = deepspeed_command(config, run_dir)
    if "deepspeed.launcher.runner" not in command:
        return shlex.join(command)
    return shlex.join(["deepspeed", *command[3:]])


def rank_count(config: Config) -> int:
    """Ranks on this machine: its slots, or as many as asked for, else one a GPU, else one on the CPU.

    Raises:
        ClusterError: more ranks than GPUs.
    """
    gpus = gpu_count()
    if config.hostfile is not None:
        return launch_hosts.chosen_hosts(config)[0].slots
    if config.num_processes is None:
        return gpus or 1
    if gpus and config.num_processes > gpus:
        raise ClusterError(f"num_processes = {config.num_processes}: this machine has {gpus} GPUs")
    return config.num_processes


def gpu_count() -> int:
    """NVIDIA GPUs that a job started here would see, without a CUDA context in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len([line for line in answer.stdout.splitlines() if line.startswith("GPU ")])


def absolute_paths(config: Config) -> Config:
    """The same Config with every path absolute, so that it means the same in any directory."""
    changes = {}
    for name in _PATHS:
        value = getattr(config, name)
        if value is not None and not (name == "resume_from_checkpoint" and value == "last"):
            changes[name] = str(Path(value).expanduser().absolute())
    for name in ("train_data_file", "eval_data_file"):
        if (value := getattr(config, name)) is not None:
            changes[name] = data_read.absolute_paths(value)
    if config.deepspeed not in zero.PRESETS and Path(config.deepspeed).expanduser().is_file():
        changes["deepspeed"] = str(Path(config.deepspeed).expanduser().absolute())
    return dataclasses.replace(config, **changes)


def _environment(config: Config) -> dict[str, str]:
    """Variables that DeepSpeed and the ranks need, and no user should have to know."""
    # `python -m deepspeed` finds ninja and pdsh only if the environment's programs are on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    values = {"PATH": path, "PYTHONUNBUFFERED": "1"}
    if gpu_count() == 0:
        threads = max(1, len(os.sched_getaffinity(0)) // rank_count(config))
        values |= {"DS_ACCELERATOR": "cpu"}
        values |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return values


@contextmanager
def _launch_lock(run_dir: RunDir) -> Iterator[None]:
    folder = os.open(run_dir.path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"output_dir = {run_dir.path}: another launch into it is under way") from None
    finally:
        os.close(folder)


def _supervise(output_dir: str, start: dict[str, Any]) -> None:
    """Runs the launcher as the leader of its own session and records how it ended."""
    # The caller gets its process back at once and no zombie later.
    if os.fork():
        os._exit(0)
    # The child of a session's leader is none itself; a group of its own is what `kill` ends.
    os.setpgid(0, 0)
    run_dir = RunDir(output_dir)
    process = vars(ProcessId.of(os.getpid()))
    write_json(run_dir.launch, start | {"process": process, "started_at": time.time()})
    if "membership" in start:
        record = launch_hosts.supervise(run_dir, start)
        write_json(run_dir.exit, record | {"ended_at": time.time()})
        return
    ended = subprocess.run(start["argv"], check=False, stdin=subprocess.DEVNULL)
    reason = ""
    if ended.returncode:
        lines = RunReader(output_dir).log_tail(8)
        reason = f"the launcher ended with exit code {ended.returncode}; the end of the log:\n{lines}"
    else:
        reason = "the launcher ended, but the ranks never reported the end of training"
    record = {"state": "failed", "exit_code": ended.returncode, "reason": reason, "ended_at": time.time()}
    write_json(run_dir.exit, record)


if __name__ == "__main__":
    _supervise(sys.argv[1], json.loads(sys.argv[2]))
