"""Plans a run over several hosts: who takes part, how each is reached, the command and its environment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import shlex
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hynb.cluster import Host, Ssh, is_local
from hynb.config import Config
from hynb.errors import ClusterError
from hynb.files import replace_text
from hynb.runs import RunDir
from hynb.supervision.commands import _paste_text, command
from hynb.supervision.node_guard import Membership
from hynb.supervision.plan import _SSH_SECONDS, CODE, Plan
from hynb.supervision.supervisor import Supervisor, kill_over_ssh

# What the launching process has of these goes to the ranks of all hosts, as it would on one.
_FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "HF_HOME", "CUDA_HOME", "DS_SKIP", "OMP_NUM_THREADS")
_SECRET_BYTES = 32


def prepare(
    plan: Plan, config: Config, run_dir: RunDir, launch_id: str, environment: dict[str, str]
) -> dict[str, Any]:
    """Writes what the launcher needs into the run folder and to the other hosts.

    Args:
        environment: what every rank needs on any host.

    Returns:
        What `supervise` takes, plain values alone, and the listening sockets' file descriptors as `fds`.

    Raises:
        ClusterError: a host could not be written to, or no port is free.
    """
    listeners = _listen(plan.address)
    secret = secrets.token_hex(_SECRET_BYTES)
    membership = Membership(
        launch_id=launch_id,
        run_folder=run_dir.path,
        supervisor_host=socket.gethostname(),
        address=plan.address,
        port=listeners[0].getsockname()[1],
        hosts=tuple((host.name, host.slots) for host in plan.hosts),
        secret=secret,
        start_seconds=config.start_timeout_seconds,
    )
    _write_secret(run_dir.secret(launch_id), secret)
    if plan.reach is not None:
        _send_secret(plan, run_dir.secret(launch_id), secret)
    # Slurm hands the environment itself on, and no ssh took a file to its hosts.
    secret_file = None if plan.launcher == "slurm" else run_dir.secret(launch_id)
    variables = rank_environment(config, environment) | membership.variables(secret_file=secret_file)
    if plan.launcher in ("openmpi", "mpich", "slurm"):
        # Where rank 0 is, the supervisor knows when it has joined.
        variables["MASTER_PORT"] = str(plan.master_port)
    exported = {name: value for name, value in variables.items() if name != "HYNB_SECRET"}
    # For its owner alone, as the user's own variables may be.
    _write_secret(run_dir.deepspeed_env, "".join(f"{name}={value}\n" for name, value in exported.items()))
    if plan.launcher == "no_ssh":
        pasted = variables | {"HYNB_SECRET": secret}
        pasted.pop("HYNB_SECRET_FILE")
        _write_secret(run_dir.paste, _paste_text(plan, run_dir, pasted))
    described = dataclasses.asdict(membership) | {"run_folder": str(run_dir.path)}
    described.pop("secret")
    return {
        "membership": described,
        "argv": command(plan, run_dir),
        "cwd": str(CODE),
        "needs_secret": secret_file is None,
        "launcher_environment": _launcher_environment(plan, run_dir),
        "ssh": None if plan.reach is None else str(plan.reach.config or ""),
        "overwrite": config.overwrite_output_dir,
        "listeners": listeners,
    }


def supervise(run_dir: RunDir, start: dict[str, Any]) -> dict[str, Any]:
    """Runs what `prepare` has described until it has ended; returns the record of its end."""
    secret = run_dir.secret(start["id"]).read_text().strip()
    described = start["membership"]
    hosts = tuple((name, ranks) for name, ranks in described["hosts"])
    membership = Membership(**(described | {"hosts": hosts, "run_folder": run_dir.path, "secret": secret}))
    environment = os.environ | _read_environment(run_dir.deepspeed_env) | start["launcher_environment"]
    if start["needs_secret"]:
        environment["HYNB_SECRET"] = secret
    return Supervisor(
        membership,
        command=start["argv"],
        cwd=Path(start["cwd"]),
        environment=environment,
        listeners=[socket.socket(fileno=fd) for fd in start["fds"]],
        reach=reach_of(start),
        overwrite=start["overwrite"],
    ).run()


def reach_of(start: dict[str, Any]) -> Ssh | None:
    """The ssh of a launch's record."""
    return None if start["ssh"] is None else Ssh(config=Path(start["ssh"]) if start["ssh"] else None)


def kill(run_dir: RunDir, start: dict[str, Any], *, supervisor_alive: bool, seconds: float) -> None:
    """Ends a run on all its hosts: by its supervisor, or over ssh when that is gone or late.

    Args:
        supervisor_alive: whether it is there to be asked.
        seconds: how long it may take.
    """
    replace_text(run_dir.kill_request, f"{time.time()}\n")
    deadline = time.monotonic() + seconds
    while supervisor_alive and not run_dir.exit.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    reach = reach_of(start)
    if reach is not None and not run_dir.exit.exists():
        others = [name for name, _ in start["membership"]["hosts"] if not is_local(name)]
        kill_over_ssh(reach, others, start["id"], seconds=seconds)


def paste_lines(run_dir: RunDir) -> str:
    """What a person pastes on the other hosts of a `no_ssh` run that waits for them; empty for other runs."""
    with contextlib.suppress(OSError):
        return run_dir.paste.read_text()
    return ""


def rank_environment(config: Config, environment: dict[str, str]) -> dict[str, str]:
    """The variables of the ranks on every host: the user's .deepspeed_env, the forwarded ones and ours.

    Raises:
        ClusterError: a line of a .deepspeed_env that is no NAME=VALUE.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    named = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in dict.fromkeys((Path.home() / named, Path.cwd() / named)):
        if path.is_file():
            values |= _read_environment(path)
    if config.network_interface is not None:
        values |= {name: config.network_interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    if "OMP_NUM_THREADS" in values:
        environment = environment | {"OMP_NUM_THREADS": values["OMP_NUM_THREADS"]}
    return values | environment


def _read_environment(path: Path) -> dict[str, str]:
    values, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, sign, value = text.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            problems.append(f"{path}:{number}: {line.strip()!r} is no NAME=VALUE")
        values[name.strip()] = value.strip()
    if problems:
        raise ClusterError(problems)
    return values


def _send_secret(plan: Plan, path: Path, secret: str) -> None:
    quoted, folder = shlex.quote(str(path)), shlex.quote(str(path.parent))
    script = f"[ -e {quoted} ] || {{ mkdir -p {folder} && umask 077 && cat > {quoted}; }}"

    def send(host: Host) -> str:
        answer = plan.reach.run(host.name, ["sh", "-c", script], deadline_seconds=_SSH_SECONDS, input=secret)
        if answer.problem or answer.code:
            return f"{host.name}: output_dir can't be written there: {answer.problem or answer.err.strip()}"
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


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _launcher_environment(plan: Plan, run_dir: RunDir) -> dict[str, str]:
    """What the launcher itself needs on this machine."""
    values = {"DS_ENV_FILE": str(run_dir.deepspeed_env)}
    if plan.launcher == "pdsh":
        # ssh may never ask: nobody is there to answer.
        values["PDSH_SSH_ARGS"] = f"-a -x {shlex.join(plan.reach.options())} %h"
        values["PDSH_RCMD_TYPE"] = "ssh"
    return values
