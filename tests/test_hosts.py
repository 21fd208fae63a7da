"""The test hosts themselves, and `hynb.cluster.Ssh` on them: a command's result, and each reason for a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import CHECKOUT, PORT, need_two_hosts, trusting, two_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts"), shared=False) as made:
        trusting(made)
        yield made


def run_over_ssh(hosts, host="beta", argv=("hostname",), deadline_seconds=60.0) -> dict:
    """The Answer of `Ssh.run` on alpha in plain values, and whether the host is local there."""
    code = (
        "import json, sys; from pathlib import Path; from hynb.cluster import Ssh, is_local\n"
        "config, host, deadline, *argv = sys.argv[1:]\n"
        "answer = Ssh(config=Path(config)).run(host, argv, deadline_seconds=float(deadline), input='typed')\n"
        "more = {'local': is_local(host), 'failure': answer.failure and answer.failure.name}\n"
        "print(json.dumps(vars(answer) | more))"
    )
    config = hosts.alpha.disk / "cluster" / "ssh_config"
    words = [sys.executable, "-c", code, config, host, str(deadline_seconds), *argv]
    return json.loads(hosts.alpha.run(words, cwd=CHECKOUT).stdout)


def test_each_host_has_its_own_name_disk_home_and_processes(hosts):
    assert [host.run(["hostname"]).stdout.strip() for host in hosts] == ["alpha", "beta"]
    hosts.alpha.run(["touch", hosts.alpha.disk / "mine"])
    assert hosts.alpha.path(hosts.alpha.disk / "mine").exists()
    assert hosts.beta.run(["ls", hosts.beta.disk]).stdout.split() == ["cluster"]
    assert hosts.beta.run(["sh", "-c", "echo $HOME; ls -d ~"]).stdout.split() == [str(hosts.beta.home)] * 2
    seen = hosts.beta.run(["sh", "-c", "echo /proc/[0-9]*"]).stdout.split()
    assert "/proc/1" in seen and len(seen) < 12, "only its own processes"
    assert any("sshd" in process.argv[0] for process in hosts.beta.processes())


def test_a_command_runs_on_the_named_host(hosts):
    there, here = run_over_ssh(hosts), run_over_ssh(hosts, "alpha", ["sh", "-c", "hostname; cat; exit 3"])
    succeeded = {"err": "", "problem": "", "failure": None}
    assert there == {"code": 0, "out": "beta\n", "local": False} | succeeded
    assert here == {"code": 3, "out": "alpha\ntyped", "local": True} | succeeded
    quoted = run_over_ssh(hosts, argv=["sh", "-c", "echo 'a  b' \"$0\"; cat; exit 255", "x y; $(hostname)"])
    assert quoted["out"] == "a  b x y; $(hostname)\ntyped"
    assert run_over_ssh(hosts, hosts.alpha.address)["local"]
    assert not run_over_ssh(hosts, hosts.beta.address)["local"]


def test_each_reason_for_a_failure_is_reported(hosts):
    alpha, beta = hosts

    def failure(name: str, **options) -> str:
        answer = run_over_ssh(hosts, **options)
        assert answer["code"] is None and answer["failure"] == name, answer
        return answer["problem"]

    beta.stop_sshd()
    assert f"nothing listens on port {PORT} of 10.77.0.2" in failure("PORT_CLOSED")
    beta.start_sshd()
    beta.path(beta.home / ".ssh" / "authorized_keys").rename(beta.path(beta.home / ".ssh" / "away"))
    assert "accepts none of our keys" in failure("KEY_REFUSED")
    beta.path(beta.home / ".ssh" / "away").rename(beta.path(beta.home / ".ssh" / "authorized_keys"))
    assert run_over_ssh(hosts)["out"] == "beta\n"
    known = alpha.path(alpha.disk / "cluster" / "known_hosts")
    text = known.read_text()
    known.write_text("")
    assert "its host key isn't known here" in failure("HOST_KEY_UNKNOWN")
    known.write_text(text.replace("beta", "other").replace("10.77.0.2", "10.77.0.9"))
    alpha_key = next(line for line in text.splitlines() if "10.77.0.1" in line)
    known.write_text(alpha_key.replace("10.77.0.1", "10.77.0.2") + "\n")
    changed = failure("HOST_KEY_CHANGED")
    assert "differs from the known one" in changed and "ssh-keygen -R '[10.77.0.2]:36005'" in changed
    known.write_text(text)
    assert "can't be resolved" in failure("NAME_UNKNOWN", host="nowhere")
    beta.freeze()
    # The deadline ends before ssh's own limit for a connection.
    assert "no answer within 2 s" in failure("TIMED_OUT", deadline_seconds=2)
    beta.thaw()
    beta.link(up=False)
    assert "doesn't answer" in failure("UNREACHABLE", deadline_seconds=60)
    beta.link(up=True)
    assert run_over_ssh(hosts)["out"] == "beta\n"


def test_a_command_is_ended_at_its_deadline(hosts):
    answer = run_over_ssh(hosts, argv=["sleep", "300"], deadline_seconds=3)
    assert answer["failure"] == "TIMED_OUT" and "no answer within 3 s to sleep 300" in answer["problem"]


def test_a_killed_test_leaves_nothing_behind(tmp_path):
    need_two_hosts()
    code = (
        "import sys, time; from pathlib import Path; from hosts import two_hosts\n"
        "with two_hosts(Path(sys.argv[1]), shared=True) as made:\n"
        "    made.beta.run(['touch', made.beta.disk / 'x']); assert (made.alpha.disk / 'x').exists()\n"
        "    print(*[host.pid for host in made], flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "hosts")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as killed:
        assert killed.stdout is not None
        pids = killed.stdout.readline().split()
        assert len(pids) == 2
        os.kill(killed.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
