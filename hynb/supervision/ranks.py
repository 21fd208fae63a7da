"""What a rank does with its host's guard: register, wait for the other hosts, report its stages and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster import VISIBLE_VARIABLE, Host, chosen_devices
from hynb.errors import ClusterError
from hynb.files import read_json, replace_text, write_json
from hynb.runs import ProcessId, RunDir
from hynb.supervision.membership import PASTED_VISIBLE_VARIABLE, Membership
from hynb.supervision.stacks import write_stacks_on_signal

_POLL_SECONDS = 0.05


@dataclass(kw_only=True, frozen=True)
class Joined:
    """What a rank learns when all hosts have joined.

    Args:
        host: its host's name in the hostfile.
        shared: all hosts see one run folder; otherwise each host has its own.
        first: it is its host's first rank.
        interface: the network interface by which its host reaches the launching one; "" where unknown.
        master_address: the address of rank 0's host.
    """

    host: str
    shared: bool
    first: bool
    interface: str
    master_address: str


def join(membership: Membership, rank: int) -> Joined:
    """Registers a rank with its host's guard, starts the guard if need be, and waits until all hosts have joined.

    Raises:
        ClusterError: the supervisor cannot be reached from this host, or the registry belongs to somebody else.
    """
    # The launching host's launcher and what it starts do not get SIGTERM (see Supervisor); a rank does.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    node = membership.node_of(rank)
    _use_chosen_devices(membership, node)
    registry = membership.make_registry(node)
    log = _own_log(membership, rank)
    write_json(registry / f"rank{rank}.json", ProcessId.of(os.getpid()).record() | {"log": str(log)})
    with contextlib.suppress(FileExistsError):
        (registry / "guard").touch(exist_ok=False)
        with (registry / "guard.log").open("wb") as output:
            command = [sys.executable, "-m", "hynb.supervision.node_guard", str(node)]
            # The guard detaches itself: a launcher kills the descendants of its ranks, and must not kill the guard.
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    ready = _wait_until_ready(membership, node, registry)
    if ready["problem"]:
        raise ClusterError(ready["problem"])
    write_stacks_on_signal(registry, rank)
    return Joined(
        host=membership.hosts[node][0],
        shared=ready["shared"],
        first=rank == membership.ranks_of(node)[0],
        interface=ready["interface"],
        master_address=ready["master_address"],
    )


def _use_chosen_devices(membership: Membership, node: int) -> None:
    """Makes the user's devices of this host visible to this rank, whatever the launcher has made of the variable.

    Raises:
        ClusterError: in the shell where a person started the ranks, the variable names fewer devices than ranks.
    """
    devices = membership.devices[node] if membership.devices else None
    pasted = os.environ.get(PASTED_VISIBLE_VARIABLE, "")
    if devices is None and pasted:
        name, ranks = membership.hosts[node]
        # DeepSpeed's launcher has set the slots that were chosen.
        slots = [int(slot) for slot in os.environ.get(VISIBLE_VARIABLE, "").split(",") if slot.isdigit()]
        devices = chosen_devices(Host(name=name, slots=ranks, slot_ids=tuple(slots) or None), pasted)
    if devices is not None:
        os.environ[VISIBLE_VARIABLE] = ",".join(devices)


def mark(membership: Membership, rank: int, stage: str) -> None:
    """Notes that a rank has reached a stage: `meeting`, `met`."""
    registry = membership.registry_of(rank)
    with contextlib.suppress(OSError):
        (registry / f"rank{rank}.{stage}").touch()


def leave(membership: Membership, rank: int, exit_code: int) -> None:
    """A rank's last act: records its exit code."""
    registry = membership.registry_of(rank)
    with contextlib.suppress(OSError):
        replace_text(registry / f"rank{rank}.end", f"{exit_code}\n")


def _wait_until_ready(membership: Membership, node: int, registry: Path) -> dict:
    deadline = time.monotonic() + membership.start_seconds + membership.silence_seconds
    while (ready := read_json(registry / "ready.json")) is None:
        if not registry.is_dir():
            raise ClusterError(
                f"{membership.hosts[node][0]}: {registry} was removed while this run started: start it again"
            )
        if time.monotonic() > deadline:
            output = (registry / "guard.log").read_text(errors="replace").strip()
            raise ClusterError(
                f"{membership.hosts[node][0]}: the guard of this host was not ready within "
                f"{membership.start_seconds:g} seconds (start_timeout_seconds). {output}".strip()
            )
        time.sleep(_POLL_SECONDS)
    return ready


def _own_log(membership: Membership, rank: int) -> Path:
    """The file that receives this rank's output; created here under launchers that give it none."""
    stdout = Path("/proc/self/fd/1").readlink()
    run_dir = RunDir(membership.run_folder)
    folder = run_dir.log
    if stdout.parent == folder:
        return stdout
    run_dir.create()
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d%H%M%S')}_rank{rank}.log"
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return path
