"""Plans a run over several hosts: who takes part, how each is reached, the command and its environment."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hynb import hostfile, run_checks
from hynb.config import Config
from hynb.errors import ClusterError
from hynb.host_facts import source_address
from hynb.hostfile import Host
from hynb.node_guard import Membership
from hynb.run_dir import RunDir, replace_text
from hynb.ssh import Ssh, is_local
from hynb.supervisor import Supervisor, kill_over_ssh

# The folder that holds the package: it is at the same path on every host, and the ranks begin there.
CODE = Path(__file__).resolve().parents[1]
# What the launching process has of these goes to the ranks of all hosts, as it would on one.
_FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "HF_HOME", "CUDA_HOME", "DS_SKIP", "OMP_NUM_THREADS")
_SECRET_BYTES = 32
_SSH_SECONDS = 20.0
_PROGRAMS = {
    "pdsh": ("pdsh", "pdsh (Debian, Ubuntu) or pdsh and pdsh-rcmd-ssh (Red Hat)"),
    "openmpi": ("ompi_info", "openmpi-bin (Debian, Ubuntu) or openmpi (Red Hat)"),
    "mpich": ("mpirun.mpich", "mpich"),
    "slurm": ("srun", "slurm-client, and launch inside an allocation (salloc, sbatch)"),
}


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Hosts of a run and how they reach each other.

    Args:
        hosts: those that take part, in the order of their ranks.
        here: this machine's place among them; None when it only launches.
        reach: ssh to the others; None for launchers that do without.
        address: by which the other hosts reach this one.
        master_address: by which all hosts reach rank 0's.
    """

    launcher: str
    hosts: tuple[Host, ...]
    here: int | None
    reach: Ssh | None
    address: str
    master_address: str
    master_port: int

    @property
    def others(self) -> list[Host]:
        """The hosts that are not this machine."""
        return [host for index, host in enumerate(self.hosts) if index != self.here]


def chosen_hosts(config: Config) -> list[Host]:
    """The hosts and slots of a Config's hostfile that include and exclude leave, this machine's first.

    Rank 0 writes the run folder, so that it belongs on the host that is launched from.

    Raises:
        ClusterError: a wrong line or filter, or nothing is left.
    """
    hosts = hostfile.select(hostfile.read(config.hostfile), include=config.include, exclude=config.exclude)
    return sorted(hosts, key=lambda host: not is_local(host.name))


def over_hosts(config: Config) -> bool:
    """Whether a run needs more than this machine.

    Raises:
        ClusterError: the hostfile or a filter is wrong.
    """
    if config.hostfile is None:
        return False
    hosts = chosen_hosts(config)
    return len(hosts) > 1 or not is_local(hosts[0].name)


def make_plan(config: Config) -> Plan:
    """Looks at everything about the hosts that would stop a run before it starts.

    Raises:
        ClusterError: every mistake found, at once, with its host.
    """
    hosts = chosen_hosts(config)
    local = [index for index, host in enumerate(hosts) if is_local(host.name)]
    problems = _launcher_problems(config, hosts)
    if len(local) > 1:
        names = ", ".join(hosts[index].name for index in local)
        problems.append(f"hostfile = {config.hostfile}: {names} are all this machine; list it once")
    if config.launcher == "no_ssh" and not local:
        problems.append(f"launcher = no_ssh: {socket.gethostname()} is none of the hosts; launch on {hosts[0].name}")
    reach = None if config.launcher in ("no_ssh", "slurm") else Ssh(config=ssh_config(config))
    here = local[0] if local else None
    others = [host for index, host in enumerate(hosts) if index != here]
    if reach is not None and not problems:
        # pdsh logs in on this machine too, as on any other.
        problems += _unready_hosts(reach, hosts if config.launcher == "pdsh" else others)
    if problems:
        raise ClusterError(problems)
    return _plan(config, hosts, here, reach)


def preview(config: Config, run_dir: RunDir) -> list[str]:
    """The command of a run over several hosts, without asking any of them.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name or the network is unknown here.
    """
    hosts = chosen_hosts(config)
    here = 0 if is_local(hosts[0].name) else None
    reach = None if config.launcher in ("no_ssh", "slurm") else Ssh(config=ssh_config(config))
    return command(_plan(config, hosts, here, reach), run_dir)


