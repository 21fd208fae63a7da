"""Commands on other hosts through OpenSSH's own program, each with a deadline and a cause in words when it fails."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hynb.errors import ClusterError

_PROGRAMS = ("ssh", "ssh-keygen", "ssh-keyscan")
_CONNECT_SECONDS = 8


@dataclass(kw_only=True, frozen=True)
class Answer:
    """What came of a command on a host.

    Args:
        code: its exit code; None when it did not run to its end.
        problem: why it did not run to its end, with what to do; empty when it did.
    """

    code: int | None
    out: str
    err: str
    problem: str = ""


@dataclass(kw_only=True, frozen=True)
class Ssh:
    """How hosts are reached.

    Args:
        config: an OpenSSH configuration file; None for the user's own settings.
    """

    config: Path | None = None

    @property
    def file(self) -> list[str]:
        """The words that name the configuration to ssh."""
        return ["-F", str(self.config)] if self.config else []

    @property
    def folder(self) -> str:
        """The words that name its folder to `hynb hosts`, behind a space; empty for the user's own settings."""
        return f" --folder {shlex.quote(str(self.config.parent))}" if self.config else ""

    def options(self) -> list[str]:
        """What `ssh` is given before the host's name; nothing that is asked for can be answered here."""
        return [*self.file, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]

    def command(self, host: str, argv: Sequence[str], *, always: bool = False) -> list[str]:
        """The words that run a command on a host, which is this machine or another one.

        Args:
            always: through ssh even on this machine, as pdsh does.
        """
        if is_local(host) and not always:
            return list(argv)
        return ["ssh", *self.options(), "--", host, shlex.join(argv)]

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        deadline_seconds: float = 20.0,
        input: str | None = None,
        always: bool = False,
    ) -> Answer:
        """Runs a command and waits for it; a host that is down is an answer, not an exception.

        Args:
            deadline_seconds: after this the connection is ended; what it had begun there may go on.
            input: text for the command's standard input; None for none.
            always: through ssh even on this machine, as pdsh does.
        """
        command = self.command(host, argv, always=always)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            missing = f"{host}: {command[0]} can't be run on this machine: {error.strerror}"
            missing += ". Install it: `apt-get install openssh-client`" if command[0] == "ssh" else ""
            return Answer(code=None, out="", err="", problem=missing)
        try:
            out, err = process.communicate(input, timeout=deadline_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            what = f"no answer within {deadline_seconds:g} s to {shlex.join(argv)[:80]}"
            problem = f"{host}: {what}: the host hangs, or the network drops its packets. Try `{self.shown(host)}`"
            return Answer(code=None, out=out, err=err, problem=problem)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        # 255 is ssh's own code; a command that ends with it has written nothing of ssh's.
        by_ssh = always or not is_local(host)
        problem = self.cause(host, err) if process.returncode == 255 and by_ssh else ""
        return Answer(code=None if problem else process.returncode, out=out, err=err, problem=problem)

    def settings(self, host: str) -> dict[str, list[str]]:
        """What ssh makes of a host's name: hostname, port, user, identityfile, userknownhostsfile and more."""
        found: dict[str, list[str]] = {}
        try:
            asked = subprocess.run(["ssh", *self.file, "-G", "--", host], capture_output=True, text=True, check=False)
        except OSError:
            # Said by the first command that needs it.
            return found
        for line in asked.stdout.splitlines():
            name, _, value = line.partition(" ")
            found.setdefault(name, []).append(value)
        return found

    def address(self, host: str) -> tuple[str, int]:
        """Name or address, and port, at which a host's sshd is looked for."""
        found = self.settings(host)
        return found.get("hostname", [host])[0], int(found.get("port", ["22"])[0])

    def shown(self, host: str) -> str:
        """The command that a person types to try a host."""
        return shlex.join(["ssh", *self.file, host, "true"])

    def cause(self, host: str, err: str) -> str:
        """ssh's own words in ours, with what to do."""
        name, port = self.address(host)
        said = [line.strip() for line in err.splitlines() if line.strip()]
        last = said[-1] if said else "ssh said nothing"
        for pattern, text in _CAUSES:
            if re.search(pattern, err, re.IGNORECASE):
                known = shlex.quote(self._known_hosts(host))
                words = {"host": host, "name": name, "port": port, "known": known, "place": known_name(name, port)}
                words["said"] = next((line for line in said if "bad permissions" in line), last)
                words["sshd"] = sshd_line(port)
                words["folder"] = self.folder
                return f"{host}: " + text.format(**words)
        return f"{host}: ssh failed: {last}. Try `{self.shown(host)}`"

    def _known_hosts(self, host: str) -> str:
        files = self.settings(host).get("userknownhostsfile", ["~/.ssh/known_hosts"])[0]
        # Several are separated by spaces, which one may hold, too.
        return files if Path(files).is_file() else files.split()[0]


# In this order: a changed key also ends in `verification failed`.
_CAUSES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED|Offending .* key",
        "its host key is another one than the one that is known: the host was set up anew, or something else "
        "answers in its place. Ask its administrator; when the change is right: `ssh-keygen -R '{place}' -f {known}` "
        "and `hynb hosts trust {host}{folder}`",
    ),
    (
        "Host key verification failed|host key is known",
        "its host key isn't known here. Look at its fingerprint and keep it: `hynb hosts trust {host}{folder}`",
    ),
    # Before the next: a key that is passed over isn't accepted either.
    (
        "bad permissions|UNPROTECTED PRIVATE KEY",
        "ssh refuses the private key because others can read it: `chmod 600` the key file that it names ({said})",
    ),
    (
        "Permission denied|Too many authentication failures",
        "accepts none of our keys. Install ours there: `hynb hosts install-key {host}{folder}`, or paste the line "
        "that `hynb hosts show{folder}` prints into its ~/.ssh/authorized_keys",
    ),
    (
        "Connection refused",
        "nothing listens on port {port} of {name}. Start sshd there: `{sshd}`, or correct the port in the ssh_config",
    ),
    (
        "timed out|No route to host|Network is unreachable",
        "{name} port {port} doesn't answer: the machine is off, hangs, or a firewall drops the packets. "
        "Try `ping {name}`",
    ),
    (
        "Could not resolve|Name or service not known|Temporary failure in name resolution",
        "the name {name} can't be resolved here: add its address to /etc/hosts, or list the address itself",
    ),
)


def known_name(name: str, port: int) -> str:
    """A host as known_hosts files write it."""
    return name if port == 22 else f"[{name}]:{port}"


def require_openssh() -> None:
    """Makes sure that OpenSSH's programs are there.

    Raises:
        ClusterError: those that are not.
    """
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        names = ", ".join(missing)
        raise ClusterError(f"{names}: not found on this machine. Install it: `apt-get install openssh-client`")


def sshd_line(port: int) -> str:
    """What a person types on a host to start sshd, also in a container that never had one."""
    return f"ssh-keygen -A && mkdir -p /run/sshd && /usr/sbin/sshd -p {port}"


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, so that it needs no ssh."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = {item[4][0].partition("%")[0] for item in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        # A name that ssh_config alone knows belongs to another machine.
        return False
    own = {item.address.partition("%")[0] for items in psutil.net_if_addrs().values() for item in items}
    return bool(found & own) or all(address.startswith("127.") or address == "::1" for address in found)
