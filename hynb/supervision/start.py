"""Prepares what a launch needs in the run folder and on its hosts, and runs the supervisor on it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.cluster import Host, Ssh, hostfile, is_local
from hynb.config import Config
from hynb.errors import ClusterError
from hynb.files import leave_request
from hynb.runs import RunDir
from hynb.supervision.commands import launch_command, paste_text
from hynb.supervision.environment import is_secret, rank_environment
from hynb.supervision.membership import LAUNCH_VARIABLE, Membership
from hynb.supervision.plan import CODE, SSH_SECONDS, Plan, whole_hosts
from hynb.supervision.processes import kill_over_ssh
from hynb.supervision.supervisor import Supervisor

_SECRET_BYTES = 32


@dataclass(kw_only=True, frozen=True)
class Start:
    """What `prepare` hands to the supervisor's process.

    Args:
        record: plain values, for launch.json.
        environment: variables of the supervisor and the launcher beyond this process's own.
        listeners: sockets that the guards connect to; the supervisor inherits their file descriptors.
        files: text by path, for the run folder; their owner alone can read them.
    """

    record: dict[str, Any]
    environment: dict[str, str]
    listeners: list[socket.socket]
    files: dict[Path, str]

    def write_files(self) -> None:
        """Writes what the launcher and the guards need into the run folder.

        Raises:
            OSError: it cannot be written.
        """
        for path, text in self.files.items():
            _write_private(path, text)

    def cancel(self) -> None:
        """Frees what `prepare` has taken."""
        for listener in self.listeners:
            listener.close()


def prepare(plan: Plan, config: Config, run_dir: RunDir, launch_id: str, environment: dict[str, str]) -> Start:
    """Does all that can keep a launch from starting, before anything in the run folder is changed.

    Args:
        environment: what every rank needs on any host.

    Raises:
        ClusterError: a host could not be written to, or no port is free.
    """
    variables = rank_environment(config, environment)
    listeners = _listen(plan.address)
    membership = Membership(
        launch_id=launch_id,
        run_folder=run_dir.path,
        supervisor_host=socket.gethostname(),
        address=plan.address,
        port=listeners[0].getsockname()[1],
        hosts=tuple((host.name, host.slots) for host in plan.hosts),
        secret=secrets.token_hex(_SECRET_BYTES),
        start_seconds=config.start_timeout_seconds,
        silence_seconds=config.silence_timeout_seconds,
        reconnect_attempts=config.reconnect_attempts,
        reconnect_seconds=config.reconnect_seconds,
        devices=plan.devices,
    )
    secret_file = run_dir.secret(launch_id)
    secret_text = membership.secret_text({name: value for name, value in variables.items() if is_secret(name)})
    if plan.ssh is not None:
        _send_secret(plan, plan.ssh, secret_file, secret_text)
    # Slurm passes the environment on itself, and no ssh carries a file to its hosts.
    needs_secret = plan.launcher == "slurm"
    variables |= membership.variables(secret_file=None if needs_secret else secret_file)
    if plan.launcher in ("openmpi", "mpich", "slurm"):
        # The address of rank 0's host is known to the supervisor once it has joined.
        variables["MASTER_PORT"] = str(plan.master_port)
    files = {
        secret_file: secret_text,
        run_dir.hostfile: hostfile.to_text(whole_hosts(plan.hosts)),
        run_dir.deepspeed_env: _deepspeed_env_text(plan, variables),
    }
    if plan.launcher == "no_ssh":
        files[run_dir.paste] = paste_text(plan, run_dir, variables, secret_file)
    record = {
        "id": launch_id,
        "membership": membership.record(),
        "argv": launch_command(plan, run_dir),
        "cwd": str(CODE),
        "needs_secret": needs_secret,
        "ssh": None if plan.ssh is None else str(plan.ssh.config or ""),
        "overwrite": config.overwrite_output_dir,
        "restarts_left": config.max_restarts,
    }
    # The supervisor outlives the processes of its launch, so it does not carry their mark.
    own = {name: value for name, value in variables.items() if name not in (LAUNCH_VARIABLE, "HYNB_SECRET")}
    environment = own | _launcher_environment(plan, run_dir)
    return Start(record=record, environment=environment, listeners=listeners, files=files)


def supervise(
    run_dir: RunDir, launch: dict[str, Any], file_descriptors: list[int], signals: Sequence[int] = ()
) -> dict[str, Any]:
    """Runs what `prepare` has prepared until it has ended; returns the record of its end.

    Args:
        launch: the content of launch.json.
        file_descriptors: of the listening sockets.
        signals: as of Supervisor.
    """
    secret = run_dir.secret(launch["id"]).read_text(encoding="utf-8").splitlines()[0]
    environment = os.environ | {LAUNCH_VARIABLE: launch["id"]}
    if launch["needs_secret"]:
        environment["HYNB_SECRET"] = secret
    return Supervisor(
        Membership.from_record(launch["membership"], secret),
        command=launch["argv"],
        cwd=Path(launch["cwd"]),
        environment=environment,
        listeners=[socket.socket(fileno=number) for number in file_descriptors],
        ssh=_ssh_of(launch),
        overwrite=launch["overwrite"],
        signals=signals,
    ).run()


def kill(run_dir: RunDir, launch: dict[str, Any], *, supervisor_alive: bool, seconds: float) -> None:
    """Ends a run on all its hosts: through its supervisor, or over ssh when that is gone or late.

    Args:
        launch: the content of launch.json.
        supervisor_alive: whether the supervisor runs and can be asked.
        seconds: the longest time that this takes.
    """
    leave_request(run_dir.kill_request, f"{time.time()}\n")
    deadline = time.monotonic() + seconds
    while supervisor_alive and not run_dir.exit.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ssh = _ssh_of(launch)
    if ssh is not None and not run_dir.exit.exists():
        others = [name for name, _ in launch.get("membership", {}).get("hosts", ()) if not is_local(name)]
        kill_over_ssh(ssh, others, launch["id"], seconds=seconds)


def paste_lines(run_dir: RunDir) -> str:
    """What a person pastes on the other hosts of a `no_ssh` run that waits for them; empty for other runs."""
    with contextlib.suppress(OSError):
        return run_dir.paste.read_text(encoding="utf-8")
    return ""


def _deepspeed_env_text(plan: Plan, variables: dict[str, str]) -> str:
    """The variables that DeepSpeed's runner exports on every host."""
    lines = []
    for name, value in variables.items():
        # Those are in a file of their own, or in the environment that Slurm passes on.
        if is_secret(name) or "\n" in value:
            continue
        if plan.launcher == "pdsh":
            # The runner puts the value between double quotes into a shell's command line, and pdsh expands %.
            value = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
        lines.append(f"{name}={value}\n")
    return "".join(lines)