def _plan(config: Config, hosts: Sequence[Host], here: int | None, reach: Ssh | None) -> Plan:
    address = _own_address(config, hosts, here, reach)
    return Plan(
        launcher=config.launcher,
        hosts=tuple(hosts),
        here=here,
        reach=reach,
        address=address,
        master_address=address if here == 0 else _address_of(hosts[0].name, reach),
        master_port=config.master_port or free_port_at(address),
    )


def ssh_config(config: Config) -> Path | None:
    """The OpenSSH settings to use: those named, those beside the hostfile, or the user's own."""
    if config.ssh_config is not None:
        return Path(config.ssh_config)
    return hostfile.ssh_config_of(config.hostfile)


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


def command(plan: Plan, run_dir: RunDir) -> list[str]:
    """The command that starts the ranks on all hosts, as a person could type it."""
    if plan.launcher == "no_ssh":
        return _node_command(plan, run_dir, plan.here or 0)
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(run_dir.hostfile)]
    words += ["--launcher", plan.launcher, "--force_multi", "--no_ssh_check"]
    words += ["--master_addr", plan.master_address, "--master_port", str(plan.master_port)]
    if plan.launcher == "pdsh":
        if any(host.slot_ids is not None for host in plan.hosts):
            words += ["--include", "@".join(filter_text(host) for host in plan.hosts)]
        # The other hosts' shells read this word, and DeepSpeed doesn't quote it for them.
        words += ["--enable_each_rank_log", shlex.quote(str(run_dir.log))]
        return [*words, "--module", "hynb.train_entry", str(run_dir.config)]
    if plan.launcher == "slurm":
        # DeepSpeed gives srun no -m, and names the nodes only where a filter is given.
        words += ["--include", "@".join(host.name for host in plan.hosts)]
        return [*words, str(CODE / "hynb" / "train_entry.py"), str(run_dir.config)]
    if plan.launcher == "openmpi":
        words += ["--launcher_args", shlex.join(_openmpi_arguments(plan))]
    return [*words, "--module", "hynb.train_entry", str(run_dir.config)]


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


def _launcher_problems(config: Config, hosts: Sequence[Host]) -> list[str]:
    problems = []
    if config.launcher in _PROGRAMS:
        program, package = _PROGRAMS[config.launcher]
        if shutil.which(program) is None:
            problems.append(
                f"launcher = {config.launcher}: the program {program} is not on this machine; install {package}, or "
                "choose another launcher"
            )
    if config.launcher == "pdsh" and (with_colon := [host.name for host in hosts if ":" in host.name]):
        problems.append(
            f"launcher = pdsh: takes no IPv6 address ({with_colon[0]}): give the host a name in /etc/hosts or in the "
            "ssh_config, or choose launcher: no_ssh"
        )
    if config.launcher == "pdsh" and (words := [word for word in (sys.executable, str(CODE)) if " " in word]):
        problems.append(
            f"launcher = pdsh: takes no path with a space: {words[0]}; move it, or choose launcher: no_ssh"
        )
    if config.launcher in ("openmpi", "mpich", "slurm"):
        chosen = [host for host in hosts if host.slot_ids not in (None, tuple(range(host.slots)))]
        if chosen:
            problems.append(
                f"launcher = {config.launcher}: can't choose single slots ({filter_text(chosen[0])}): choose "
                "whole hosts, or launcher: pdsh"
            )
    if config.launcher in ("mpich", "slurm") and len({host.slots for host in hosts}) > 1:
        counts = ", ".join(f"{host.name}: {host.slots}" for host in hosts)
        problems.append(f"launcher = {config.launcher}: needs as many slots on every host ({counts})")
    return problems


def _unready_hosts(reach: Ssh, hosts: Sequence[Host]) -> list[str]:
    """What keeps the ranks from starting on hosts, asked of all at once."""
    python = sys.executable
    script = (
        f"[ -x {shlex.quote(python)} ] || echo 'has no {python}'; "
        f"[ -d {shlex.quote(str(CODE / 'hynb'))} ] || echo 'has no {CODE / 'hynb'}'"
    )

    def ask(host: Host) -> list[str]:
        answer = reach.run(host.name, ["sh", "-c", script], deadline_seconds=_SSH_SECONDS, always=True)
        if answer.problem:
            return [answer.problem if host.name in answer.problem else f"{host.name}: {answer.problem}"]
        missing = answer.out.splitlines()
        mend = "every host needs this environment and code at the same paths: `hynb preflight --fix` copies them"
        return [f"{host.name}: {line}; {mend}" for line in missing]

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [problem for problems in pool.map(ask, hosts) for problem in problems]


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


