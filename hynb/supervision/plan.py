"""Plans a run: which hosts take part, how each is reached, at which address the ranks meet."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster import (
    VISIBLE_VARIABLE,
    Host,
    Ssh,
    chosen_devices,
    free_port,
    gpu_count,
    hostfile,
    is_local,
    listener_of,
    own_address,
    resolve,
)
from hynb.config import Config, check_ranks
from hynb.errors import ClusterError
from hynb.supervision.needs import memory_problems

# The folder that holds the package: it is at the same path on every host, and the ranks begin there.
CODE = Path(__file__).resolve().parents[2]
SSH_SECONDS = 20.0
_VISIBLE_MARK = "hynb-visible "
_PROGRAMS = {
    "pdsh": ("pdsh", "pdsh (Debian, Ubuntu) or pdsh and pdsh-rcmd-ssh (Red Hat)"),
    "openmpi": ("ompi_info", "openmpi-bin (Debian, Ubuntu) or openmpi (Red Hat)"),
    "mpich": ("mpirun.mpich", "mpich"),
    "slurm": ("srun", "slurm-client, and launch inside an allocation (salloc, sbatch)"),
}


@dataclass(kw_only=True, frozen=True)
class Plan:
    """The hosts of a run and how they reach each other; a run on one machine is a run over one host.

    Args:
        launcher: as in the config; "local" where this machine is the only host.
        hosts: those that take part, in the order of their ranks.
        here: this machine's index among them; None when it only launches.
        ssh: how the others are reached; None for launchers that do without.
        address: by which the other hosts reach this one.
        master_address: by which all hosts reach rank 0's.
        devices: by host, what its CUDA_VISIBLE_DEVICES names, one per rank (see `chosen_devices`); None for a host
            where the variable is not set or not known.
    """

    launcher: str
    hosts: tuple[Host, ...]
    here: int | None
    ssh: Ssh | None
    address: str
    master_address: str
    master_port: int
    devices: tuple[tuple[str, ...] | None, ...]

    @property
    def others(self) -> list[Host]:
        """The hosts that are not this machine."""
        return [host for index, host in enumerate(self.hosts) if index != self.here]


def chosen_hosts(config: Config) -> list[Host]:
    """The hosts and slots of a run: this machine first, which without a hostfile is the only one.

    Rank 0 writes the run folder, so it runs on the host that launches.

    Raises:
        ClusterError: a wrong line or filter, nothing is left, or more ranks than GPUs.
    """
    if config.hostfile is None:
        return [Host(name=socket.gethostname(), slots=_local_slots(config))]
    hosts = hostfile.select(hostfile.read(config.hostfile), include=config.include, exclude=config.exclude)
    return sorted(hosts, key=lambda host: not is_local(host.name))


def is_local_run(hosts: Sequence[Host]) -> bool:
    """Whether this machine is the only host."""
    return len(hosts) == 1 and is_local(hosts[0].name)


def make_plan(config: Config) -> Plan:
    """Looks at everything about the hosts that would stop a run before it starts.

    Raises:
        ClusterError: every mistake found, at once, with its host; or a number of ranks that the run cannot have.
    """
    hosts = chosen_hosts(config)
    if problems := check_ranks(config, sum(host.slots for host in hosts)):
        raise ClusterError(problems)
    if is_local_run(hosts):
        plan = _local_plan(config, hosts[0])
        if problems := memory_problems(config, hosts, 0, None) + _port_problems(config):
            raise ClusterError(problems)
        return plan
    local = [index for index, host in enumerate(hosts) if is_local(host.name)]
    problems = _launcher_problems(config, hosts)
    if any(character in config.output_dir for character in "\n\r"):
        problems.append(f"output_dir = {config.output_dir!r}: a line break cannot be passed to other hosts")
    if len(local) > 1:
        names = ", ".join(hosts[index].name for index in local)
        problems.append(f"hostfile = {config.hostfile}: {names} are all this machine; list it once")
    if config.launcher == "no_ssh" and not local:
        problems.append(
            f"launcher = no_ssh: {socket.gethostname()} is not one of the hosts; launch on {hosts[0].name}"
        )
    ssh = None if config.launcher in ("no_ssh", "slurm") else Ssh(config=ssh_config(config))
    here = local[0] if local else None
    others = [host for index, host in enumerate(hosts) if index != here]
    visible: dict[str, str] = {}
    if ssh is not None and not problems:
        # pdsh logs in on this machine too, as on any other.
        unready, visible = _ask_hosts(ssh, hosts if config.launcher == "pdsh" else others)
        problems += [problem for found in unready.values() for problem in found]
    if not problems:
        problems += memory_problems(config, hosts, here, ssh)
    if here == 0:
        problems += _port_problems(config)
    if problems:
        raise ClusterError(problems)
    return _plan(config, hosts, here, ssh, visible)


def _port_problems(config: Config) -> list[str]:
    """Why the ranks cannot meet at the port that was chosen; empty when it is free on this machine."""
    port = config.master_port
    if port is None:
        return []
    try:
        # As rank 0 does, which listens on all addresses.
        socket.create_server(("", port)).close()
    except OSError as error:
        holder = listener_of(port)
        taken = f"is taken by {holder}" if holder else f"cannot be listened on: {error.strerror}"
        return [f"master_port = {port}: {taken}. Choose another port, or leave it on auto for a free one"]
    return []


def unreachable_hosts(config: Config) -> list[str]:
    """The hosts of a run that do not answer over ssh, and those that lack its code; none without ssh.

    Raises:
        ClusterError: the hostfile or a filter is wrong.
    """
    hosts = chosen_hosts(config)
    if is_local_run(hosts) or config.launcher in ("no_ssh", "slurm"):
        return []
    others = [host for host in hosts if not is_local(host.name)]
    unready, _ = _ask_hosts(Ssh(config=ssh_config(config)), others)
    return [name for name, problems in unready.items() if problems]


def without_hosts(config: Config, names: Sequence[str]) -> Config:
    """A Config whose run leaves out some hosts."""
    if not names:
        return config
    left = [filter_text(host) for host in chosen_hosts(config) if host.name not in names]
    return config.replace(include="@".join(left), exclude=None)


def plan_unchecked(config: Config) -> Plan:
    """The plan of a run as its config says, without asking any host.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name or the network is unknown here.
    """
    hosts = chosen_hosts(config)
    if is_local_run(hosts):
        return _local_plan(config, hosts[0])
    ssh = None if config.launcher in ("no_ssh", "slurm") else Ssh(config=ssh_config(config))
    return _plan(config, hosts, 0 if is_local(hosts[0].name) else None, ssh, {})


def _local_plan(config: Config, host: Host) -> Plan:
    return Plan(
        launcher="local",
        hosts=(host,),
        here=0,
        ssh=None,
        address="127.0.0.1",
        master_address="127.0.0.1",
        master_port=config.master_port or free_port(),
        devices=(chosen_devices(host, os.environ.get(VISIBLE_VARIABLE)),),
    )


def _plan(config: Config, hosts: Sequence[Host], here: int | None, ssh: Ssh | None, visible: dict[str, str]) -> Plan:
    """The plan of a run over several hosts.

    Args:
        visible: the values of CUDA_VISIBLE_DEVICES on the other hosts where it is set.
    """
    other = next(host for index, host in enumerate(hosts) if index != here)
    address = own_address(_address_of(other.name, ssh), interface=config.network_interface)
    return Plan(
        launcher=config.launcher,
        hosts=tuple(hosts),
        here=here,
        ssh=ssh,
        address=address,
        master_address=address if here == 0 else _address_of(hosts[0].name, ssh),
        master_port=config.master_port or free_port(address),
        devices=_devices(config, hosts, here, visible),
    )


def _devices(
    config: Config, hosts: Sequence[Host], here: int | None, visible: dict[str, str]
) -> tuple[tuple[str, ...] | None, ...]:
    """The devices of each host's ranks, by the user's own choice there.

    DeepSpeed's launcher sets the variable anew from the slots that it is given (deepspeed 0.19.8,
    launcher/launch.py), so that slots 0, 1, … would be other devices than the user's.

    Raises:
        ClusterError: every host with more slots than devices.
    """
    if config.launcher == "slurm":
        # It sets the variable itself, for each step on each host.
        return (None,) * len(hosts)
    devices, problems = [], []
    for index, host in enumerate(hosts):
        value = os.environ.get(VISIBLE_VARIABLE) if index == here else visible.get(host.name)
        try:
            devices.append(chosen_devices(host, value))
        except ClusterError as error:
            problems += error.problems
    if problems:
        raise ClusterError(problems)
    return tuple(devices)


def ssh_config(config: Config) -> Path | None:
    """The OpenSSH configuration to use: the one named, the one beside the hostfile, or None for the user's own."""
    if config.ssh_config is not None:
        return Path(config.ssh_config)
    return hostfile.ssh_config_of(config.hostfile) if config.hostfile is not None else None


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
                f"launcher = {config.launcher}: cannot choose single slots ({filter_text(chosen[0])}): choose "
                "whole hosts, or launcher: pdsh"
            )
    if config.launcher in ("mpich", "slurm") and len({host.slots for host in hosts}) > 1:
        counts = ", ".join(f"{host.name}: {host.slots}" for host in hosts)
        problems.append(f"launcher = {config.launcher}: needs as many slots on every host ({counts})")
    return problems


