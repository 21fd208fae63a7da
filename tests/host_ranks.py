"""Ranks on the hosts of a test, forked from one process that has imported the libraries.

A command on a host asks for the host's ranks through a socket, in place of DeepSpeed's launcher; the server forks
them into the namespaces of whoever asks. With imports of its own in each, eight ranks would take a minute to start.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from training_runs import preload, run_entry

from hynb.supervision import Membership

MASTER_PORT = 29571
_NAMESPACES = ("mnt", "uts", "net", "pid")
_PR_SET_PDEATHSIG = 1
# Asks for the ranks of its host, and ends as they do; when it is killed, they are too.
_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = {"node": int(sys.argv[2]), "environment": dict(os.environ), "folder": os.getcwd()}
    server.sendall(json.dumps(asked).encode() + b"\\n")
    sys.exit(int(server.makefile().readline()))
"""


class HostRanks:
    """A process that forks ranks into hosts.

    Args:
        folder: for the socket and the ranks' first output; all hosts see it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "ask.py").write_text(_CLIENT)
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    @property
    def command(self) -> list[str]:
        """The command that starts a host's ranks; the number of the host is to follow."""
        return [sys.executable, "-I", str(self._folder / "ask.py"), str(self._folder / "socket")]

    def until_ready(self) -> None:
        """Waits until the libraries are imported."""
        assert self._process.stdout
        assert self._process.stdout.readline() == b"ready\n", self.output()

    def before(self, function: str) -> None:
        """Names a `module:function` that ranks call before they begin, from now on; empty for none."""
        (self._folder / "before").write_text(function)

    def output(self) -> str:
        """What server and ranks printed before the ranks had logs of their own."""
        paths = [self._folder / "server.log", *sorted(self._folder.glob("rank*.out"))]
        return "".join(f"{path.name}: {path.read_text()[-1500:]}\n" for path in paths if path.exists())

    def close(self) -> None:
        """Ends the process and its ranks."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve(folder: Path) -> None:
    """Forks a process for each command that asks, until stdin is closed."""
    preload()
    hosts: set[int] = set()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([sys.stdin, listener], [], [], 0.1)
            if sys.stdin in ready:
                for pid in hosts:
                    os.kill(pid, signal.SIGKILL)
                return
            if listener in ready:
                connection, _ = listener.accept()
                if pid := os.fork():
                    hosts.add(pid)
                else:
                    _in_child(lambda connection=connection: _run_host(connection, folder))
                connection.close()
            for pid in list(hosts):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    hosts.remove(pid)


def _in_child(work: Callable[[], None]) -> NoReturn:
    """What a forked process does; it ends with its parent."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _run_host(connection: socket.socket, folder: Path) -> None:
    """Runs the ranks of the host where a command asks, and reports the first exit code other than 0."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    request = json.loads(connection.makefile().readline())
    _enter(struct.unpack("3i", credentials)[0])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ |= request["environment"] | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    membership = Membership.from_environment()
    assert membership is not None
    ranks = {}
    for rank in membership.ranks_of(request["node"]):
        pid = os.fork()
        ranks[pid] = rank
        if not pid:
            _in_child(lambda rank=rank: _run_rank(membership, request["node"], rank, folder))
    code = 0
    while ranks and not code:
        if select.select([connection], [], [], 0.05)[0]:
            # It sends nothing more, so it was killed.
            break
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del ranks[pid]
                code = code or os.waitstatus_to_exitcode(status)
    # As a launcher does when one of them has failed.
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    connection.sendall(f"{code}\n".encode())


def _enter(pid: int) -> None:
    """Enters the namespaces of a process; children are in its PID namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    # All are opened first: afterwards this process sees another /proc.
    opened = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
    for descriptor in opened:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)


def _run_rank(membership: Membership, node: int, rank: int, folder: Path) -> None:
    output = os.open(folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    ranks = membership.ranks_of(node)
    numbers = {"RANK": rank, "LOCAL_RANK": rank - ranks[0], "LOCAL_SIZE": len(ranks)}
    numbers |= {"WORLD_SIZE": membership.world_size, "MASTER_PORT": MASTER_PORT}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    before = folder / "before"
    run_entry([], before.read_text() if before.exists() else "")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
    # Without the seconds that libraries take to clean up.
    os._exit(0)
