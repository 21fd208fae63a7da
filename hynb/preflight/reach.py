"""Cells on how far a host can be reached: name, port, host key, login, and the Python that runs there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hynb.cluster import Answer, Failure, Ssh, sshd_line
from hynb.preflight.report import Cell
from hynb.preflight.targets import Target
from hynb.supervision import CODE

# What an environment is made from.
_CHECKOUT = ("hynb", "pyproject.toml", "requirements.lock", "Makefile", "README.md")


def reachable_cells(target: Target) -> list[Cell]:
    """The cells of a host that can be logged in on."""
    if target.local and not target.by_ssh:
        texts = dict.fromkeys(("name", "port", "host key", "login"), "this machine")
    else:
        texts = {"name": target.address, "port": str(target.port), "host key": "known", "login": "key accepted"}
    return [Cell(host=target.name, check=check, state="ok", text=text) for check, text in texts.items()]


def unreachable_cells(target: Target, answer: Answer, ssh: Ssh, connection: str) -> list[Cell]:
    """The cells of a host that cannot be logged in on: the first failed check, with its fix, and those before it.

    Args:
        answer: that of a command over ssh.
        connection: why its port cannot be connected to; empty when it can.
    """
    name = target.name
    failed = _failed_check(target, answer, ssh, connection)
    passed = {"name": target.address, "port": str(target.port), "host key": "known"}
    if failed.check == "login" and answer.failure is not Failure.KEY_REFUSED:
        # ssh may have failed before it compared the host key.
        del passed["host key"]
    cells = []
    for check, text in passed.items():
        if check == failed.check:
            break
        cells.append(Cell(host=name, check=check, state="ok", text=text))
    return [*cells, failed]


def _failed_check(target: Target, answer: Answer, ssh: Ssh, connection: str) -> Cell:
    """The first check that fails on a host that cannot be logged in on."""
    name = target.name

    def bad(check: str, text: str, fix: str, fix_host: str = "") -> Cell:
        return Cell(host=name, check=check, state="bad", text=text, fix=fix, fix_host=fix_host)

    if not target.address:
        line = shlex.quote(f"ADDRESS {name}")
        return bad("name", "can't be resolved: add its address", f"echo {line} >> /etc/hosts")
    if connection:
        text = f"{target.port}: {connection.lower()}"
        if "refused" in connection:
            return bad("port", text, sshd_line(target.port), "" if target.local else name)
        return bad("port", text, shlex.join(["ping", "-c", "3", target.address]))
    if answer.failure is Failure.HOST_KEY_CHANGED:
        fix = f"{ssh.forget_command(name)} && {ssh.trust_command(name)}"
        return bad("host key", "has changed: ask its administrator", fix)
    if answer.failure is Failure.HOST_KEY_UNKNOWN:
        return bad("host key", "isn't known yet", ssh.trust_command(name))
    if answer.failure is Failure.KEY_REFUSED:
        return bad("login", "accepts none of our keys", ssh.install_command(name))
    return bad("login", answer.problem.removeprefix(f"{name}: "), ssh.shown(name, "-v"))


def same_machines(targets: Sequence[Target]) -> list[Cell]:
    """The cells of hosts that are another listed host under a second name: its GPUs would be used twice."""
    seen: dict[str, str] = {}
    found = []
    for target in targets:
        place = "this machine" if target.local else f"{target.address} port {target.port}" if target.address else ""
        if place in seen:
            text = f"is {seen[place]} by another name ({place}): list it once"
            found.append(Cell(host=target.name, check="name", state="bad", text=text))
        elif place:
            seen[place] = target.name
    return found


def no_python_cells(target: Target, reason: str, python: str, *, code_is_missing: bool, ssh: Ssh) -> list[Cell]:
    """The cells of a host that can be logged in on, but where this environment's Python does not run.

    Args:
        reason: the last line of the error.
        code_is_missing: the folder of this code is missing there, too; it can be copied.
    """
    text = f"{python} doesn't run there: {reason}"
    fix = f"cd {shlex.quote(str(CODE))} && make .venv"
    bad = Cell(host=target.name, check="python", state="bad", text=text, fix=fix, fix_host=target.name)
    sources = [CODE / name for name in _CHECKOUT]
    if not code_is_missing or not all(path.exists() for path in sources):
        return [*reachable_cells(target), bad]
    copy = rsync_command(target, ssh, [str(path) for path in sources], f"{CODE}/", ["--exclude=__pycache__"])
    missing = Cell(host=target.name, check="code", state="bad", text=f"missing: {CODE / 'hynb'}", fix=copy)
    return [*reachable_cells(target), bad, missing]


def rsync_command(
    target: Target, ssh: Ssh, sources: Sequence[str], destination: str, options: Sequence[str] = ()
) -> str:
    """The command that copies files of this machine to a path on a host."""
    shell = shlex.join(["ssh", *ssh.file])
    name = f"[{target.name}]" if ":" in target.name else target.name
    # Without -s, rsync before 3.2.4 lets the host's shell interpret the path.
    words = ["rsync", "-a", "-s", "--mkpath", "--info=progress2", *options]
    return shlex.join([*words, "-e", shell, *sources, f"{name}:{destination}"])
