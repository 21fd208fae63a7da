"""Sets up the hosts of a cluster from a notebook, and shows its preflight as a table."""

from __future__ import annotations

import getpass
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from IPython.core.error import StdinNotImplementedError
from IPython.display import display

from hynb.cluster import ClusterDir, HostKey, HostState, Ssh, ssh_key, ssh_setup
from hynb.cluster import hostfile as hostfiles
from hynb.config import Config, absolute_paths, read_yaml
from hynb.errors import ClusterError, ConfigError
from hynb.preflight import Cell, Report, examine, text
from hynb.widgets.machine import write_local_hostfile
from hynb.widgets.plan import Shown
from hynb.widgets.table import Table

_MARKS = {"ok": ("good", "✓"), "bad": ("bad", "✗"), "unknown": ("faint", "–")}
_NO_KEY = "accepts none of our keys"


@dataclass(kw_only=True, frozen=True, repr=False)
class ReadyHosts(Table):
    """The hosts that a run may use, and the file that names them."""

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
    """Makes this machine able to log in on every host, asking for what only a person knows; writes the hostfile.

    New host keys and a password are asked for below the cell; without a person they are refused with what to do.

    Args:
        hosts: ip:8,ip:8 or a hostfile; "auto" for this machine alone.
        folder: of the cluster: hostfile, ssh_config, known_hosts.
        accept: fingerprints that were compared, separated by commas.
        hostfile: where this machine's own is written, when it is alone; "auto" for the cluster's folder.
        slots: of this machine alone.
        overwrite: replace a hostfile of this machine alone that says something else.

    Raises:
        ClusterError: every host that can't be logged in on, with what to type.
    """
    cluster = ClusterDir(folder)
    if hosts == "auto":
        path = str(cluster.hostfile) if hostfile == "auto" else hostfile
        written = write_local_hostfile(path, slots=slots, overwrite=overwrite)
        return ReadyHosts(columns=written.columns, rows=written.rows, hostfile=written.rows[0][0])
    named = hostfiles.named(hosts)
    confirm = _confirm([item.strip() for item in accept.split(",") if item.strip()])
    given = {"port": port, "user": None if user == "auto" else user, "confirm": confirm}
    states = ssh_setup.setup(named, cluster.path, **given)
    closed = [state.name for state in states if _NO_KEY in state.problem]
    if closed:
        password = _asked(lambda: getpass.getpass(f"Password on {', '.join(closed)} (used once, kept nowhere): "))
        if password:
            states = ssh_setup.setup(named, cluster.path, **given, password=password)
    table = _states_table(states, str(cluster.hostfile))
    problems = [_with_lines(cluster, state) for state in states if state.problem]
    if problems:
        display(table)
        raise ClusterError(problems)
    return table


def check_hosts(hostfile: str, run_config: str = "auto", *, collective: bool = True, copy: bool = False) -> Shown:
    """Runs the preflight and shows it.

    Args:
        run_config: YAML file of a run whose model, data and output_dir are looked at too; "auto" for none.
        collective: end with an all-reduce over all ranks.
        copy: copy code and data to hosts that lack them, then look again.

    Raises:
        ClusterError: every red cell, with the command that mends it.
    """
    reading = read_yaml(run_config) if run_config != "auto" else None
    if reading is not None and reading.problems:
        raise ConfigError(reading.problems)
    config = absolute_paths(Config(**((reading.values if reading else {}) | {"hostfile": hostfile})))

    def say(line: str) -> None:
        print(line, flush=True)

    report = examine(config, say, collective=collective, copy=copy)
    shown = Shown(text(report), _markup(report))
    if not report.ok:
        display(shown)
        raise ClusterError([_problem(cell) for cell in report.bad])
    return shown


def _markup(report: Report) -> str:
    """The table in HTML: a sign and a colour a cell, and under it what mends the red ones."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("check", *report.hosts))
    rows = ""
    for row in report.rows():
        rows += f'<tr><th scope="row">{row[0].check}</th>'
        for cell in row:
            kind, mark = _MARKS[cell.state]
            rows += f'<td><span class="{kind}"><b>{mark}</b></span> {html.escape(cell.text)}</td>'
        rows += "</tr>"
    table = f'<table class="hynb-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    mends = ""
    for cell in report.bad:
        mends += f'<div><b class="bad">✗ {html.escape(cell.host)}, {cell.check}</b>: {html.escape(cell.text)}'
        if cell.mend:
            mends += f'; {html.escape(cell.where)}:<pre class="hynb-pre">{html.escape(cell.mend)}</pre>'
        mends += "</div>"
    pairs = "".join(f"<div>{html.escape(line)}</div>" for line in report.pair_lines())
    return f"{table}{pairs}{mends}"


def _problem(cell: Cell) -> str:
    mend = f"; {cell.where}: `{cell.mend}`" if cell.mend else ""
    return f"{cell.host}: {cell.check}: {cell.text}{mend}"


def _states_table(states: Sequence[HostState], hostfile: str) -> ReadyHosts:
    rows = [(state.name, state.done or "–", "✗ not yet" if state.problem else "✓ ready") for state in states]
    return ReadyHosts(columns=("host", "done", "state"), rows=rows, title=f"Hosts in {hostfile}", hostfile=hostfile)


def _with_lines(cluster: ClusterDir, state: HostState) -> str:
    """A host's problem, with the lines to run there where the key is what is missing."""
    if _NO_KEY not in state.problem:
        return state.problem
    port = Ssh(config=cluster.ssh_config).address(state.name)[1]
    lines = ssh_key.lines_for(state.name, ssh_key.find_or_make_key(), port)
    return "\n  ".join([f"{state.name}: {_NO_KEY}. Run there, then this cell again:", *lines])


def _confirm(accepted: Sequence[str]) -> Callable[[str, Sequence[HostKey]], bool]:
    def confirm(host: str, keys: Sequence[HostKey]) -> bool:
        if any(key.fingerprint in accepted for key in keys):
            return True
        shown = "\n".join(f"  {key.fingerprint} ({key.kind})" for key in keys)
        print(f"{host} shows these keys for the first time; compare them with the host's own:\n{shown}", flush=True)
        answer = _asked(lambda: input(f"Are they {host}'s own? Keep them [y/N]: "))
        return (answer or "").strip().lower() in ("y", "yes")

    return confirm


def _asked(ask: Callable[[], Any]) -> Any:
    """A person's answer; None where a notebook runs without one."""
    try:
        return ask()
    except StdinNotImplementedError:
        return None