def _ask_hosts(ssh: Ssh, hosts: Sequence[Host]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """By host, what keeps the ranks from starting there, and its CUDA_VISIBLE_DEVICES; all are asked at once."""
    python = sys.executable
    script = (
        f"[ -x {shlex.quote(python)} ] || echo 'has no {python}'; "
        f"[ -d {shlex.quote(str(CODE / 'hynb'))} ] || echo 'has no {CODE / 'hynb'}'; "
        f'[ -z "${{{VISIBLE_VARIABLE}+x}}" ] || echo "{_VISIBLE_MARK}${VISIBLE_VARIABLE}"'
    )
    visible: dict[str, str] = {}

    def ask(host: Host) -> list[str]:
        answer = ssh.run(host.name, ["sh", "-c", script], deadline_seconds=SSH_SECONDS, always=True)
        if answer.problem:
            return [answer.problem if host.name in answer.problem else f"{host.name}: {answer.problem}"]
        lines = answer.out.splitlines()
        for line in lines:
            if line.startswith(_VISIBLE_MARK):
                visible[host.name] = line.removeprefix(_VISIBLE_MARK)
        missing = [line for line in lines if line.startswith("has no ")]
        fix = "every host needs this environment and code at the same paths: `hynb preflight --fix` copies them"
        return [f"{host.name}: {line}; {fix}" for line in missing]

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip((host.name for host in hosts), pool.map(ask, hosts), strict=True)), visible


