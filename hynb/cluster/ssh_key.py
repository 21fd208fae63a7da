"""The key that the hosts of a cluster accept: found or made, and installed with a password given once."""

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
from hynb.cluster.ssh import Ssh, is_local, require_openssh, sshd_line
from hynb.errors import ClusterError

_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")
_INSTALL_SECONDS = 40.0
_LOGIN_SECONDS = 15.0
# Adds each line of the standard input to authorized_keys, unless it is there.
AUTHORIZE = """umask 077; mkdir -p ~/.ssh && cd ~/.ssh || exit 3
touch authorized_keys && chmod 600 authorized_keys || exit 3
[ -z "$(tail -c 1 authorized_keys)" ] || echo >> authorized_keys
while IFS= read -r line; do grep -qxF -- "$line" authorized_keys || printf '%s\\n' "$line" >> authorized_keys; done"""


@dataclass(kw_only=True, frozen=True)
class Key:
    """A key pair of this machine's; made says whether it is new."""

    path: Path
    public: str
    made: bool


def find_or_make_key(path: str | Path | None = None) -> Key:
    """The key that hosts are to accept: the one named, the user's own, or a new Ed25519 key without passphrase.

    Raises:
        ClusterError: the key has a passphrase or can be read by others, or none can be made.
    """
    require_openssh()
    home = Path.home() / ".ssh"
    candidates = [Path(path).expanduser()] if path else [home / name for name in _KEY_NAMES]
    found = next((item for item in candidates if item.is_file()), None)
    made = found is None
    if found is None:
        found = candidates[0]
        if (public := found.with_name(f"{found.name}.pub")).exists():
            raise ClusterError(
                f"{public}: its private key isn't beside it, and a new key would replace it. Name another "
                "with --key; a path that doesn't exist makes one"
            )
        found.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(found)], f"{found}: no key can be made")
    if found.stat().st_mode & 0o077:
        raise ClusterError(f"{found}: others can read this private key, so that ssh refuses it: `chmod 600 {found}`")
    asked = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", str(found)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if asked.returncode:
        raise ClusterError(
            f"{found}: this key has a passphrase, which nobody can type for a job, or is no private key "
            f"({asked.stderr.strip().splitlines()[-1]}). Name another with --key; a path that doesn't exist makes one"
        )
    return Key(path=found, public=asked.stdout.strip(), made=made)


def install_key(cluster: ClusterDir, host: str, key: Key, password: str) -> None:
    """Logs in with a password once and adds the public key to the host's authorized_keys; here it needs none.

    The password goes to ssh through a pipe that only this user can open: it is on no command line, in no
    environment and no file.

    Raises:
        ClusterError: the password was refused, the host can't be reached, or it refuses the key all the same.
    """
    ssh = Ssh(config=cluster.ssh_config)
    if is_local(host) and ssh.settings(host).get("user") == [getpass.getuser()]:
        answer = ssh.run(host, ["sh", "-c", AUTHORIZE], input=key.public + "\n")
        if answer.code:
            raise ClusterError(f"{host}: the key can't be installed: {answer.err.strip()}")
        return
    with _askpass(password) as environment:
        options = ["-F", str(cluster.ssh_config), "-o", "BatchMode=no", "-o", "PubkeyAuthentication=no"]
        options += ["-o", "PreferredAuthentications=password,keyboard-interactive", "-o", "NumberOfPasswordPrompts=1"]
        try:
            done = subprocess.run(
                ["ssh", *options, "--", host, f"sh -c {shlex.quote(AUTHORIZE)}"],
                input=key.public + "\n",
                capture_output=True,
                text=True,
                env=os.environ | environment,
                start_new_session=True,
                check=False,
                timeout=_INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            what = f"no answer within {_INSTALL_SECONDS:g} s; try `{ssh.shown(host)}`"
            raise ClusterError(f"{host}: the key can't be installed: {what}") from None
    if done.returncode == 0:
        answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS)
        if "accepts none of our keys" in answer.problem:
            raise ClusterError(
                f"{host}: the key is in its ~/.ssh/authorized_keys, and sshd refuses it still. Run there "
                "`chmod go-w ~ ~/.ssh` (it takes no keys from a home that others can write), or look for "
                "PubkeyAuthentication and AuthorizedKeysFile in what `sshd -T` says"
            )
        return
    said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    if done.returncode != 255:
        raise ClusterError(f"{host}: the key can't be installed: {said}")
    if "Permission denied" not in said:
        raise ClusterError(ssh.cause(host, done.stderr))
    lines = "\n  ".join(lines_for(host, key, ssh.address(host)[1]))
    if not re.search("password|keyboard-interactive", said):
        raise ClusterError(f"{host}: takes no passwords ({said}). Run there:\n  {lines}")
    raise ClusterError(f"{host}: the password was refused ({said}). Try again, or run there:\n  {lines}")


def lines_for(host: str, key: Key, port: int) -> list[str]:
    """What a person types on a host so that it accepts the key; several times does no harm."""
    public = shlex.quote(key.public)
    return [
        "mkdir -p ~/.ssh && chmod 700 ~/.ssh",
        # A last line without its end would take the key into itself.
        '[ -z "$(tail -c 1 ~/.ssh/authorized_keys 2>/dev/null)" ] || echo >> ~/.ssh/authorized_keys',
        f"grep -qxF {public} ~/.ssh/authorized_keys 2>/dev/null || echo {public} >> ~/.ssh/authorized_keys",
        "chmod 600 ~/.ssh/authorized_keys",
        *([sshd_line(port)] if port != 22 else []),
    ]


@contextlib.contextmanager
def _askpass(password: str) -> Iterator[dict[str, str]]:
    """Environment in which ssh takes the password from a pipe: ssh closes every file that it inherits."""
    with tempfile.TemporaryDirectory(prefix="hynb-") as name:
        pipe, helper = Path(name) / "pipe", Path(name) / "askpass"
        os.mkfifo(pipe, mode=0o600)
        # A second question (another way to log in, a second factor) gets no answer, and doesn't wait for one.
        asked = shlex.quote(str(Path(name) / "asked"))
        helper.write_text(f"#!/bin/sh\nmkdir {asked} 2>/dev/null && exec cat {shlex.quote(str(pipe))}\n")
        helper.chmod(0o700)
        ended = threading.Event()

        def serve() -> None:
            # Opens when the helper does; the end below opens it too, so that this thread ends.
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


def _checked(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ClusterError(f"{what}: {done.stderr.strip() or done.stdout.strip()}")
