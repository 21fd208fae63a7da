"""Two or more hosts on this machine, for tests: Linux namespaces joined by virtual cables, each with a real sshd.

Each host has its own network, processes, host name, home, /etc/hosts, /etc/passwd, /dev/shm and host key, and a
folder `disk` at the same path on both, which is either one shared folder or a separate one per host. They use this
checkout's interpreter and code. Namespaces and the cable have no names outside, so that several test processes can
run at once. Everything ends with the test's process, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import need

CHECKOUT = Path(__file__).resolve().parents[1]
PORT = 36005
ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
_PROGRAMS = (
    *("unshare", "nsenter", "mount", "hostname", "ip", "ss", "openssl"),
    *("ssh", "ssh-keygen", "ssh-keyscan", "sshd"),
)
PASSWORD = "let me in, 1 time"
# On a busy machine the interpreter alone takes seconds to start.
_START_SECONDS = 60
# The first process of a host: mounts what is its own, and lets the kernel reap the processes that end.
_INIT = """
import os, signal, subprocess, sys
name, root, home, disk, shm = sys.argv[1:]
def mount(*words):
    subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
mount("-t", "proc", "proc", "/proc")
mount("-t", "sysfs", "sysfs", "/sys")
mount("-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", "/run")
mount("-t", "tmpfs", "-o", "size=" + shm, "tmpfs", "/dev/shm")
os.makedirs("/run/sshd", mode=0o755)
mount("--bind", root + "/home", home)
if os.path.isdir(root + "/disk"):
    mount("--bind", root + "/disk", disk)
for name_of_file in ("hosts", "passwd", "shadow", "ssh"):
    mount("--bind", root + "/etc/" + name_of_file, "/etc/" + name_of_file)
