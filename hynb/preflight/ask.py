"""Asks every host of a run for its facts, all at the same time."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster import PACKAGES, FactsRequest, HostFacts, Ssh, host_facts, listener_of
from hynb.config import Config
from hynb.errors import ClusterError
from hynb.preflight.reach import no_python_cells, reachable_cells, unreachable_cells
from hynb.preflight.report import Cell
from hynb.preflight.targets import Known, Reply, Target
from hynb.supervision import CODE

_FACTS_SECONDS = 40.0
_HASHED_BYTES_PER_SECOND = 100e6
_CONNECT_SECONDS = 6.0


@dataclass(kw_only=True, frozen=True)
class _MasterPort:
    """The master port, on which a socket listens meanwhile, and what already listened there; empty if nothing."""

    port: int
    taken_by: str = ""


def ask_hosts(config: Config, targets: Sequence[Target], ssh: Ssh, data: Sequence[str]) -> tuple[Known, list[Cell]]:
    """Asks all hosts for their facts.

    Args:
        data: absolute paths of the files that every rank reads.

    Returns:
        the replies with what they are compared with, and the cells on how far each host can be reached.

    Raises:
        ClusterError: this machine's own facts cannot be collected.
    """
    here = next((target for target in targets if target.local), None)
    deadline_seconds = _deadline_seconds(data)
    with _token(config.output_dir) as token, _listening(here, config) as master:
        request = _request(config, targets, here, token, master.port, data, ssh)
        with ThreadPoolExecutor(len(targets)) as pool:
            results = list(pool.map(lambda target: _ask(target, ssh, request, deadline_seconds), targets))
    replies = [reply for reply, _ in results if reply is not None]
    own = next((reply.facts for reply in replies if reply.target is here), None)
    known = Known(
        config=config,
        targets=targets,
        replies=replies,
        reference=own or _own_facts(request, deadline_seconds),
        ssh=ssh,
        port=master.port,
        port_taken_by=master.taken_by,
        data=data,
    )
    return known, [cell for _, cells in results for cell in cells]


@contextlib.contextmanager
def _token(output_dir: str) -> Iterator[str]:
    """A file in the run folder, or in the nearest existing folder above it: hosts that see it share that folder."""
    token = host_facts.existing_folder(output_dir) / f".hynb-{uuid.uuid4().hex}"
    # Where nothing can be written, the check of the disk reports it.
    with contextlib.suppress(OSError):
        token.touch()
    try:
        yield str(token)
    finally:
        with contextlib.suppress(OSError):
            token.unlink()


@contextlib.contextmanager
def _listening(here: Target | None, config: Config) -> Iterator[_MasterPort]:
    """Listens where the ranks will meet, so that the other hosts can try to connect."""
    port = config.master_port or 0
    if here is None:
        yield _MasterPort(port=port)
        return
    family = socket.AF_INET6 if ":" in here.address else socket.AF_INET
    try:
        listener = socket.create_server((here.address, port), family=family, backlog=64)
    except OSError as error:
        yield _MasterPort(port=port, taken_by=listener_of(port) or str(error.strerror))
        return
    with listener:
        yield _MasterPort(port=listener.getsockname()[1])


def _deadline_seconds(data: Sequence[str]) -> float:
    hashed_bytes = sum(min(Path(path).stat().st_size, host_facts.WHOLE_BYTES) for path in data)
    return _FACTS_SECONDS + hashed_bytes / _HASHED_BYTES_PER_SECOND


def _request(
    config: Config,
    targets: Sequence[Target],
    here: Target | None,
    token: str,
    port: int,
    data: Sequence[str],
    ssh: Ssh,
) -> FactsRequest:
    model = Path(config.model_name_or_path).expanduser().absolute() if config.model_name_or_path else None
    logins = {}
    if config.launcher in ("openmpi", "mpich"):
        # Their launchers log in from host to host.
        logins = {target.name: ["ssh", *ssh.options(), "--", target.name, "true"] for target in targets}
    return {
        "packages": list(PACKAGES),
        "code": str(CODE / "hynb"),
        "output_dir": str(Path(config.output_dir).expanduser().absolute()),
        "model": str(model) if model else None,
        "data": list(data),
        "token": token,
        "addresses": [target.address for target in targets if target.address],
        "connect": {"master": (here.address, port)} if here is not None and len(targets) > 1 else {},
        "login": logins,
    }


def _ask(target: Target, ssh: Ssh, request: FactsRequest, deadline_seconds: float) -> tuple[Reply | None, list[Cell]]:
    """Asks one host for its facts; returns them with the cells on how far it can be reached."""
    logins = {name: command for name, command in request["login"].items() if name != target.name}
    script = host_facts.script_for({**request, "login": logins})
    requested_at = time.time()
    answer = ssh.run(target.name, [sys.executable, "-"], deadline_seconds=deadline_seconds, input=script)
    answered_at = time.time()
    facts = host_facts.parse_output(answer.out)
    if facts is not None:
        reply = Reply(target=target, facts=facts, requested_at=requested_at, answered_at=answered_at)
        if target.by_ssh and (login := ssh.run(target.name, ["true"], always=True)).problem:
            return reply, unreachable_cells(target, login, ssh, _try_port(target))
        return reply, reachable_cells(target)
    if answer.problem and not target.local:
        return None, unreachable_cells(target, answer, ssh, _try_port(target))
    reason = answer.problem or answer.last_error_line(f"exit code {answer.code}")
    folder = ssh.run(target.name, ["test", "-d", str(CODE / "hynb")])
    return None, no_python_cells(target, reason, sys.executable, code_is_missing=folder.code == 1, ssh=ssh)


def _try_port(target: Target) -> str:
    """Why the host's ssh port cannot be connected to; empty when it can."""
    if not target.address:
        return "the name can't be resolved"
    return host_facts.try_connection(target.address, target.port, _CONNECT_SECONDS)


def _own_facts(request: FactsRequest, deadline_seconds: float) -> HostFacts:
    """This machine's facts when it is not one of the hosts.

    Raises:
        ClusterError: they cannot be collected.
    """
    script = host_facts.script_for({**request, "connect": {}, "login": {}})
    answer = Ssh().run("localhost", [sys.executable, "-"], deadline_seconds=deadline_seconds, input=script)
    facts = host_facts.parse_output(answer.out)
    if facts is None:
        reason = answer.problem or answer.last_error_line(f"exit code {answer.code}")
        raise ClusterError(f"{socket.gethostname()}: the facts of this machine can't be collected: {reason}")
    return facts
