"""Starts a detached `deepspeed` job, and watches, stops or kills it from any process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from hynb.cluster import gpu_count
from hynb.config import Config, absolute_paths, check_config, read_yaml, to_yaml
from hynb.errors import ConfigError, HynbError, RunError, RunFailedError
from hynb.files import is_there, leave_request, replace_text, write_json
from hynb.runs import (
    ProcessId,
    RunDir,
    RunReader,
    RunStatus,
    RunWriter,
    check_batch,
    check_run,
    clear_run_folder,
    killed_reason,
    may_go_on,
    original_folder,
    read_record,
    request_stop,
)
from hynb.supervision import (
    LAUNCH_VARIABLE,
    Plan,
    Restarts,
    Start,
    inherited,
    kill,
    make_plan,
    paste_lines,
    prepare,
    processes_of,
    rank_count,
    rank_environment,
    supervise,
)

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0
_KILL_SECONDS = 5.0
# A network disk may show another machine's new file after a minute (NFS: acdirmax).
_DISTANT_SECONDS = 90.0


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
        for status in self.states(timeout_seconds=timeout_seconds):
            yield status, self.reader.new_events()

    def states(self, *, timeout_seconds: float | None = None) -> Iterator[RunStatus]:
        """Yields the status about twice a second, until the run has ended; reads no events.

        Raises:
            RunError: the run is still live after the timeout.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            status = self.status()
            yield status
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
        last = self.status()
        for status in self.states(timeout_seconds=timeout_seconds):
            last = status
        launcher = self._launcher()
        if launcher is not None:
            # The ranks have recorded how they ended; their processes take a moment to end.
            deadline = time.monotonic() + 60
            while launcher.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            # The supervisor knows best why the run ended, and writes it last.
            last = self.status()
        if check and last.state == "failed":
            # The supervisor's reason ends with the lines of the rank at fault.
            tail = "" if "\nThe end of its log:\n" in last.reason else f"\nThe end of its log:\n{reader.log_tail()}"
            raise RunFailedError(f"{self.output_dir}: {last}{tail}")
        return last

    def stop(self, *, wait: bool = True, timeout_seconds: float | None = None, by: str = "on request") -> RunStatus:
        """Asks all ranks to save a checkpoint at the end of their step and to end.

        Args:
            by: who asks, as a text that follows "stopped".
            wait: return only when the run has ended.

        Raises:
            RunError: the run is still live after the timeout.
        """
        status = self.status()
        if not status.live:
            return status
        request_stop(self.dir, by)
        return self.wait(timeout_seconds=timeout_seconds) if wait else self.status()

    def kill(self, *, wait_seconds: float = _DISTANT_SECONDS) -> RunStatus:
        """Ends every process of the run at once; what came after the last checkpoint is lost.

        Args:
            wait_seconds: on another machine than the launching one, the longest wait for the supervisor there.

        Raises:
            RunError: the run was started in another way, the folder is a copy of its own, or its supervisor is on
                another machine and does not answer.
        """
        launcher = self._launcher()
        launch = read_record(self.dir.launch)
        if launch is None or launcher is None:
            if not self.status().live:
                return self.status()
            raise RunError(f"{self.output_dir}: was not started by hynb launch; end it where it was started")
        if original := original_folder(self.dir):
            raise RunError(
                f"{self.output_dir}: is a copy of {original}, made while that run was live: nothing was ended. "
                f"To end the run: `hynb stop --kill {shlex.quote(str(original))}`"
            )
        if launcher.alive() is None:
            return self._ask_to_kill(launcher.host, wait_seconds)
        live = self.status().live
        kill(self.dir, launch, supervisor_alive=launcher.alive() is not False, seconds=_KILL_SECONDS)
        if launcher.alive():
            os.killpg(launcher.pid, signal.SIGKILL)
        left = processes_of(launch["id"])
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)
        deadline = time.monotonic() + 5
        while launcher.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if live and not self.dir.exit.exists():
            record = {"state": "stopped", "exit_code": -signal.SIGKILL, "reason": killed_reason(self.dir)}
            write_json(self.dir.exit, record | {"id": launch["id"]})
        # A killed process is visible until the system has cleared it away.
        while self.status().live and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.status()

    def _ask_to_kill(self, host: str, seconds: float) -> RunStatus:
        """Asks the supervisor on another machine, which sees the same folder, to end the run.

        Raises:
            RunError: it does not answer.
        """
        if not self.status().live:
            return self.status()
        leave_request(self.dir.kill_request, f"{time.time()}\n")
        deadline = time.monotonic() + seconds
        while self.status().live:
            if time.monotonic() > deadline:
                self.dir.kill_request.unlink(missing_ok=True)
                quoted = shlex.quote(str(self.output_dir))
                raise RunError(
                    f"{self.output_dir}: was launched on {host} (or in a container with that name), and its "
                    f"supervisor has not answered within {seconds:g} seconds: nothing was ended. "
                    f"Run `hynb stop --kill {quoted}` there"
                )
            time.sleep(0.2)
        return self.status()

    def frozen_processes(self) -> list[str]:
        """Processes of the run on this host that are stopped by a signal (SIGSTOP), with their ranks."""
        launch, found = read_record(self.dir.launch), []
        for process in processes_of(launch["id"]) if launch else ():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    rank = process.environ().get("RANK")
                    found.append(f"process {process.pid}" + (f" (rank {rank})" if rank else ""))
        return found

    def paste_lines(self) -> str:
        """What a person pastes on the other hosts, where launcher is no_ssh and they have not joined; else empty."""
        return paste_lines(self.dir)

    def _launcher(self) -> ProcessId | None:
        launch = read_record(self.dir.launch)
        return ProcessId.from_record(launch["process"]) if launch else None


