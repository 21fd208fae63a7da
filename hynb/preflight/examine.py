"""Looks at every host of a run before it starts, all at once, and says what mends what is wrong: `hynb preflight`."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from hynb.cluster import PACKAGES, Host, Ssh, host_facts, hostfile, is_local, require_openssh
from hynb.config import Config
from hynb.data import find_files
from hynb.errors import ClusterError, HynbError
from hynb.plan import zero
from hynb.preflight.checks import (
    collective_cell,
    compare,
    interface_of,
    no_python,
    same_machines,
    way_closed,
    way_open,
)
from hynb.preflight.collective import MARK
from hynb.preflight.report import CHECKS, Cell, Known, Report, Target, ranks_text, write_report
from hynb.supervision import CODE, chosen_hosts, free_port_at, rank_count, rank_environment, ssh_config

_FACTS_SECONDS = 40.0
_HASHED_BYTES_PER_SECOND = 100e6
_COLLECTIVE_SECONDS = 90
_PROBE_SECONDS = 6.0


def preflight(config: Config, *, collective: bool = True, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Checks every host of a Config; changes nothing on any of them.

    Args:
        collective: start a process a rank for a small all-reduce, where all else is well.
        progress: told what is being done.

    Raises:
        ClusterError: a hostfile that can't be read, a launcher whose hosts ssh doesn't reach, or no ssh here.
    """
    began = time.monotonic()
    if config.hostfile and config.launcher in ("no_ssh", "slurm"):
        raise ClusterError(
            f"launcher = {config.launcher}: its hosts are not reached over ssh, so that they can't be looked at from "
            "here. Run `hynb preflight` on each of them without a hostfile"
        )
    local_slots = rank_count(config) if config.hostfile is None else 0
    hosts = chosen_hosts(config) if config.hostfile else hostfile.local(local_slots)
    ssh = Ssh(config=ssh_config(config) if config.hostfile else None)
    if not all(is_local(host.name) for host in hosts):
        require_openssh()
    targets = [_target(host, ssh) for host in hosts]
    here = next((target for target in targets if target.local), None)
    if here is not None:
        here.address = _own_address(config, targets)
        # pdsh logs in on the launching host as on any other.
        here.by_ssh = len(targets) > 1 and config.launcher == "pdsh"
        here.port = ssh.address(here.host.name)[1]
    problems, data = _data_files(config)
    token = _make_token(config.output_dir)
    listener, port, taken = _listen(here, config)
    try:
        request = _request(config, targets, here, token, port, data, ssh)
        progress(f"asking {', '.join(target.host.name for target in targets)}")
        with ThreadPoolExecutor(len(targets)) as pool:
            first = list(pool.map(lambda target: _ask(target, ssh, request, _deadline_seconds(data)), targets))
    finally:
        if listener is not None:
            listener.close()
        Path(token).unlink(missing_ok=True)
    reference = here.facts if here is not None and here.facts else _facts_here(request, _deadline_seconds(data))
    shared = Known(
        config=config, targets=targets, reference=reference, ssh=ssh, port=port, port_taken=taken, data=data
    )
    cells = [cell for found in first for cell in found]
    cells += same_machines(targets)
    for target in targets:
        cells += compare(target, shared)
    cells += [Cell(host=targets[0].host.name, check="data", state="bad", text=text) for text in problems]
    measured = None
    if collective and not any(cell.state == "bad" for cell in cells):
        progress(f"all-reduce over {ranks_text(sum(host.slots for host in hosts))}")
        measured, found = _measure(targets, ssh, config)
        cells += found
    names = [target.host.name for target in targets]
    report = Report(hosts=names, cells=_one_each(cells, names), collective=measured, seconds=0.0)
    report.seconds = round(time.monotonic() - began, 2)
    return report


def _target(host: Host, ssh: Ssh) -> Target:
    if is_local(host.name):
        return Target(host=host, local=True, address="127.0.0.1", port=0)
    name, port = ssh.address(host.name)
    try:
        address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError):
        address = ""
    return Target(host=host, local=False, address=address, port=port)


def _own_address(config: Config, targets: Sequence[Target]) -> str:
    """The address by which the others reach this machine."""
    if config.network_interface is not None:
        for item in psutil.net_if_addrs().get(config.network_interface, []):
            if item.family == socket.AF_INET:
                return item.address
    others = [target.address for target in targets if not target.local and target.address]
    return (host_facts.source_address(others[0]) if others else None) or "127.0.0.1"