subprocess.run(["hostname", name], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
# The kernel then reaps orphaned processes.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
open(root + "/ready", "w").close()
while True:
    signal.pause()
"""

# Succeeds when an address answers, be it only that nothing listens on the port.
_REACH = """
import contextlib, socket, sys
with contextlib.suppress(ConnectionRefusedError):
    socket.create_connection((sys.argv[1], 9), timeout=2)
"""


@dataclass(kw_only=True, frozen=True)
class Process:
    """A process of a host: its pid outside of the host, its arguments and its environment."""

    pid: int
    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(kw_only=True)
class TestHost:
    """One host; commands run inside all of its namespaces.

    Args:
        home, disk: paths as the host sees them; `path` translates them for this process.
        peers: the addresses of the other hosts by name.
    """

    __test__ = False

    name: str
    address: str
    root: Path
    home: Path
    disk: Path
    pid: int
    shared: bool
    peers: Mapping[str, str]
    _holder: subprocess.Popen
    _sshd: subprocess.Popen | None = None

    def path(self, inside: str | Path) -> Path:
        """The path of a file of the host's home or disk for this process, outside of the host."""
        inside = Path(inside)
        for seen, real in ((self.home, self.root / "home"), (self.disk, self.root / "disk")):
            if inside.is_relative_to(seen) and real.is_dir():
                return real / inside.relative_to(seen)
        return inside

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of a login on this host, with this environment's programs first in PATH."""
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        values = {"HOME": str(self.home), "PATH": programs, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "USER": "root"}
        return values | {"PYTHONDONTWRITEBYTECODE": "1"} | more

    def popen(self, argv: Sequence[object], *, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
        """Starts a command on the host, in its disk folder."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid"]
        folder = shlex.quote(str(options.pop("cwd", self.disk)))
        line = f"cd {folder} && exec {shlex.join(map(str, argv))}"
        return subprocess.Popen([*enter, "sh", "-c", line], env=self.environment(**(env or {})), **options)

    def run(
        self,
        argv: Sequence[object],
        *,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 120,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess:
        """Runs a command on the host and waits for it."""
        streams = {"stdin": subprocess.PIPE if input is not None else subprocess.DEVNULL}
        streams |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.popen(argv, env=env, cwd=cwd or self.disk, **streams)
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{self.name}: {shlex.join(map(str, argv))} took too long\n{out}\n{err}") from None
        assert not check or process.returncode == 0, f"{self.name}: {argv}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess([*map(str, argv)], process.returncode, out, err)

    def hynb(self, *words: object, check: bool = False, **options: Any) -> subprocess.CompletedProcess:
        """The `hynb` command of this checkout on the host."""
        command = [sys.executable, "-m", "hynb.cli", *map(str, words)]
        return self.run(command, check=check, env={"PYTHONPATH": str(CHECKOUT)}, **options)

    def typed(self, command: Sequence[object], answers: Sequence[tuple[str, str]]) -> tuple[int, str]:
        """Runs a command in a terminal and types each answer when its question appears.

        Args:
            answers: pairs of question and answer, in their order.

        Returns:
            exit code and output.
        """
        main, side = pty.openpty()
        process = self.popen(
            command,
            env={"PYTHONPATH": str(CHECKOUT)},
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        seen, waiting = "", list(answers)
        with contextlib.suppress(OSError):
            while data := os.read(main, 4096).decode():
                seen += data
                if waiting and waiting[0][0] in seen:
                    os.write(main, (waiting.pop(0)[1] + "\n").encode())
        os.close(main)
        return process.wait(timeout=_START_SECONDS), seen

    def processes(self) -> list[Process]:
        """All processes of the host except its first one and zombies."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            with contextlib.suppress(OSError):
                if (entry / "ns" / "pid").readlink() != space:
                    continue
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if argv:
                    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                    found.append(Process(pid=int(entry.name), argv=tuple(argv), environment=values))
        return found

    @property
    def host_key(self) -> Path:
        """The file of the public key with which sshd identifies itself."""
        return self.root / "etc" / "ssh" / "ssh_host_ed25519_key.pub"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the host key."""
        done = subprocess.run(["ssh-keygen", "-lf", self.host_key], capture_output=True, text=True, check=True)
        return done.stdout.split()[1]

    def start_sshd(self, port: int = PORT, *, clock_shift_seconds: int = 0, first: Sequence[str] = ()) -> None:
        """Starts sshd with the host's own /etc/ssh.

        Args:
            clock_shift_seconds: by how much the clock of the commands that it runs is off.
            first: lines of sshd_config before the usual ones, which they override.
        """
        settings = [
            *first,
            *("HostKey /etc/ssh/ssh_host_ed25519_key", "PidFile none", "UsePAM no", "LogLevel VERBOSE"),
            *("PermitRootLogin yes", "PasswordAuthentication yes", "StrictModes yes", "PrintMotd no"),
            *("AuthorizedKeysFile .ssh/authorized_keys", "MaxStartups 100:30:200"),
        ]
        if clock_shift_seconds:
            library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
            need(library is not None, "libfaketime is not installed")
            settings.append(f"SetEnv LD_PRELOAD={library} FAKETIME={clock_shift_seconds:+d}s FAKETIME_DONT_RESET=1")
        (self.root / "etc" / "ssh" / "sshd_config").write_text("\n".join(settings) + "\n")
        with (self.root / "sshd.log").open("ab") as log:
            # sshd executes itself again for each connection, which needs its absolute path.
            command = [str(shutil.which("sshd")), "-D", "-e", "-p", str(port)]
            self._sshd = self.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        self.until_listens(port)

    def until_listens(self, port: int) -> None:
        """Waits until something listens on a port."""
        deadline = time.monotonic() + _START_SECONDS
        while self.run(["ss", "-Htln", f"sport = :{port}"]).stdout == "":
            assert time.monotonic() < deadline, (self.root / "sshd.log").read_text()
            time.sleep(0.05)

    def stop_sshd(self) -> None:
        """Kills sshd and the processes of its connections."""
        for process in self.processes():
            if "sshd" in process.argv[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        if self._sshd is not None:
            self._sshd.wait()
            self._sshd = None

    def new_host_key(self) -> None:
        """Replaces the host key, as if the machine had been reinstalled; sshd reads it when it starts."""
        self.host_key.unlink()
        self.host_key.with_suffix("").unlink()
        _keygen(self.host_key.with_suffix(""), self.name)

    def freeze(self) -> None:
        """Stops every process of the host, as if it hung; its kernel still accepts connections."""
        for _ in range(5):
            for process in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Continues every process of the host."""
        if self._sshd is not None:
            # nsenter stops itself when its child is stopped.
            self._sshd.send_signal(signal.SIGCONT)
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)

    def link(self, *, up: bool) -> None:
        """Pulls the cable, or plugs it in and waits until this host reaches another one."""
        self.run(["ip", "link", "set", "cable", "up" if up else "down"])
        if up:
            peer = next(iter(self.peers.values()))
            deadline = time.monotonic() + _START_SECONDS
            # For seconds the kernel goes on refusing an address that did not resolve while the cable was pulled.
            while self.run([sys.executable, "-c", _REACH, peer], check=False).returncode:
                assert time.monotonic() < deadline, f"{self.name} does not reach {peer}"


@dataclass(kw_only=True, frozen=True)
class TestHosts:
    """The two hosts of a test, and the ssh port of both."""

    __test__ = False

    alpha: TestHost
    beta: TestHost
    port: int = PORT

    def __iter__(self) -> Iterator[TestHost]:
        return iter((self.alpha, self.beta))


def need_programs(*names: str) -> None:
    """Skips a test, or fails it in CI, if programs are not in PATH."""
    missing = [name for name in names if shutil.which(name) is None]
    need(not missing, f"programs are missing: {', '.join(missing)}")


def need_two_hosts() -> None:
    """Skips a test, or fails it in CI, on a machine that cannot run `two_hosts`."""
    need(os.geteuid() == 0, "only root can create network namespaces")
    need_programs(*_PROGRAMS)
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    need(tried.returncode == 0, f"no namespaces here: {tried.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(folder: Path, *, shared: bool, sshd: bool = True, shm: str = "1g") -> Iterator[TestHosts]:
    """Starts two hosts, alpha and beta, and ends them afterwards.

    Args:
        folder: where their files are created.
        shared: `disk` is the same folder on both, as in a cluster with a network disk.
        sshd: start one on each.
        shm: size of each /dev/shm.
    """
    need_two_hosts()
    home, disk = folder / "home", folder / "disk"
    for path in (home, disk):
        path.mkdir(parents=True)
    made: list[TestHost] = []
    try:
        for name in ADDRESSES:
            made.append(_start(name, ADDRESSES, folder / name, home, disk, shared, shm))
        alpha, beta = made
        # Both ends of the cable are created inside the hosts; this machine's own network is not changed.
        inside = ["nsenter", "--target", str(alpha.pid), "--net"]
        peer = ["peer", "name", "cable", "netns", str(beta.pid)]
        subprocess.run([*inside, "ip", "link", "add", "cable", "type", "veth", *peer], check=True)
        for host in made:
            host.run(["ip", "addr", "add", f"{host.address}/24", "dev", "cable"])
            host.run(["ip", "link", "set", "cable", "up"])
            if sshd:
                host.start_sshd()
        yield TestHosts(alpha=alpha, beta=beta)
    finally:
        _end(made)


@contextlib.contextmanager
def many_hosts(folder: Path, count: int, *, shared: bool, shm: str = "1g") -> Iterator[list[TestHost]]:
    """Starts hosts host0, host1, … on one switch, each with an sshd, and ends them; otherwise as `two_hosts`.

    Args:
        count: at most 200.
    """
    need_two_hosts()
    home, disk = folder / "home", folder / "disk"
    for path in (home, disk):
        path.mkdir(parents=True)
    addresses = {f"host{number}": f"10.78.0.{number + 1}" for number in range(count)}
    made: list[TestHost] = []
    # A namespace of its own for the switch: the machine's network is not changed.
    switch = subprocess.Popen(
        ["unshare", "--net", "--fork", "--kill-child", "sleep", "infinity"], preexec_fn=_die_with_parent
    )
    try:
        inside = ["nsenter", "--target", str(_child(switch)), "--net"]
        subprocess.run([*inside, "ip", "link", "add", "switch", "type", "bridge"], check=True)
        subprocess.run([*inside, "ip", "link", "set", "switch", "up"], check=True)
        for name in addresses:
            made.append(_start(name, addresses, folder / name, home, disk, shared, shm))
        for number, host in enumerate(made):
            port = f"port{number}"
            peer = ["peer", "name", "cable", "netns", str(host.pid)]
            subprocess.run([*inside, "ip", "link", "add", port, "type", "veth", *peer], check=True)
            subprocess.run([*inside, "ip", "link", "set", port, "master", "switch", "up"], check=True)
            host.run(["ip", "addr", "add", f"{host.address}/24", "dev", "cable"])
            host.run(["ip", "link", "set", "cable", "up"])
            host.start_sshd()
        yield made
    finally:
        _end(made)
        switch.kill()
        switch.wait()


def _end(hosts: Sequence[TestHost]) -> None:
    for host in hosts:
        # When the first process of a PID namespace ends, the kernel kills all others in it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.pid, signal.SIGKILL)
        host._holder.kill()
        host._holder.wait()


def trusting(hosts: TestHosts | Sequence[TestHost]) -> Path:
    """Writes keys, known_hosts and ssh_config so that each host can log in on every other one.

    Returns:
        the folder of the cluster, on both disks: hostfile (1 slot each), ssh_config, known_hosts.
    """
    hosts, port = list(hosts), PORT
    cluster = hosts[0].disk / "cluster"
    known = ""
    for host in hosts:
        ssh = host.path(host.home) / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        if not (ssh / "id_ed25519").exists():
            _keygen(ssh / "id_ed25519", f"root@{host.name}")
        key = host.host_key.read_text().split()
        known += "".join(f"[{name}]:{port} {key[0]} {key[1]}\n" for name in (host.name, host.address))
    public = "".join((host.path(host.home) / ".ssh" / "id_ed25519.pub").read_text() for host in hosts)
    config = ""
    for host in hosts:
        config += f"Host {host.name} {host.address}\n  HostName {host.address}\n  Port {port}\n"
        config += f"  IdentityFile {host.home}/.ssh/id_ed25519\n  UserKnownHostsFile {cluster}/known_hosts\n"
        config += "  StrictHostKeyChecking yes\n  BatchMode yes\n"
    for host in hosts:
        authorized = host.path(host.home) / ".ssh" / "authorized_keys"
        authorized.write_text(public)
        authorized.chmod(0o600)
        place = host.path(cluster)
        place.mkdir(exist_ok=True)
        (place / "hostfile").write_text("".join(f"{item.name} slots=1\n" for item in hosts))
        (place / "ssh_config").write_text(config)
        (place / "known_hosts").write_text(known)
    return cluster


def _start(
    name: str, addresses: Mapping[str, str], root: Path, home: Path, disk: Path, shared: bool, shm: str
) -> TestHost:
    for path in (root / "home", root / "etc" / "ssh", *(() if shared else (root / "disk",))):
        path.mkdir(parents=True)
    (root / "home").chmod(0o700)
    names = "".join(f"{address} {item}\n" for item, address in addresses.items())
    (root / "etc" / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
    users = Path("/etc/passwd").read_text().splitlines()
    users = [f"root:x:0:0:root:{home}:/bin/bash" if user.startswith("root:") else user for user in users]
    (root / "etc" / "passwd").write_text("\n".join(users) + "\n")
    done = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"], input=PASSWORD, capture_output=True, text=True, check=True
    )
    (root / "etc" / "shadow").write_text(f"root:{done.stdout.strip()}:20000:0:99999:7:::\nsshd:!:20000::::::\n")
    (root / "etc" / "shadow").chmod(0o600)
    _keygen(root / "etc" / "ssh" / "ssh_host_ed25519_key", name)
    arguments = [name, str(root), str(home), str(disk), shm]
    spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
    holder = subprocess.Popen(
        ["unshare", *spaces, sys.executable, "-c", _INIT, *arguments],
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
    )
    deadline = time.monotonic() + _START_SECONDS
    while not (root / "ready").exists():
        assert time.monotonic() < deadline and holder.poll() is None, f"{name} did not start"
        time.sleep(0.02)
    return TestHost(
        name=name,
        address=addresses[name],
        root=root,
        home=home,
        disk=disk,
        pid=_child(holder),
        shared=shared,
        peers={item: address for item, address in addresses.items() if item != name},
        _holder=holder,
    )


def _child(process: subprocess.Popen) -> int:
    """The pid of a process's only child, once it has one."""
    deadline = time.monotonic() + _START_SECONDS
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        assert time.monotonic() < deadline and process.poll() is None, f"{process.args} did not start"
        time.sleep(0.01)
    return int(children[0])


def _die_with_parent() -> None:
    """Lets the kernel kill this process when the test's process ends, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _keygen(path: Path, comment: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path], check=True)