def launch(config: Config) -> Run:
    """Checks everything, writes the run folder and starts a detached `deepspeed` job.

    The job outlives this process, the notebook's kernel and the terminal.

    Raises:
        ConfigError: every mistake in the config, at once; nothing was started or overwritten.
        ClusterError: what keeps a run over several hosts from starting, with the host.
        RunError: another launch into the same folder is under way, or the job did not start.
    """
    config, plan = check_launch(config)
    run_dir = RunDir(config.output_dir)
    is_new = not run_dir.path.exists()
    try:
        run_dir.create(group_readable=config.group_readable)
        try:
            _launch_into(run_dir, config, plan)
        except HynbError:
            if is_new:
                with contextlib.suppress(OSError):
                    run_dir.path.rmdir()
            raise
    except OSError as error:
        raise RunError(f"output_dir = {config.output_dir}: cannot be written: {error.strerror}") from None
    return Run(run_dir.path)


def check_launch(config: Config) -> tuple[Config, Plan]:
    """Checks everything that can be known before a launch, and changes nothing on any host.

    Returns:
        the config with absolute paths, and the plan of its hosts.

    Raises:
        ConfigError: every mistake in the config, at once.
        ClusterError: what keeps a run over several hosts from starting, with the host.
        RunError: a record of an earlier run is damaged.
    """
    if problems := check_config(config):
        raise ConfigError(problems)
    config = absolute_paths(config)
    check_run(config)
    plan = make_plan(config)
    if problems := check_batch(config, sum(host.slots for host in plan.hosts)):
        raise ConfigError(problems)
    rank_environment(config, {})
    return config, plan


def _launch_into(run_dir: RunDir, config: Config, plan: Plan) -> None:
    """Starts a run that was checked; a launch that is refused changes nothing in the folder.

    Raises:
        HynbError: as `launch`.
        OSError: the folder cannot be written.
    """
    with _launch_lock(run_dir):
        # Again under the lock: two launches at the same moment must not both go on.
        check_run(config)
        start = prepare(plan, config, run_dir, uuid.uuid4().hex, _environment(config))
        try:
            _fill_run_folder(run_dir, config, start, live=False)
            _start_supervisor(run_dir, start)
        finally:
            start.cancel()


def _fill_run_folder(run_dir: RunDir, config: Config, start: Start, *, live: bool) -> None:
    """Clears an earlier run's files, as `clear_run_folder`, and writes what a start needs.

    Raises:
        OSError: the folder cannot be written.
    """
    clear_run_folder(config, live=live)
    replace_text(run_dir.config, to_yaml(config.replace(overwrite_output_dir=False)))
    run_dir.log.mkdir(exist_ok=True)
    start.write_files()