def _listen(here: Target | None, config: Config) -> tuple[socket.socket | None, int, str]:
    """A socket where the ranks will meet, its port, and who has taken the port, if somebody has."""
    if here is None:
        return None, config.master_port or 0, ""
    family = socket.AF_INET6 if ":" in here.address else socket.AF_INET
    try:
        listener = socket.create_server((here.address, config.master_port or 0), family=family, backlog=64)
        return listener, listener.getsockname()[1], ""
    except OSError as error:
        return None, config.master_port or 0, _owner_of(config.master_port) or str(error.strerror)


def _owner_of(port: int | None) -> str:
    for item in psutil.net_connections("tcp"):
        if item.status == psutil.CONN_LISTEN and item.laddr.port == port and item.pid:
            try:
                return f"process {item.pid}, {shlex.join(psutil.Process(item.pid).cmdline())[:60]}"
            except psutil.Error:
                return f"process {item.pid}"
    return ""


def _make_token(output_dir: str) -> str:
    """A file beside or in output_dir, which only a host that shares its disk can see."""
    place = Path(output_dir).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    token = place / f".hynb-{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError:
        # Said by the check of the disk.
        return str(token)
    return str(token)


def _data_files(config: Config) -> tuple[list[str], list[str]]:
    """What is wrong with the data parameters, and the files that every rank reads: data, settings, tokenizer."""
    problems: list[str] = []
    files: list[str] = []
    for parameter in ("train_data_file", "eval_data_file"):
        if (paths := getattr(config, parameter)) is not None:
            try:
                files += [str(path.absolute()) for path in find_files(paths, parameter)]
            except HynbError as error:
                problems += error.problems
    if config.deepspeed not in zero.PRESETS and Path(config.deepspeed).is_file():
        files.append(str(Path(config.deepspeed).absolute()))
    if config.tokenizer_name_or_path is not None and (folder := Path(config.tokenizer_name_or_path)).is_dir():
        files += [str(path.absolute()) for path in sorted(folder.iterdir()) if path.match("*token*")]
    return problems, files


def _deadline_seconds(data: Sequence[str]) -> float:
    sizes = sum(min(Path(path).stat().st_size, host_facts.WHOLE_BYTES) for path in data)
    return _FACTS_SECONDS + sizes / _HASHED_BYTES_PER_SECOND


def _request(
    config: Config,
    targets: Sequence[Target],
    here: Target | None,
    token: str,
    port: int,
    data: list[str],
    ssh: Ssh,
) -> dict[str, Any]:
    model = Path(config.model_name_or_path).expanduser().absolute() if config.model_name_or_path else None
    logins = {}
    if config.launcher in ("openmpi", "mpich"):
        # Their launchers hand the work on from host to host.
        options = shlex.join(ssh.options())
        logins = {t.host.name: ["sh", "-c", f"ssh {options} {shlex.quote(t.host.name)} true"] for t in targets}
    return {
        "packages": list(PACKAGES),
        "code": str(CODE / "hynb"),
        "output_dir": str(Path(config.output_dir).expanduser().absolute()),
        "model": str(model) if model else None,
        "data": data,
        "token": token,
        "addresses": [target.address for target in targets if target.address],
        "connect": {"master": [here.address, port]} if here is not None and len(targets) > 1 else {},
        "login": logins,
    }


def _ask(target: Target, ssh: Ssh, request: dict[str, Any], deadline_seconds: float) -> list[Cell]:
    """Asks a host for its facts and says how far the way to it is open."""
    own = {"login": {name: words for name, words in request["login"].items() if name != target.host.name}}
    script = host_facts.sent(request | own)
    target.asked = time.time()
    answer = ssh.run(target.host.name, [sys.executable, "-"], deadline_seconds=deadline_seconds, input=script)
    target.answered = time.time()
    target.facts = host_facts.told(answer.out)
    if target.facts is not None:
        if target.by_ssh and (problem := ssh.run(target.host.name, ["true"], always=True).problem):
            return way_closed(target, problem, ssh, _probe(target))
        return way_open(target)
    if answer.problem and not target.local:
        return way_closed(target, answer.problem, ssh, _probe(target))
    said = answer.problem or (answer.err.strip().splitlines() or [f"exit code {answer.code}"])[-1]
    there = ssh.run(target.host.name, ["test", "-d", str(CODE / "hynb")])
    return no_python(target, said, sys.executable, no_code=ssh if there.code == 1 else None)