def _address_of(name: str, ssh: Ssh | None) -> str:
    """The address of a host that may be known to ssh alone.

    Raises:
        ClusterError: its name cannot be resolved.
    """
    return resolve(ssh.address(name)[0] if ssh is not None else name)


def filter_text(host: Host) -> str:
    """A host and its chosen slots as DeepSpeed's --include has them."""
    return host.name if host.slot_ids is None else f"{host.name}:{','.join(map(str, host.slot_ids))}"


def whole_hosts(hosts: Sequence[Host]) -> list[Host]:
    """The hosts with slots enough that each chosen slot is one of them."""
    return [
        host if host.slot_ids is None else dataclasses.replace(host, slots=max(host.slot_ids) + 1, slot_ids=None)
        for host in hosts
    ]


def rank_count(config: Config) -> int:
    """Ranks on this machine.

    Raises:
        ClusterError: a wrong hostfile or filter, or more ranks than GPUs.
    """
    return chosen_hosts(config)[0].slots


def _local_slots(config: Config) -> int:
    """Ranks on this machine without a hostfile: as many as requested, else one per GPU, else one on the CPU."""
    gpus = gpu_count()
    if config.num_processes is None:
        return gpus or 1
    if gpus and config.num_processes > gpus:
        count = f"{gpus} GPU{'s' * (gpus > 1)}"
        visible = os.environ.get(VISIBLE_VARIABLE)
        seen = f"this machine has {count}" if visible is None else f"{VISIBLE_VARIABLE}={visible} shows {count}"
        more = "" if visible is None else ", or change the variable"
        raise ClusterError(f"num_processes = {config.num_processes}: {seen}; set it to {gpus} or less{more}")
    return config.num_processes
