"""Commands on other hosts through OpenSSH's own program, each with a deadline and a reason when it fails."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster.network import is_local
from hynb.errors import ClusterError

_PROGRAMS = ("ssh", "ssh-keygen", "ssh-keyscan")
_CONNECT_SECONDS = 8


class Failure(enum.Enum):
    """Why ssh could not run a command on a host."""

    HOST_KEY_CHANGED = enum.auto()
    HOST_KEY_UNKNOWN = enum.auto()
    KEY_FILE_READABLE = enum.auto()
    KEY_REFUSED = enum.auto()
    PORT_CLOSED = enum.auto()
    UNREACHABLE = enum.auto()
    NAME_UNKNOWN = enum.auto()
    TIMED_OUT = enum.auto()
    PROGRAM_MISSING = enum.auto()
    OTHER = enum.auto()


# Patterns in ssh's error output, and the message for each. The order matters: a changed host key also leads to
# `verification failed`, and a private key that ssh ignores also to `Permission denied`.
_FAILURES = (
    (
        Failure.HOST_KEY_CHANGED,
        "REMOTE HOST IDENTIFICATION HAS CHANGED|Offending .* key",
        "its host key differs from the known one: the host was reinstalled, or another machine answers at its "
        "address. Ask its administrator; if the change is right: `{forget}` and `{trust}`",
    ),
    (
        Failure.HOST_KEY_UNKNOWN,
        "Host key verification failed|host key is known",
        "its host key isn't known here. Compare its fingerprint and accept it: `{trust}`",
    ),
    (
        Failure.KEY_FILE_READABLE,
        "bad permissions|UNPROTECTED PRIVATE KEY",
        "ssh refuses the private key because others can read it: `chmod 600` the key file that it names ({line})",
    ),
    (
        Failure.KEY_REFUSED,
        "Permission denied|Too many authentication failures",
        "accepts none of our keys. Install ours there: `{install_key}`, or paste the line that "
        "`hynb hosts show{folder}` prints into its ~/.ssh/authorized_keys",
    ),
    (
        Failure.PORT_CLOSED,
        "Connection refused",
        "nothing listens on port {port} of {name}. Start sshd there: `{sshd}`, or correct the port in the ssh_config",
    ),
    (
        Failure.UNREACHABLE,
        "timed out|No route to host|Network is unreachable",
        "{name} port {port} doesn't answer: the machine is off, hangs, or a firewall drops the packets. "
        "Try `ping {name}`",
    ),
    (
        Failure.NAME_UNKNOWN,
        "Could not resolve|Name or service not known|Temporary failure in name resolution",
        "the name {name} can't be resolved here: add its address to /etc/hosts, or list the address itself",
    ),
)


@dataclass(kw_only=True, frozen=True)
class Answer:
    """The result of a command on a host.

    Args:
        code: its exit code; None when it did not run to its end.
        problem: why it did not run to its end, with what to do; empty when it did.
        failure: the kind of problem; None when it ran to its end.
    """

    code: int | None
    out: str
    err: str
    problem: str = ""
    failure: Failure | None = None

    def last_error_line(self, default: str) -> str:
        """The last line of the command's error output, or a default when it wrote none."""
        return (self.err.strip().splitlines() or [default])[-1]


