"""Checks every host of a run before it starts, and names a fix for each failed check: `hynb preflight`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hynb.cluster import (
    VISIBLE_VARIABLE,
    Answer,
    ClusterDir,
    Host,
    Ssh,
    chosen_devices,
    free_port,
    hostfile,
    is_local,
    require_openssh,
)
from hynb.config import Config
from hynb.data import find_files
from hynb.errors import ClusterError, HynbError
from hynb.files import write_json
from hynb.plan import zero
from hynb.preflight.ask import ask_hosts
from hynb.preflight.checks import compare
from hynb.preflight.collective import CollectiveRequest, Measurement, parse_output
from hynb.preflight.reach import same_machines
from hynb.preflight.report import CHECKS, Cell, Report, ranks_text
from hynb.preflight.targets import Known, Reply, interfaces_to_others, make_targets
from hynb.supervision import CODE, chosen_hosts, rank_count, rank_environment, ssh_config

_LOG = logging.getLogger(__name__)
_COLLECTIVE_SECONDS = 90
# A host reports its own deadline first.
_MARGIN_SECONDS = 10
# torch.distributed's default, used when no port can be tried on the first host.
_MASTER_PORT = 29500
_TEXT_CHARACTERS = 300


def run_preflight(
    config: Config, progress: Callable[[str], None], *, collective: bool, copy: bool, copy_model: bool = False
) -> Report:
    """Runs a preflight, and again after files were copied to hosts that lack them; stores the report.

    Args:
        progress: called with a line for each step.
        collective: run the all-reduce.
        copy: copy code and data to hosts where they are missing or differ.
        copy_model: copy the model folder, too, which may take hours.

    Raises:
        ClusterError: as in `examine_hosts`, and files that could not be copied.
    """
    report = examine_hosts(config, collective=collective, progress=progress)
    if (copy or copy_model) and not report.ok:
        if problems := _copy_files(report, progress, model=copy_model):
            raise ClusterError(problems)
        report = examine_hosts(config, collective=collective, progress=progress)
    _store(report, config)
    return report


def examine_hosts(
    config: Config, *, collective: bool = True, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Checks every host of a Config; changes nothing on any of them.

    Args:
        collective: run a small all-reduce with one process per rank, if all other checks pass.
        progress: called with a line for each step.

    Raises:
        ClusterError: a hostfile that can't be read, a launcher whose hosts ssh doesn't reach, or no ssh here.
    """
    began = time.monotonic()
    hosts, ssh = _hosts(config)
    targets = make_targets(config, hosts, ssh)
    data_problems, data = _data_files(config)
    names = [host.name for host in hosts]
    progress(f"asking {', '.join(names)}")
    known, cells = ask_hosts(config, targets, ssh, data)
    cells += same_machines(targets)
    for reply in known.replies:
        cells += compare(reply, known)
    cells += [Cell(host=names[0], check="data", state="bad", text=problem) for problem in data_problems]
    measurement = None
    if collective and not any(cell.state == "bad" for cell in cells):
        progress(f"all-reduce over {ranks_text(sum(host.slots for host in hosts))}")
        measurement, collective_cells = _run_collective(known)
        cells += collective_cells
    seconds = round(time.monotonic() - began, 2)
    return Report(hosts=names, cells=_one_per_check(cells, names), collective=measurement, seconds=seconds)


def _hosts(config: Config) -> tuple[list[Host], Ssh]:
    """The hosts of a Config and how they are reached.

    Raises:
        ClusterError: a hostfile that can't be read, a launcher whose hosts ssh doesn't reach, or no ssh here.
    """
    if config.hostfile is None:
        return hostfile.local(rank_count(config)), Ssh()
    if config.launcher in ("no_ssh", "slurm"):
        raise ClusterError(
            f"launcher = {config.launcher}: its hosts are not reached over ssh, so they can't be checked from here. "
            "Run `hynb preflight` on each of them without a hostfile"
        )
    hosts = chosen_hosts(config)
    if not all(is_local(host.name) for host in hosts):
        require_openssh()
    return hosts, Ssh(config=ssh_config(config))


def _data_files(config: Config) -> tuple[list[str], list[str]]:
    """What is wrong with the data parameters, and the files that every rank reads: data, settings, tokenizer."""
    problems: list[str] = []
    files: list[str] = []
    for parameter, paths in (("train_data_file", config.train_data_file), ("eval_data_file", config.eval_data_file)):
        if paths is not None:
            try:
                files += [str(path.absolute()) for path in find_files(paths, parameter)]
            except HynbError as error:
                problems += error.problems
    if config.deepspeed not in zero.PRESETS and Path(config.deepspeed).is_file():
        files.append(str(Path(config.deepspeed).absolute()))
    if config.tokenizer_name_or_path is not None and (folder := Path(config.tokenizer_name_or_path)).is_dir():
        files += [str(path.absolute()) for path in sorted(folder.iterdir()) if path.match("*token*")]
    return problems, files


