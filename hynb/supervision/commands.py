"""The commands that start the ranks, as a person could type them."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import shlex
import sys
from pathlib import Path

import psutil

from hynb.cluster import VISIBLE_VARIABLE
from hynb.config import Config
from hynb.runs import RunDir
from hynb.supervision.environment import is_secret
from hynb.supervision.membership import PASTED_VISIBLE_VARIABLE
from hynb.supervision.plan import CODE, Plan, filter_text, plan_unchecked


def command_text(config: Config, plan: Plan | None = None) -> str:
    """The command of a run, with `deepspeed` by its short name, to be typed without hynb's supervision.

    Where the user has chosen devices on one of several hosts, or no program reaches the others, one line for each
    host: DeepSpeed's runner gives the ranks of a host the first devices there, whatever CUDA_VISIBLE_DEVICES is.

    Args:
        plan: as from `make_plan`, which has asked the hosts for their devices; None to ask no host.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name is unknown here.
    """
    run_dir = RunDir(config.output_dir)
    is_asked = plan is not None
    plan = plan or plan_unchecked(config)
    if config.hostfile is None or (plan.launcher == "local" and plan.devices[0]):
        return _line(_typed_local_command(plan, run_dir), run_dir)
    if plan.launcher not in ("pdsh", "no_ssh"):
        # MPI and Slurm leave the variable to each host.
        command = _runner_command(plan, run_dir) if plan.launcher == "local" else launch_command(plan, run_dir)
        return _line(command, run_dir)
    if plan.launcher == "no_ssh" or any(plan.devices):
        lines = []
        for node, host in enumerate(plan.hosts):
            lines += [f"# on {host.name}:", _line(node_command(plan, run_dir, node), run_dir)]
    else:
        lines = [_line(_runner_command(plan, run_dir), run_dir)]
    if plan.launcher == "no_ssh" or not is_asked:
        lines.append(_unknown_devices(plan))
    return "\n".join(lines)


def _line(command: list[str], run_dir: RunDir) -> str:
    """A command, as a line of a shell."""
    if "deepspeed.launcher.runner" in command:
        command = ["deepspeed", *command[3:]]
    return shlex.join([*command, str(run_dir.config)])


def _unknown_devices(plan: Plan) -> str:
    """A comment on the other hosts, which nobody has asked for their choice of devices."""
    slots = [f"{host.name}: {','.join(map(str, host.slot_ids or range(host.slots)))}" for host in plan.others]
    return (
        f"# {VISIBLE_VARIABLE} of the other hosts is not known here: the ranks get these devices "
        f"({'; '.join(slots)}). `hynb launch` keeps to the variable on each host"
    )


def _typed_local_command(plan: Plan, run_dir: RunDir) -> list[str]:
    devices = plan.devices[0]
    if devices and not all(name.isdigit() for name in devices):
        # DeepSpeed's runner knows devices by index alone (deepspeed 0.19.8, launcher/runner.py).
        return node_command(plan, run_dir, 0)
    # A hostfile that does not exist: DeepSpeed would otherwise take /job/hostfile where a machine has one.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(run_dir.path / "no_hostfile")]
    # --num_gpus removes CUDA_VISIBLE_DEVICES.
    chosen = ["--include", f"localhost:{','.join(devices)}"] if devices else ["--num_gpus", str(plan.hosts[0].slots)]
    command += [*chosen, "--master_port", str(plan.master_port)]
    return [*command, "--enable_each_rank_log", str(run_dir.log), "--module", "hynb.train_entry"]


def launch_command(plan: Plan, run_dir: RunDir) -> list[str]:
    """The words that start the ranks on all hosts; every rank finds the run folder through its membership."""
    if plan.launcher in ("local", "no_ssh"):
        return node_command(plan, run_dir, plan.here or 0)
    return _runner_command(plan, run_dir)


def node_command(plan: Plan, run_dir: RunDir, node: int) -> list[str]:
    """DeepSpeed's launcher of one host's ranks."""
    slots = {
        host.name: list(devices or host.slot_ids or range(host.slots))
        for host, devices in zip(plan.hosts, plan.devices, strict=True)
    }
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={node}"]
    words += [f"--master_addr={plan.master_address}", f"--master_port={plan.master_port}", "--module"]
    return [*words, f"--enable_each_rank_log={run_dir.log}", "hynb.train_entry"]


def paste_text(plan: Plan, run_dir: RunDir, variables: dict[str, str], secret_file: Path) -> str:
    """What a person pastes on each of the other hosts; holds no secret."""
    shown = {name: value for name, value in variables.items() if not is_secret(name)}
    exports = "; ".join(f"export {name}={shlex.quote(value)}" for name, value in shown.items())
    # DeepSpeed's launcher sets the variable anew; the ranks take the devices that it named on their host.
    exports += f'; export {PASTED_VISIBLE_VARIABLE}="${{{VISIBLE_VARIABLE}-}}"'
    lines = []
    for node, host in enumerate(plan.hosts):
        if node != plan.here:
            start = f"(cd {shlex.quote(str(CODE))} && {exports}; {shlex.join(node_command(plan, run_dir, node))})"
            lines += [f"# on {host.name}:", start]
    lines.append(
        f"# A host that does not share output_dir needs a copy of {secret_file} at the same path first, readable by "
        "its owner alone (chmod 600)."
    )
    return "\n".join(lines) + "\n"


def _runner_command(plan: Plan, run_dir: RunDir) -> list[str]:
    """The `deepspeed` command of a plan."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(run_dir.hostfile)]
    words += ["--no_ssh_check", "--master_addr", plan.master_address, "--master_port", str(plan.master_port)]
    if plan.launcher != "local":
        words += ["--launcher", plan.launcher, "--force_multi"]
    if plan.launcher in ("local", "pdsh"):
        if any(host.slot_ids is not None for host in plan.hosts):
            words += ["--include", "@".join(filter_text(host) for host in plan.hosts)]
        log = str(run_dir.log)
        # DeepSpeed gives this word to the shells of the other hosts without quoting it, and pdsh expands %.
        words += ["--enable_each_rank_log", shlex.quote(log).replace("%", "%%") if plan.launcher == "pdsh" else log]
    elif plan.launcher == "slurm":
        # DeepSpeed gives srun no -m, and names the nodes only where a filter is given.
        words += ["--include", "@".join(host.name for host in plan.hosts)]
        return [*words, str(CODE / "hynb" / "train_entry.py")]
    elif plan.launcher == "openmpi":
        words += ["--launcher_args", shlex.join(_openmpi_arguments(plan))]
    return [*words, "--module", "hynb.train_entry"]


def _openmpi_arguments(plan: Plan) -> list[str]:
    assert plan.ssh is not None, "Open MPI starts its daemons over ssh"
    network = _network_of(plan.address)
    words = ["--mca", "btl_tcp_if_include", network, "--mca", "oob_tcp_if_include", network]
    words += ["--mca", "plm_rsh_agent", shlex.join(["ssh", *plan.ssh.options()]), "--bind-to", "none"]
    # Without it the job of a daemon that was killed would be started again elsewhere or left behind.
    words += ["--mca", "orte_abort_on_non_zero_status", "1"]
    return [*words, "--allow-run-as-root"] if os.geteuid() == 0 else words


def _network_of(address: str) -> str:
    """The network of an address of this machine, as 10.0.0.0/24: interfaces have other names on other hosts."""
    for addresses in psutil.net_if_addrs().values():
        for item in addresses:
            if item.address == address and item.netmask:
                return str(ipaddress.ip_network(f"{address}/{item.netmask}", strict=False))
    return address
