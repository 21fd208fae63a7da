"""Sets up the hosts of a cluster from a notebook, and shows the preflight of a run as a table."""

from __future__ import annotations

import getpass
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from IPython.core.error import StdinNotImplementedError
from IPython.display import display

from hynb.cluster import ClusterDir, Failure, HostKey, HostState, Ssh, ssh_key, ssh_setup
from hynb.cluster import hostfile as hostfiles
from hynb.config import Config, absolute_paths, read_yaml
from hynb.errors import ClusterError, ConfigError
from hynb.preflight import Cell, Report, run_preflight
from hynb.widgets.machine import write_local_hostfile
from hynb.widgets.markup import Shown, element, note
from hynb.widgets.table import Table

_MARKS = {"ok": ("good", "✓"), "bad": ("bad", "✗"), "unknown": ("faint", "–")}


@dataclass(kw_only=True, frozen=True, repr=False)
class ReadyHosts(Table):
    """The hosts that a run may use.

    Args:
        hostfile: path of the file that lists them.
    """

    hostfile: str


def set_up_hosts(
    hosts: str,
    *,
    folder: str,
    port: int,
    user: str,
    accept: str,
    hostfile: str,
    slots: int | str,
    overwrite: bool,
) -> ReadyHosts:
    """Sets up passwordless logins from this machine to every host, and writes the hostfile.

    New host keys are shown for confirmation and passwords are asked for below the cell. In a headless run nobody can
    answer: an unconfirmed host key or a missing login is then an error that names what to do.

    Args:
        hosts: ip:8,ip:8 or a hostfile; "auto" for this machine alone.
        folder: where hostfile, ssh_config and known_hosts are written.
        port: of sshd on the hosts.
        user: login name on the hosts; "auto" for this user's.
        accept: fingerprints of host keys that were compared, separated by commas.
        hostfile: for this machine alone: where its hostfile is written; "auto" for the folder.
        slots: for this machine alone: the number of its ranks, or "auto".
        overwrite: for this machine alone: replace a hostfile with other content.

    Raises:
        ClusterError: every host that does not accept a login, with what to run.
        ConfigError: slots is not a number of ranks.
    """
    cluster = ClusterDir(folder)
    if hosts == "auto":
        path = str(cluster.hostfile) if hostfile == "auto" else hostfile
        written = write_local_hostfile(path, slots=slots, overwrite=overwrite)
        return ReadyHosts(columns=written.columns, rows=written.rows, hostfile=written.rows[0][0])
    fingerprints = [item.strip() for item in accept.split(",") if item.strip()]
    states = _set_up(cluster, hosts, port=port, user=user, fingerprints=fingerprints)
    rows = [(state.name, state.done or "–", "✗ not ready" if state.problem else "✓ ready") for state in states]
    path = str(cluster.hostfile)
    ready = ReadyHosts(columns=("host", "done", "state"), rows=rows, title=f"Hosts in {path}", hostfile=path)
    problems = [_problem_with_lines(cluster, state) for state in states if state.problem]
    if problems:
        display(ready)
        raise ClusterError(problems)
    return ready


def check_hosts(hostfile: str, run_config: str = "auto", *, collective: bool = True, copy: bool = False) -> Shown:
    """Runs the preflight and shows its table.

    Args:
        hostfile: the hosts to check.
        run_config: YAML file of a run whose model, data and output_dir are checked too; "auto" for none.
        collective: end with an all-reduce over all ranks.
        copy: copy code and data to hosts that lack them, then check again.

    Raises:
        ClusterError: every failed check, with the command that fixes it.
        ConfigError: a value of `run_config` that is not valid.
    """
    values: dict[str, Any] = {}
    if run_config != "auto":
        reading = read_yaml(run_config)
        if reading.problems:
            raise ConfigError(reading.problems)
        values |= reading.values
    values["hostfile"] = hostfile
    config = absolute_paths(Config(**values))
    report = run_preflight(config, lambda line: print(line, flush=True), collective=collective, copy=copy)
    shown = Shown(report.to_text(), _markup(report))
    if not report.ok:
        display(shown)
        raise ClusterError([_problem(cell) for cell in report.bad])
    return shown


def _set_up(cluster: ClusterDir, hosts: str, *, port: int, user: str, fingerprints: Sequence[str]) -> list[HostState]:
    """Tries to log in on each host, and once more with a password where the key is refused."""
    named = hostfiles.named(hosts)
    login = None if user == "auto" else user
    confirm = _confirm_with(fingerprints)
    states = ssh_setup.setup(named, cluster.path, port=port, user=login, confirm=confirm)
    refused = [state.name for state in states if state.failure is Failure.KEY_REFUSED]
    if not refused:
        return states
    password = _answer(lambda: getpass.getpass(f"Password on {', '.join(refused)} (used once, stored nowhere): "))
    if not password:
        return states
    return ssh_setup.setup(named, cluster.path, port=port, user=login, confirm=confirm, password=password)


def _markup(report: Report) -> str:
    """The table in HTML, each cell with a mark and a colour, and below it the fix for each failed check."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("check", *report.hosts))
    rows = ""
    for row in report.rows():
        cells = ""
        for cell in row:
            kind, mark = _MARKS[cell.state]
            cells += f'<td><span class="{kind}"><b>{mark}</b></span> {html.escape(cell.text)}</td>'
        rows += f'<tr><th scope="row">{html.escape(row[0].check)}</th>{cells}</tr>'
    table = f'<table class="hynb-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    fixes = ""
    for cell in report.bad:
        fix = f"; {html.escape(cell.where)}:{element('pre', cell.fix, 'hynb-pre')}" if cell.fix else ""
        fixes += f"<div>{element('b', f'✗ {cell.host}, {cell.check}', 'bad')}: {html.escape(cell.text)}{fix}</div>"
    return table + "".join(note(line) for line in report.pair_lines()) + fixes


def _problem(cell: Cell) -> str:
    fix = f"; {cell.where}: `{cell.fix}`" if cell.fix else ""
    return f"{cell.host}: {cell.check}: {cell.text}{fix}"


def _problem_with_lines(cluster: ClusterDir, state: HostState) -> str:
    """A host's problem; where the key is refused, with the lines that install it there."""
    if state.failure is not Failure.KEY_REFUSED:
        return state.problem
    port = Ssh(config=cluster.ssh_config).address(state.name)[1]
    lines = ssh_key.lines_for(ssh_key.find_or_make_key(), port)
    heading = f"{state.name}: does not accept this machine's key. Run these lines there, then this cell again:"
    return "\n  ".join([heading, *lines])


def _confirm_with(fingerprints: Sequence[str]) -> Callable[[str, Sequence[HostKey]], bool]:
    """Accepts host keys with the given fingerprints, and asks a person about others."""

    def confirm(host: str, keys: Sequence[HostKey]) -> bool:
        if any(key.fingerprint in fingerprints for key in keys):
            return True
        shown = "\n".join(f"  {key.fingerprint} ({key.kind})" for key in keys)
        print(f"{host} shows these host keys for the first time; compare them with its own:\n{shown}", flush=True)
        answer = _answer(lambda: input(f"Are these the keys of {host}? Store them [y/N]: "))
        return (answer or "").strip().lower() in ("y", "yes")

    return confirm


def _answer(ask: Callable[[], str]) -> str | None:
    """A person's answer; None in a headless run."""
    try:
        return ask()
    except StdinNotImplementedError:
        return None