def _run_collective(known: Known) -> tuple[Measurement | None, list[Cell]]:
    """Runs the small all-reduce over the ranks of all hosts, which have all replied."""
    config, first = known.config, known.targets[0]
    request: CollectiveRequest = {
        "node": 0,
        "slots": [target.host.slots for target in known.targets],
        "address": first.address,
        "port": config.master_port or (free_port(first.address) if first.local else _MASTER_PORT),
        "interface": None,
        "deadline_seconds": _COLLECTIVE_SECONDS,
    }

    def start(node: int, reply: Reply) -> Answer:
        interface = config.network_interface or next(iter(interfaces_to_others(reply, known)), None)
        return _start_ranks(reply, {**request, "node": node, "interface": interface}, known)

    with ThreadPoolExecutor(len(known.replies)) as pool:
        answers = list(pool.map(start, range(len(known.replies)), known.replies))
    measurement = parse_output(answers[0].out)
    cells = [
        _collective_cell(reply.target.name, measurement, answer, config.hostfile)
        for reply, answer in zip(known.replies, answers, strict=True)
    ]
    return measurement, cells


def _start_ranks(reply: Reply, request: CollectiveRequest, known: Known) -> Answer:
    """Starts one host's ranks of the all-reduce, with the environment variables that those of a run get."""
    host = reply.target.host
    environment = rank_environment(known.config, {})
    devices = chosen_devices(host, _visible_on(reply)) if reply.facts["gpus"] else ()
    if devices is None:
        devices = tuple(map(str, host.slot_ids or ()))
    if devices or not reply.facts["gpus"]:
        environment[VISIBLE_VARIABLE] = ",".join(devices)
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = ["env", *variables, sys.executable, "-m", "hynb.preflight.collective", json.dumps(request)]
    script = f"cd {shlex.quote(str(CODE))} && exec {shlex.join(command)}"
    deadline_seconds = request["deadline_seconds"] + _MARGIN_SECONDS
    return known.ssh.run(host.name, ["sh", "-c", script], deadline_seconds=deadline_seconds)


def _visible_on(reply: Reply) -> str | None:
    """The devices that the user has chosen on a host: on this machine, those of this process."""
    return os.environ.get(VISIBLE_VARIABLE) if reply.target.local else reply.facts["cuda_visible_devices"]


def _collective_cell(host: str, measurement: Measurement | None, answer: Answer, path: str | None) -> Cell:
    """The result of the all-reduce on one host.

    Args:
        path: of the hostfile; None without one.
    """
    failed = answer.problem or (answer.last_error_line("no error message") if answer.code else "")
    if measurement is not None and measurement["correct"] and not failed:
        return Cell(host=host, check="all-reduce", state="ok", text=ranks_text(measurement["ranks"]))
    text = failed or ("the sum is wrong" if measurement else "the first host's ranks ended without a result")
    command = [str(Path(sys.executable).with_name("hynb")), "preflight", *(["--hostfile", path] if path else [])]
    fix = f"NCCL_DEBUG=INFO {shlex.join(command)}"
    return Cell(host=host, check="all-reduce", state="bad", text=text[:_TEXT_CHARACTERS], fix=fix)


def _one_per_check(cells: Iterable[Cell], names: Sequence[str]) -> list[Cell]:
    """One cell per check and host: a failed one of several, and `unknown` for what was not reached."""
    order = {"bad": 0, "ok": 1, "unknown": 2}
    worst: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = (cell.host, cell.check)
        if key not in worst or order[cell.state] < order[worst[key].state]:
            worst[key] = cell
    checks = [check for check in CHECKS if any(key[1] == check for key in worst)]
    return [
        worst.get((name, check)) or Cell(host=name, check=check, state="unknown", text="not reached")
        for check in checks
        for name in names
    ]


def _copy_files(report: Report, progress: Callable[[str], None], *, model: bool) -> list[str]:
    """Copies files to hosts where they are missing or differ, by the report's own commands; returns what failed."""
    checks = ("code", "data", "model") if model else ("code", "data")
    problems = []
    for cell in report.bad:
        if cell.check not in checks or not cell.fix.startswith("rsync"):
            continue
        progress(cell.fix)
        # rsync's progress goes to standard error: on standard output is the report alone.
        done = subprocess.run(["sh", "-c", cell.fix], stdin=subprocess.DEVNULL, stdout=2, check=False)
        if done.returncode:
            problems.append(f"{cell.host}: {cell.check}: `{cell.fix}` ended with exit code {done.returncode}")
    return problems


def _store(report: Report, config: Config) -> None:
    """Writes the report beside the hostfile, if there is one."""
    if config.hostfile is None:
        return
    path = ClusterDir(Path(config.hostfile).expanduser().absolute().parent).preflight
    try:
        write_json(path, report.to_json())
    except OSError:
        # Only the administrator can write beside a hostfile in /etc.
        _LOG.info("%s: can't be written", path)