def _own_address(config: Config, hosts: Sequence[Host], here: int | None, reach: Ssh | None) -> str:
    """The address by which the other hosts reach this machine."""
    if config.network_interface is not None:
        name = config.network_interface
        found = psutil.net_if_addrs().get(name)
        if found is None:
            names = ", ".join(sorted(psutil.net_if_addrs()))
            raise ClusterError(f"network_interface = {name}: this machine has none of that name; it has {names}")
        if any(item.address.startswith("127.") for item in found):
            raise ClusterError(f"network_interface = {name}: no other host reaches this machine by its loopback")
        for family in (socket.AF_INET, socket.AF_INET6):
            for item in found:
                if item.family == family and not item.address.startswith("fe80"):
                    return item.address
        raise ClusterError(f"network_interface = {name}: has no address on this machine")
    others = [host for index, host in enumerate(hosts) if index != here]
    other = _address_of(others[0].name, reach)
    source = source_address(other)
    if source is None:
        raise ClusterError(f"{others[0].name}: no way leads to {other}; `ip route` shows those that there are")
    return source


def _address_of(name: str, reach: Ssh | None) -> str:
    """The address of a host that may be known to ssh alone."""
    if reach is not None:
        name, _ = reach.address(name)
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ClusterError(
            f"{name}: this name can't be resolved here: {error.strerror}; add it to /etc/hosts"
        ) from None


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


def free_port_at(address: str) -> int:
    """A TCP port that is free now on an address of this machine."""
    try:
        with socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        ) as probe:
            return probe.getsockname()[1]
    except OSError:
        return run_checks.free_port()


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


def _openmpi_arguments(plan: Plan) -> list[str]:
    network = _network_of(plan.address)
    words = ["--mca", "btl_tcp_if_include", network, "--mca", "oob_tcp_if_include", network]
    words += ["--mca", "plm_rsh_agent", shlex.join(["ssh", *plan.reach.options()]), "--bind-to", "none"]
    # Without it a killed daemon's job would be started again elsewhere or left behind.
    words += ["--mca", "orte_abort_on_non_zero_status", "1"]
    return [*words, "--allow-run-as-root"] if os.geteuid() == 0 else words


def _network_of(address: str) -> str:
    """The network of an address of this machine, as 10.0.0.0/24: interfaces have other names on other hosts."""
    for addresses in psutil.net_if_addrs().values():
        for item in addresses:
            if item.address == address and item.netmask:
                return str(ipaddress.ip_network(f"{address}/{item.netmask}", strict=False))
    return address


def _node_command(plan: Plan, run_dir: RunDir, node: int) -> list[str]:
    """DeepSpeed's launcher of one host's ranks."""
    slots = {host.name: list(host.slot_ids or range(host.slots)) for host in plan.hosts}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={node}"]
    words += [f"--master_addr={plan.master_address}", f"--master_port={plan.master_port}", "--module"]
    return [*words, f"--enable_each_rank_log={run_dir.log}", "hynb.train_entry", str(run_dir.config)]


def _paste_text(plan: Plan, run_dir: RunDir, variables: dict[str, str]) -> str:
    exports = "; ".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    lines = []
    for node, host in enumerate(plan.hosts):
        if node != plan.here:
            line = f"(cd {shlex.quote(str(CODE))} && {exports}; {shlex.join(_node_command(plan, run_dir, node))})"
            lines += [f"# on {host.name}:", line]
    return "\n".join(lines) + "\n"


def filter_text(host: Host) -> str:
    """A host and its chosen slots as DeepSpeed's --include has them."""
    return host.name if host.slot_ids is None else f"{host.name}:{','.join(map(str, host.slot_ids))}"


def whole_hosts(hosts: Sequence[Host]) -> list[Host]:
    """The hosts with slots enough that each chosen slot is one of them."""
    return [
        host if host.slot_ids is None else dataclasses.replace(host, slots=max(host.slot_ids) + 1, slot_ids=None)
        for host in hosts
    ]