@dataclass(kw_only=True, frozen=True)
class Ssh:
    """How hosts are reached.

    Args:
        config: an OpenSSH configuration file; None for the user's own settings.
    """

    config: Path | None = None

    @property
    def file(self) -> list[str]:
        """The arguments that name the configuration to ssh."""
        return ["-F", str(self.config)] if self.config else []

    @property
    def folder(self) -> str:
        """The arguments that name its folder to `hynb hosts`, after a space; empty for the user's own settings."""
        return f" --folder {shlex.quote(str(self.config.parent))}" if self.config else ""

    def options(self) -> list[str]:
        """The arguments of `ssh` before the host's name; ssh never asks a question."""
        return [*self.file, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]

    def command(self, host: str, argv: Sequence[str], *, always: bool = False) -> list[str]:
        """The argument list that runs a command on a host, which may be this machine.

        Args:
            always: use ssh even on this machine, as pdsh does.
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
        """Runs a command and waits for it; a host that is down leads to an answer, not to an exception.

        Args:
            deadline_seconds: the connection is closed after this time; what it started there may continue.
            input: text for the command's standard input; None for an empty one.
            always: use ssh even on this machine, as pdsh does.
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
            problem = f"{host}: {command[0]} can't be run on this machine: {error.strerror}"
            problem += ". Install it: `apt-get install openssh-client`" if command[0] == "ssh" else ""
            return Answer(code=None, out="", err="", problem=problem, failure=Failure.PROGRAM_MISSING)
        try:
            out, err = process.communicate(input, timeout=deadline_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            what = f"no answer within {deadline_seconds:g} s to {shlex.join(argv)[:80]}"
            problem = f"{host}: {what}: the host hangs, or the network drops its packets. Try `{self.shown(host)}`"
            return Answer(code=None, out=out, err=err, problem=problem, failure=Failure.TIMED_OUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        # 255 is ssh's own exit code; a command that ends with 255 itself can't be distinguished.
        by_ssh = always or not is_local(host)
        if process.returncode == 255 and by_ssh:
            failure, problem = self.explain(host, err)
            return Answer(code=None, out=out, err=err, problem=problem, failure=failure)
        return Answer(code=process.returncode, out=out, err=err)

    def settings(self, host: str) -> dict[str, list[str]]:
        """ssh's settings for a host: hostname, port, user, identityfile, userknownhostsfile and more."""
        found: dict[str, list[str]] = {}
        try:
            done = subprocess.run(["ssh", *self.file, "-G", "--", host], capture_output=True, text=True, check=False)
        except OSError:
            # The first command that needs ssh reports this.
            return found
        for line in done.stdout.splitlines():
            name, _, value = line.partition(" ")
            found.setdefault(name, []).append(value)
        return found

    def address(self, host: str) -> tuple[str, int]:
        """The name or address, and the port, to which ssh connects for a host; `resolve` gives the IP address."""
        found = self.settings(host)
        return found.get("hostname", [host])[0], int(found.get("port", ["22"])[0])

    def shown(self, host: str, *options: str) -> str:
        """The command with which a person tries a host."""
        return shlex.join(["ssh", *options, *self.file, host, "true"])

    def trust_command(self, host: str) -> str:
        """The command that accepts a host's key."""
        return f"hynb hosts trust {shlex.quote(host)}{self.folder}"

    def install_command(self, host: str) -> str:
        """The command that installs our public key on a host."""
        return f"hynb hosts install-key {shlex.quote(host)}{self.folder}"

    def forget_command(self, host: str) -> str:
        """The command that removes a host's key from known_hosts."""
        return shlex.join(["ssh-keygen", "-R", known_name(*self.address(host)), "-f", self._known_hosts(host)])

    def explain(self, host: str, err: str) -> tuple[Failure, str]:
        """The kind of failure in ssh's error output, and a message with what to do."""
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        last = lines[-1] if lines else "no error message"
        for failure, pattern, text in _FAILURES:
            if re.search(pattern, err, re.IGNORECASE):
                name, port = self.address(host)
                message = text.format(
                    name=name,
                    port=port,
                    line=next((line for line in lines if "bad permissions" in line), last),
                    sshd=sshd_line(port),
                    folder=self.folder,
                    forget=self.forget_command(host),
                    trust=self.trust_command(host),
                    install_key=self.install_command(host),
                )
                return failure, f"{host}: {message}"
        return Failure.OTHER, f"{host}: ssh failed: {last}. Try `{self.shown(host)}`"

    def _known_hosts(self, host: str) -> str:
        files = self.settings(host).get("userknownhostsfile", ["~/.ssh/known_hosts"])[0]
        # ssh lists several files separated by spaces, which a single file's name may contain as well.
        name = files if Path(files).is_file() else files.split()[0]
        # A quoted ~ would not be expanded by the shell in which the command is run.
        return str(Path(name).expanduser())


def known_name(name: str, port: int) -> str:
    """A host as known_hosts files name it."""
    return name if port == 22 else f"[{name}]:{port}"


def require_openssh() -> None:
    """Checks that OpenSSH's programs are installed.

    Raises:
        ClusterError: the missing ones.
    """
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        names = ", ".join(missing)
        raise ClusterError(f"{names}: not found on this machine. Install it: `apt-get install openssh-client`")


def sshd_line(port: int) -> str:
    """The command that starts sshd on a host, also in a container that never had one."""
    return f"ssh-keygen -A && mkdir -p /run/sshd && /usr/sbin/sshd -p {port}"
