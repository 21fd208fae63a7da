"""The test hosts themselves, and commands on them through OpenSSH: what works, and each way in which it doesn't."""

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


def ask(hosts, host="beta", argv=("hostname",), deadline=8.0) -> dict:
    """What hynb.cluster makes of a command on a host, asked on alpha."""
    code = (
        "import json, sys; from pathlib import Path; from hynb.cluster import Ssh, is_local\n"
        "config, host, deadline, *argv = sys.argv[1:]\n"
        "answer = Ssh(config=Path(config)).run(host, argv, deadline_seconds=float(deadline), input='typed')\n"
        "print(json.dumps(vars(answer) | {'local': is_local(host)}))"
    )
    config = hosts.alpha.disk / "cluster" / "ssh_config"
    done = hosts.alpha.run([sys.executable, "-c", code, config, host, deadline, *argv], cwd=CHECKOUT)
    return json.loads(done.stdout)


def test_each_host_is_its_own(hosts):
    assert [host.run(["hostname"]).stdout.strip() for host in hosts] == ["alpha", "beta"]
    hosts.alpha.run(["touch", hosts.alpha.disk / "mine"])
    assert hosts.alpha.path(hosts.alpha.disk / "mine").exists()
    assert hosts.beta.run(["ls", hosts.beta.disk]).stdout.split() == ["cluster"]
    assert hosts.beta.run(["sh", "-c", "echo $HOME; ls -d ~"]).stdout.split() == [str(hosts.beta.home)] * 2
    seen = hosts.beta.run(["ps", "-eo", "pid"]).stdout.split()
    assert "1" in seen and len(seen) < 12, "only its own processes"
    assert any("sshd" in process.argv[0] for process in hosts.beta.processes())


def test_a_command_runs_on_the_host_that_is_named(hosts):
    there, here = ask(hosts), ask(hosts, "alpha", ["sh", "-c", "hostname; cat; exit 3"])
    assert there == {"code": 0, "out": "beta\n", "err": "", "problem": "", "local": False}
    assert here == {"code": 3, "out": "alpha\ntyped", "err": "", "problem": "", "local": True}
    quoted = ask(hosts, argv=["sh", "-c", "echo 'a  b' \"$0\"; cat; exit 255", "x y"])
    assert quoted["out"] == "a  b x y\ntyped"
    assert ask(hosts, hosts.alpha.address)["local"] and not ask(hosts, hosts.beta.address)["local"]


def test_each_way_to_fail_is_named(hosts):
    alpha, beta = hosts
    beta.stop_sshd()
    said = ask(hosts)
    assert said["code"] is None and f"nothing listens on port {PORT} of 10.77.0.2" in said["problem"]
    beta.start_sshd()
    beta.path(beta.home / ".ssh" / "authorized_keys").rename(beta.path(beta.home / ".ssh" / "away"))
    assert "accepts none of our keys" in ask(hosts)["problem"]
    beta.path(beta.home / ".ssh" / "away").rename(beta.path(beta.home / ".ssh" / "authorized_keys"))
    assert ask(hosts)["out"] == "beta\n"
    known = alpha.path(alpha.disk / "cluster" / "known_hosts")
    text = known.read_text()
    known.write_text("")
    assert "its host key isn't known here" in ask(hosts)["problem"]
    known.write_text(text.replace("beta", "other").replace("10.77.0.2", "10.77.0.9"))
    alpha_key = next(line for line in text.splitlines() if "10.77.0.1" in line)
    known.write_text(alpha_key.replace("10.77.0.1", "10.77.0.2") + "\n")
    said = ask(hosts)["problem"]
    assert "another one than the one that is known" in said and "ssh-keygen -R '[10.77.0.2]:36005'" in said
    known.write_text(text)
    assert "can't be resolved" in ask(hosts, "nowhere")["problem"]
    started = time.monotonic()
    beta.freeze()
    assert "no answer within 2 s" in ask(hosts, deadline=2)["problem"]
    beta.thaw()
    beta.link(up=False)
    assert "doesn't answer" in ask(hosts, deadline=12)["problem"]
    beta.link(up=True)
    assert time.monotonic() - started < 30
    assert ask(hosts)["out"] == "beta\n"


def test_a_killed_test_leaves_nothing_behind(tmp_path):
    need_two_hosts()
    code = (
        "import sys, time; from pathlib import Path; from hosts import two_hosts\n"
        "with two_hosts(Path(sys.argv[1]), shared=True) as made:\n"
        "    made.beta.run(['touch', made.beta.disk / 'x']); assert (made.alpha.disk / 'x').exists()\n"
        "    print(*[host.pid for host in made], flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "hosts")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    pids = killed.stdout.readline().split()
    assert len(pids) == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 5
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
