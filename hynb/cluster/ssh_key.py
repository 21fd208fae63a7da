"""The key that a cluster's hosts accept: found or created, and installed with a password that is entered once."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster.hostfile import ClusterDir
from hynb.cluster.network import is_local
from hynb.cluster.ssh import Failure, Ssh, require_openssh, sshd_line
from hynb.errors import ClusterError

_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")
_INSTALL_SECONDS = 40.0
_LOGIN_SECONDS = 15.0
# Adds each line of the standard input to authorized_keys, unless it is already there.
AUTHORIZE = """umask 077; mkdir -p ~/.ssh && cd ~/.ssh || exit 3
touch authorized_keys && chmod 600 authorized_keys || exit 3
[ -z "$(tail -c 1 authorized_keys)" ] || echo >> authorized_keys
while IFS= read -r line; do grep -qxF -- "$line" authorized_keys || printf '%s\\n' "$line" >> authorized_keys; done"""


@dataclass(kw_only=True, frozen=True)
class Key:
    """A private key's path and its public key as one line."""

    path: Path
    public: str


def find_or_make_key(path: str | Path | None = None) -> Key:
    """The key that hosts are to accept: the given one, the user's own, or a new Ed25519 key without a passphrase.

    Raises:
        ClusterError: the key has a passphrase or can be read by others, or no key can be created.
    """
    require_openssh()
    home = Path.home() / ".ssh"
    candidates = [Path(path).expanduser()] if path else [home / name for name in _KEY_NAMES]
    found = next((item for item in candidates if item.is_file()), None)
    if found is None:
        found = candidates[0]
        _make_key(found)
    if found.stat().st_mode & 0o077:
        command = shlex.join(["chmod", "600", str(found)])
        raise ClusterError(f"{found}: others can read this private key, and ssh refuses such a key: `{command}`")
    done = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", str(found)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ClusterError(
            f"{found}: has a passphrase, which nobody can enter for a job, or is not a private key ({reason}). "
            "Name another one with --key; a new key is created if the path does not exist"
        )
    return Key(path=found, public=done.stdout.strip())


def _make_key(path: Path) -> None:
    public = path.with_name(f"{path.name}.pub")
    if public.exists():
        raise ClusterError(
            f"{public}: its private key is missing, and a new key would replace it. Name another one with --key; "
            "a new key is created if the path does not exist"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"{path}: no key can be created: {error.strerror}") from None
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ClusterError(f"{path}: no key can be created: {done.stderr.strip() or done.stdout.strip()}")


def install_key(cluster: ClusterDir, host: str, key: Key, password: str) -> None:
    """Logs in with a password once and adds the public key to the host's authorized_keys.

    ssh reads the password from a named pipe that only this user can open: it is in no command line, environment
    variable or file.

    Args:
        password: not used when the host is this machine and the user is this one.

    Raises:
        ClusterError: the password was refused, the host can't be reached, or it still refuses the key.
    """
    ssh = Ssh(config=cluster.ssh_config)
    if is_local(host) and ssh.settings(host).get("user") == [getpass.getuser()]:
        answer = ssh.run(host, ["sh", "-c", AUTHORIZE], input=key.public + "\n")
        if answer.code:
            raise ClusterError(f"{host}: the key can't be installed: {answer.err.strip()}")
        return
    done = _run_with_password(cluster, host, password, AUTHORIZE, key.public + "\n")
    if done.returncode == 0:
        answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS)
        if answer.failure is Failure.KEY_REFUSED:
            raise ClusterError(
                f"{host}: the key is in its ~/.ssh/authorized_keys, but sshd still refuses it. Run there "
                "`chmod go-w ~ ~/.ssh` (sshd ignores keys in a home directory that others can write), or look for "
                "PubkeyAuthentication and AuthorizedKeysFile in the output of `sshd -T`"
            )
        return
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode != 255:
        raise ClusterError(f"{host}: the key can't be installed: {reason}")
    if "Permission denied" not in reason:
        raise ClusterError(ssh.explain(host, done.stderr)[1])
    lines = "\n  ".join(lines_for(key, ssh.address(host)[1]))
    # ssh lists the remaining ways to log in: `Permission denied (publickey,password)`.
    if not re.search("password|keyboard-interactive", reason):
        raise ClusterError(f"{host}: takes no passwords ({reason}). Run there:\n  {lines}")
    raise ClusterError(f"{host}: the password was refused ({reason}). Try again, or run there:\n  {lines}")


def lines_for(key: Key, port: int) -> list[str]:
    """The commands to run on a host so that it accepts the key; they may be run repeatedly.

    Args:
        port: of its sshd, which is started when it is not the usual one.
    """
    public = shlex.quote(key.public)
    return [
        "mkdir -p ~/.ssh && chmod 700 ~/.ssh",
        # The key would be appended to a last line without a newline.
        '[ -z "$(tail -c 1 ~/.ssh/authorized_keys 2>/dev/null)" ] || echo >> ~/.ssh/authorized_keys',
        f"grep -qxF {public} ~/.ssh/authorized_keys 2>/dev/null || echo {public} >> ~/.ssh/authorized_keys",
        "chmod 600 ~/.ssh/authorized_keys",
        *([sshd_line(port)] if port != 22 else []),
    ]


def _run_with_password(
    cluster: ClusterDir, host: str, password: str, script: str, text: str
) -> subprocess.CompletedProcess[str]:
    """Runs a shell script on a host after a login with a password.

    Raises:
        ClusterError: no answer in time.
    """
    options = ["-F", str(cluster.ssh_config), "-o", "BatchMode=no", "-o", "PubkeyAuthentication=no"]
    options += ["-o", "PreferredAuthentications=password,keyboard-interactive", "-o", "NumberOfPasswordPrompts=1"]
    with _askpass(password) as environment:
        try:
            return subprocess.run(
                ["ssh", *options, "--", host, shlex.join(["sh", "-c", script])],
                input=text,
                capture_output=True,
                text=True,
                env=os.environ | environment,
                start_new_session=True,
                check=False,
                timeout=_INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            command = Ssh(config=cluster.ssh_config).shown(host)
            what = f"no answer within {_INSTALL_SECONDS:g} s; try `{command}`"
            raise ClusterError(f"{host}: the key can't be installed: {what}") from None


@contextlib.contextmanager
def _askpass(password: str) -> Iterator[dict[str, str]]:
    """Environment variables with which ssh reads the password from a named pipe.

    A named one, because ssh closes all inherited file descriptors.
    """
    with tempfile.TemporaryDirectory(prefix="hynb-") as name:
        pipe, helper = Path(name) / "pipe", Path(name) / "askpass"
        os.mkfifo(pipe, mode=0o600)
        # A second question (another method, a second factor) gets no answer, and must not wait for one.
        answered = shlex.quote(str(Path(name) / "answered"))
        helper.write_text(f"#!/bin/sh\nmkdir {answered} 2>/dev/null && exec cat {shlex.quote(str(pipe))}\n")
        helper.chmod(0o700)
        ended = threading.Event()

        def serve() -> None:
            # open() blocks until the helper opens the pipe, or the end of this function does.
            with pipe.open("w") as file, contextlib.suppress(BrokenPipeError):
                if not ended.is_set():
                    file.write(password + "\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield {
                "SSH_ASKPASS": str(helper),
                "SSH_ASKPASS_REQUIRE": "force",
                "DISPLAY": os.environ.get("DISPLAY", ":0"),
            }
        finally:
            ended.set()
            os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
            thread.join(timeout=2)