def _probe(target: Target) -> str:
    """Why the port can't be reached; empty when it can."""
    if not target.address:
        return "the name can't be resolved"
    try:
        with socket.create_connection((target.address, target.port), timeout=_PROBE_SECONDS):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def _facts_here(request: dict[str, Any], deadline_seconds: float) -> dict[str, Any]:
    """This machine's facts, where it is none of the hosts: what the others are compared with."""
    script = host_facts.sent(request | {"connect": {}, "login": {}})
    answer = Ssh().run("localhost", [sys.executable, "-"], deadline_seconds=deadline_seconds, input=script)
    facts = host_facts.told(answer.out)
    if facts is None:
        why = answer.problem or (answer.err.strip().splitlines() or [f"exit code {answer.code}"])[-1]
        raise ClusterError(f"{socket.gethostname()}: this machine can't be looked at: {why}")
    return facts


def _measure(targets: Sequence[Target], ssh: Ssh, config: Config) -> tuple[dict[str, Any] | None, list[Cell]]:
    """Starts the ranks of the small all-reduce on all hosts."""
    address = targets[0].address
    port = config.master_port or (free_port_at(address) if targets[0].local else 29500)
    common = {"slots": [target.host.slots for target in targets], "address": address, "port": port}
    common |= {"deadline_seconds": _COLLECTIVE_SECONDS}
    # What a user sets for NCCL in a run holds here, too.
    environment = rank_environment(config, {})

    def start(node: int) -> Any:
        target = targets[node]
        request = common | {"node": node, "interface": interface_of(target, config)}
        words = [sys.executable, "-m", "hynb.preflight.collective", json.dumps(request)]
        visible = {} if target.facts and target.facts["gpus"] else {"CUDA_VISIBLE_DEVICES": ""}
        if target.host.slot_ids and not visible:
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, target.host.slot_ids))}
        given = [f"{name}={value}" for name, value in (environment | visible).items()]
        script = f"cd {shlex.quote(str(CODE))} && exec {shlex.join(['env', *given, *words])}"
        return ssh.run(target.host.name, ["sh", "-c", script], deadline_seconds=_COLLECTIVE_SECONDS + 10)

    with ThreadPoolExecutor(len(targets)) as pool:
        answers = list(pool.map(start, range(len(targets))))
    line = next((line for line in answers[0].out.splitlines() if line.startswith(MARK)), None)
    measured = json.loads(line.removeprefix(MARK)) if line else None
    cells = []
    for target, answer in zip(targets, answers, strict=True):
        failed = answer.problem or (answer.code and ((answer.err.strip().splitlines() or ["no word"])[-1]))
        cells.append(collective_cell(target.host.name, measured, str(failed or ""), config.hostfile))
    return measured, cells


def _one_each(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """One cell a host and check, the worst of several; what was not reached is unknown."""
    order = {"bad": 0, "ok": 1, "unknown": 2}
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = (cell.host, cell.check)
        if key not in found or order[cell.state] < order[found[key].state]:
            found[key] = cell
    checks = [check for check in CHECKS if any(key[1] == check for key in found)]
    unknown = {"state": "unknown", "text": "not reached"}
    return [found.get((name, check)) or Cell(host=name, check=check, **unknown) for check in checks for name in names]


def examine(
    config: Config, progress: Callable[[str], None], *, collective: bool, copy: bool, copy_model: bool = False
) -> Report:
    """A preflight, repeated after what hosts lack was copied to them where that is wanted; its report is kept.

    Raises:
        ClusterError: what `preflight` raises, and what could not be copied.
    """
    report = preflight(config, collective=collective, progress=progress)
    if (copy or copy_model) and not report.ok:
        if problems := fix(report, progress, model=copy_model):
            raise ClusterError(problems)
        report = preflight(config, collective=collective, progress=progress)
    write_report(report, config)
    return report


def fix(report: Report, progress: Callable[[str], None], *, model: bool = False) -> list[str]:
    """Copies code and data to hosts that lack them, by the commands that the report shows; returns what failed.

    Args:
        model: copy the model folder too, which may take hours.
    """
    problems = []
    for cell in report.bad:
        if cell.check not in ("code", "data", *(("model",) if model else ())) or not cell.mend.startswith("rsync"):
            continue
        progress(cell.mend)
        # rsync's progress goes where messages go: what is printed stays the report.
        copying = subprocess.run(["sh", "-c", cell.mend], stdin=subprocess.DEVNULL, stdout=2, check=False)
        code = copying.returncode
        if code:
            problems.append(f"{cell.host}: {cell.check}: `{cell.mend}` ended with exit code {code}")
    return problems
