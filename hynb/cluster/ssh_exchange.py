"""Logins from every host of a cluster to every other one: `hynb hosts exchange`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hynb.cluster.hostfile import ClusterDir, Host
from hynb.cluster.network import is_local
from hynb.cluster.ssh import Ssh
from hynb.cluster.ssh_key import AUTHORIZE
from hynb.cluster.ssh_settings import host_block
from hynb.errors import ClusterError

_HEADER = "# Written by `hynb hosts exchange`, which replaces it.\n"
_LOGIN_SECONDS = 15.0
# Prints this host's own public key, which is created if there is none.
_OWN_KEY = """umask 077; mkdir -p ~/.ssh
for name in id_ed25519 id_ecdsa id_rsa; do [ -f ~/.ssh/$name.pub ] && exec cat ~/.ssh/$name.pub; done
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 </dev/null && cat ~/.ssh/id_ed25519.pub"""


def exchange_keys(cluster: ClusterDir, hosts: Sequence[Host]) -> None:
    """Lets every host log in on every other one, as MPI's launchers need it.

    Every host gets the others' public keys and host keys, and an ssh_config in the same folder as here.

    Raises:
        ClusterError: what failed, by host.
    """
    ssh = Ssh(config=cluster.ssh_config)
    names = [host.name for host in hosts]
    others = [name for name in names if not is_local(name)]
    if not others:
        return
    if "localhost" in names:
        raise ClusterError(
            f"{cluster.hostfile}: localhost is a different machine on every host; list this one by the name or "
            "address by which the others reach it"
        )
    public = _run_on_all(ssh, names, _OWN_KEY, None)
    # The output of a login script comes first.
    keys = [text.strip().splitlines()[-1] for text in public.values() if text.strip()]
    _run_on_all(ssh, names, AUTHORIZE, "".join(f"{key}\n" for key in keys))
    _send_known_hosts(cluster, ssh, others)
    _send_settings(cluster, ssh, names, others)
    _run_on_all(ssh, others, _logins_script(cluster, names), None)


def _send_known_hosts(cluster: ClusterDir, ssh: Ssh, others: Sequence[str]) -> None:
    """Replaces known_hosts on hosts where an earlier exchange wrote it; elsewhere adds the missing lines."""
    folder, known = shlex.quote(str(cluster.path)), shlex.quote(str(cluster.known_hosts))
    add = f'while IFS= read -r line; do grep -qxF -- "$line" {known} || printf "%s\\n" "$line" >> {known}; done'
    script = f"mkdir -p {folder} && if {_was_exchanged(cluster)}; then cat > {known}; else touch {known} && {add}; fi"
    _run_on_all(ssh, others, script, cluster.known_hosts.read_text())


def _send_settings(cluster: ClusterDir, ssh: Ssh, names: Sequence[str], others: Sequence[str]) -> None:
    """Writes ssh_config on hosts that have none, or one of an earlier exchange.

    On a shared disk the launching host's own, which names its key, is there already and stays.
    """
    blocks = []
    for name in names:
        user = ssh.settings(name).get("user", [""])[0]
        lines = [f"Port {ssh.address(name)[1]}", *([f"User {user}"] if user else [])]
        blocks.append(host_block(cluster, name, lines))
    config = shlex.quote(str(cluster.ssh_config))
    may_write = f"[ ! -e {config} ] || {_was_exchanged(cluster)}"
    script = f"if {may_write}; then cat > {config}; else cat > /dev/null; fi"
    _run_on_all(ssh, others, script, "\n".join([_HEADER, *blocks]))


def _was_exchanged(cluster: ClusterDir) -> str:
    """A shell condition: an exchange wrote the host's ssh_config."""
    config = shlex.quote(str(cluster.ssh_config))
    return f"head -n 1 {config} 2>/dev/null | grep -qxF {shlex.quote(_HEADER.strip())}"


def _logins_script(cluster: ClusterDir, names: Sequence[str]) -> str:
    """A shell script that logs in on every host but the one that its first argument names."""
    login = shlex.join(["ssh", "-F", str(cluster.ssh_config), "-o", "BatchMode=yes", "--"])

    def line(name: str) -> str:
        host, message = shlex.quote(name), shlex.quote(f"can't log in on {name}")
        return f'[ "$1" = {host} ] || {login} {host} true || {{ echo {message} >&2; exit 1; }}'

    return "; ".join(map(line, names))


def _run_on_all(ssh: Ssh, names: Sequence[str], script: str, text: str | None) -> dict[str, str]:
    """Runs a shell script on hosts at the same time; returns the output of each.

    Args:
        script: its first argument is the host's name.
        text: the script's standard input.

    Raises:
        ClusterError: every host on which it failed.
    """
    deadline_seconds = _LOGIN_SECONDS + len(names)

    def run(name: str) -> str:
        answer = ssh.run(name, ["sh", "-c", script, "sh", name], deadline_seconds=deadline_seconds, input=text)
        if answer.problem or answer.code:
            raise ClusterError(answer.problem or f"{name}: {answer.err.strip() or f'exit code {answer.code}'}")
        return answer.out

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        futures = {name: pool.submit(run, name) for name in names}
    problems = [str(future.exception()) for future in futures.values() if future.exception()]
    if problems:
        raise ClusterError(problems)
    return {name: future.result() for name, future in futures.items()}