def _start_supervisor(run_dir: RunDir, start: Start) -> None:
    """Starts the detached supervisor and waits until it has written launch.json."""
    file_descriptors = [listener.fileno() for listener in start.listeners]
    environment = inherited(os.environ) | start.environment
    environment.pop(LAUNCH_VARIABLE, None)
    command = [sys.executable, "-m", "hynb.launch", str(run_dir.path)]
    with run_dir.launcher_log.open("ab") as log:
        subprocess.run(
            [*command, json.dumps(start.record), json.dumps(file_descriptors)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=file_descriptors,
            check=False,
        )
    deadline = time.monotonic() + _START_SECONDS
    while not run_dir.launch.exists():
        if time.monotonic() > deadline:
            raise RunError(f"{run_dir.path}: the supervisor did not start; its output is in {run_dir.launcher_log}")
        time.sleep(0.02)


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


def _environment(config: Config) -> dict[str, str]:
    """Variables that DeepSpeed and the ranks need, and no user should have to know."""
    # `python -m deepspeed` finds ninja and pdsh only if the environment's programs are on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    values = {"PATH": path, "PYTHONUNBUFFERED": "1"}
    if cache := os.environ.get("XDG_CACHE_HOME"):
        # Unpacked data and token ids are on the disk that it names on the other hosts, too.
        values["XDG_CACHE_HOME"] = cache
    if gpu_count() == 0:
        threads = max(1, len(os.sched_getaffinity(0)) // rank_count(config))
        values |= {"DS_ACCELERATOR": "cpu"}
        values |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return values


@contextlib.contextmanager
def _launch_lock(run_dir: RunDir) -> Iterator[None]:
    folder = os.open(run_dir.path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"output_dir = {run_dir.path}: another launch into it is under way") from None
    finally:
        os.close(folder)


def _supervise(output_dir: str, record: dict[str, Any], file_descriptors: list[int]) -> None:
    """Runs the supervisor as the leader of its own process group and records how the run ended.

    A run that fails is started again as often as `max_restarts` says.
    """
    # The caller gets its process back at once, and no zombie later.
    if os.fork():
        os._exit(0)
    # The child of a session leader leads no session; a group of its own is what `kill` ends.
    os.setpgid(0, 0)
    logging.basicConfig(level=logging.INFO, format="hynb: %(message)s", stream=sys.stdout)
    run_dir = RunDir(output_dir)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    known = {"process": ProcessId.of(os.getpid()).record()}
    write_json(run_dir.launch, record | known | {"started_at": time.time()})
    restarts = None
    if record["restarts_left"]:
        restarts = Restarts(run_dir, read_yaml(str(run_dir.config)).config(str(run_dir.config)))
    end = supervise(run_dir, record, file_descriptors, signals)
    while restarts and may_go_on(run_dir, end) and (start := _start_again(run_dir, restarts, end, known, signals)):
        record = start.record
        end = supervise(run_dir, record, [listener.detach() for listener in start.listeners], signals)
    write_json(run_dir.exit, end | {"id": record["id"], "ended_at": time.time()})


def _start_again(
    run_dir: RunDir, restarts: Restarts, end: dict[str, Any], known: dict[str, Any], signals: Sequence[int]
) -> Start | None:
    """Prepares a run's next start, on whatever hosts are left; None where it stays as it has ended.

    Args:
        end: the record of its end; gets the reason why the run is not started again.
        known: what launch.json says of this process.
        signals: grows when this process gets SIGTERM.
    """

    def is_wanted() -> bool:
        return not (signals or is_there(run_dir.stop_request) or is_there(run_dir.kill_request))

    try:
        with _launch_lock(run_dir):
            config, restart = restarts.after(end, is_wanted)
            plan = restarts.plan(config, is_wanted)
            start = prepare(plan, config, run_dir, uuid.uuid4().hex, _environment(config))
            if not is_wanted():
                start.cancel()
                raise RunError("somebody has asked for its end")
            _fill_run_folder(run_dir, config, start, live=True)
            earlier = (read_record(run_dir.launch) or {}).get("restarts", [])
            start.record["restarts"] = [*earlier, asdict(restart)]
            start.record["restarts_left"] = restarts.left
            writer = RunWriter(run_dir.path)
            # First: a failed run without a restart left is not live.
            writer.status("starting", global_step=restart.global_step)
            write_json(run_dir.launch, start.record | known | {"started_at": time.time()})
            writer.event("restart", **asdict(restart))
    except (HynbError, OSError) as error:
        end["reason"] += f"\nNot started again by itself: {error}"
        where = {name: end[name] for name in ("host", "rank", "terminated") if name in end}
        # A full disk must not keep this process from recording the end.
        with contextlib.suppress(OSError):
            RunWriter(run_dir.path).status(end["state"], exit_code=end["exit_code"], reason=end["reason"], **where)
        return None
    logger.info("restart %d: %s", restart.number, restart.reason)
    os.environ.update(start.environment)
    return start


if __name__ == "__main__":
    _supervise(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
