"""The commands that start the ranks, as a person could type them."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import shlex
import sys

import psutil

from hynb.cluster import Ssh, free_port, is_local
from hynb.config import Config
from hynb.runs import RunDir
from hynb.supervision.plan import CODE, Plan, _plan, chosen_hosts, filter_text, over_hosts, rank_count, ssh_config


def preview(config: Config, run_dir: RunDir) -> list[str]:
    """The command of a run over several hosts, without asking any of them.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name or the network is unknown here.
    """
    hosts = chosen_hosts(config)
    here = 0 if is_local(hosts[0].name) else None
    reach = None if config.launcher in ("no_ssh", "slurm") else Ssh(config=ssh_config(config))
    return command(_plan(config, hosts, here, reach), run_dir)


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


def deepspeed_command(config: Config, run_dir: RunDir) -> list[str]:
    """The command that starts the ranks, as a person could type it."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if config.hostfile is None:
        # A path that is not there: DeepSpeed would else take /job/hostfile where a machine has one.
        command += ["--hostfile", str(run_dir.path / "no_hostfile"), "--num_gpus", str(rank_count(config))]
        command += ["--master_addr", "127.0.0.1"]
    else:
        # One host, which is this one: `launch` writes it down in DeepSpeed's form.
        (host,) = chosen_hosts(config)
        command += ["--hostfile", str(run_dir.hostfile), "--no_ssh_check", "--master_addr", "127.0.0.1"]
        if host.slot_ids is not None:
            command += ["--include", filter_text(host)]
    command += ["--master_port", str(config.master_port or free_port())]
    command += ["--enable_each_rank_log", str(run_dir.log)]
    return [*command, "--module", "hynb.train_entry", str(run_dir.config)]


def command_text(config: Config) -> str:
    """The command in one line, with `deepspeed` by its short name.

    Raises:
        ClusterError: the hostfile or a filter is wrong, or a host's name is unknown here.
    """
    run_dir = RunDir(config.output_dir)
    if over_hosts(config):
        command = preview(config, run_dir)
    else:
        command = deepspeed_command(config, run_dir)
    if "deepspeed.launcher.runner" not in command:
        return shlex.join(command)
    return shlex.join(["deepspeed", *command[3:]])