def _send_secret(plan: Plan, ssh: Ssh, path: Path, text: str) -> None:
    quoted, log, run_folder = (shlex.quote(str(item)) for item in (path, path.parent, path.parent.parent))
    # The mode of a new run folder, which its parents do not get.
    script = (
        f"[ -e {quoted} ] || {{ mkdir -p -m 700 {run_folder} && mkdir -p {log} && umask 077 && cat > {quoted}; }}"
    )

    def send(host: Host) -> str:
        answer = ssh.run(host.name, ["sh", "-c", script], deadline_seconds=SSH_SECONDS, input=text)
        if answer.problem or answer.code:
            return f"{host.name}: output_dir cannot be written there: {answer.problem or answer.err.strip()}"
        return ""

    with ThreadPoolExecutor(max(1, len(plan.others))) as pool:
        problems = [problem for problem in pool.map(send, plan.others) if problem]
    if problems:
        raise ClusterError(problems)


def _listen(address: str) -> list[socket.socket]:
    """Sockets on one free port of an address and, for this host's own guard, of loopback."""
    for _ in range(20):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        outer = socket.create_server((address, 0), family=family, backlog=256)
        if address.startswith("127."):
            return [outer]
        try:
            return [outer, socket.create_server(("127.0.0.1", outer.getsockname()[1]), backlog=16)]
        except OSError:
            outer.close()
    raise ClusterError(f"{address}: no port is free on it and on 127.0.0.1")


def _write_private(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _ssh_of(launch: dict[str, Any]) -> Ssh | None:
    """The ssh of a launch's record."""
    path = launch.get("ssh")
    return None if path is None else Ssh(config=Path(path) if path else None)


def _launcher_environment(plan: Plan, run_dir: RunDir) -> dict[str, str]:
    """What the launcher itself needs on this machine."""
    values = {"DS_ENV_FILE": str(run_dir.deepspeed_env)}
    if plan.launcher == "pdsh":
        assert plan.ssh is not None, "pdsh starts the ranks over ssh"
        # ssh must never ask: nobody is there to answer.
        values["PDSH_SSH_ARGS"] = f"-a -x {shlex.join(plan.ssh.options())} %h"
        values["PDSH_RCMD_TYPE"] = "ssh"
    return values
