"""Passwordless ssh from nothing, between two hosts with real sshd: keys, host keys, a password given once."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
import time

import pytest
from hosts import CHECKOUT, PASSWORD, PORT, two_hosts

FOLDER = "cluster"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("setup"), shared=False) as made:
        yield made


def hynb(host, *words, **options):
    return host.hynb("hosts", *words, **options)


def typed(host, *words, answers):
    return host.typed([sys.executable, "-m", "hynb.cli", "hosts", *words], answers)


def test_from_nothing_to_a_login_with_a_password_given_once(hosts):
    alpha, beta = hosts
    setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER]
    # Without a terminal nobody can confirm a host key: its fingerprint is said, and nothing is trusted.
    first = hynb(alpha, *setup)
    assert first.returncode == 2 and beta.fingerprint in first.stderr and "--accept" in first.stderr
    key = alpha.path(alpha.home / ".ssh" / "id_ed25519")
    assert key.stat().st_mode & 0o777 == 0o600
    assert "beta" not in alpha.path(alpha.disk / FOLDER / "known_hosts").read_text()
    content = key.read_bytes()
    # The key is not accepted yet: the message says what to type, on which host.
    second = hynb(alpha, *setup, "--accept", beta.fingerprint)
    assert second.returncode == 2 and "beta: accepts none of our keys" in second.stderr
    shown = hynb(alpha, "show", "--folder", FOLDER, check=True).stdout
    assert "# on beta" in shown and f"/usr/sbin/sshd -p {PORT}" in shown
    code, seen = typed(alpha, *setup, "--password", answers=[("password on the hosts", "wrong")])
    assert code == 2 and "the password was refused" in seen
    code, seen = typed(alpha, *setup, "--password", answers=[("password on the hosts", PASSWORD)])
    assert code == 0, seen
    assert "beta: host key known, key installed" in seen and PASSWORD not in seen
    again = hynb(alpha, *setup, check=True)
    assert (
        "beta: host key known, key accepted" in again.stdout
        and "alpha: this machine, host key known, key accepted" in again.stdout
    )
    assert key.read_bytes() == content
    assert beta.path(beta.home / ".ssh" / "authorized_keys").read_text().count("ssh-ed25519") == 1
    config = alpha.disk / FOLDER / "ssh_config"
    assert alpha.run(["ssh", "-F", config, "beta", "hostname"]).stdout == "beta\n"
    assert (alpha.path(alpha.disk / FOLDER / "hostfile")).read_text() == "alpha slots=1\nbeta slots=1\n"
    assert not alpha.path(alpha.home / ".ssh" / "config").exists(), "nothing without consent"


def test_the_lines_that_are_shown_do_it_too(hosts):
    alpha, beta = hosts
    authorized = beta.path(beta.home / ".ssh" / "authorized_keys")
    authorized.write_text("# somebody else's, without an end of line")
    beta.stop_sshd()
    refused = hynb(alpha, "setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER)
    assert refused.returncode == 2 and f"nothing listens on port {PORT}" in refused.stderr
    beta.start_sshd()
    shown = hynb(alpha, "show", "--folder", FOLDER, check=True).stdout
    lines = [line for line in shown.splitlines() if line and not line.startswith("#") and "sshd" not in line]
    for _ in range(2):
        for line in lines:
            beta.run(["sh", "-c", line])
        assert hynb(alpha, "setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER).returncode == 0
    assert authorized.read_text().splitlines()[0] == "# somebody else's, without an end of line"
    assert authorized.read_text().count("ssh-ed25519") == 1
    authorized.write_text("# somebody else's, without an end of line")
    code, seen = typed(alpha, "install-key", "beta", "--folder", FOLDER, answers=[("password of beta", PASSWORD)])
    assert code == 0, seen
    assert authorized.read_text().splitlines()[0] == "# somebody else's, without an end of line"
    assert authorized.read_text().count("ssh-ed25519") == 1


def test_the_password_is_in_no_command_line_environment_or_file(hosts):
    """Looked for while ssh holds it: in every process of the host, and in all that was written."""
    alpha, beta = hosts
    beta.path(beta.home / ".ssh" / "authorized_keys").write_text("")
    main, side = pty.openpty()
    command = [sys.executable, "-m", "hynb.cli", "hosts", "install-key", "beta", "--folder", FOLDER]
    process = alpha.popen(
        command, env={"PYTHONPATH": str(CHECKOUT)}, stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    while "password of beta" not in (seen := os.read(main, 4096).decode()):
        assert seen
    os.write(main, (PASSWORD + "\n").encode())
    looks = 0
    while process.poll() is None:
        for item in alpha.processes():
            looks += any("ssh" in word for word in item.argv)
            assert PASSWORD not in " ".join(item.argv) and PASSWORD not in " ".join(item.environment.values())
        time.sleep(0.01)
    os.close(main)
    assert process.returncode == 0 and looks
    found = subprocess.run(
        ["grep", "-rlF", PASSWORD, alpha.root, alpha.path(alpha.disk)], capture_output=True, text=True
    )
    assert found.stdout == ""


def test_a_host_that_asks_in_its_own_way(hosts):
    """A password that is wrong is asked for again in another way there; and a host may take none at all."""
    alpha, beta = hosts
    authorized = beta.path(beta.home / ".ssh" / "authorized_keys")
    kept = authorized.read_text()
    install = ["install-key", "beta", "--folder", FOLDER]
    for first, password, says in (
        (["UsePAM yes", "KbdInteractiveAuthentication yes"], "wrong", "the password was refused"),
        (["UsePAM yes", "KbdInteractiveAuthentication yes", "PasswordAuthentication no"], PASSWORD, "key installed"),
        (["PasswordAuthentication no", "KbdInteractiveAuthentication no"], PASSWORD, "takes no passwords"),
    ):
        beta.stop_sshd()
        beta.start_sshd(first=first)
        authorized.write_text("")
        began = time.monotonic()
        code, seen = typed(alpha, *install, answers=[("password of beta", password)])
        assert says in seen and code == (0 if says == "key installed" else 2), seen
        assert time.monotonic() - began < 20
    beta.stop_sshd()
    said = typed(alpha, *install, answers=[("password of beta", PASSWORD)])[1]
    assert f"nothing listens on port {PORT}" in said
    beta.start_sshd()
    authorized.write_text(kept)
    # Without a terminal it would be seen on the screen.
    done = hynb(alpha, *install, input=PASSWORD + "\n")
    assert done.returncode == 2 and "password: there is no terminal" in done.stderr


def test_a_login_that_leads_nowhere_is_not_called_ready(hosts):
    alpha, beta = hosts
    setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER]
    profile = beta.path(beta.home / ".bashrc")
    profile.write_text("echo of another age >&2; exit 3\n")
    done = hynb(alpha, *setup)
    profile.unlink()
    assert done.returncode == 2 and "`true` ends with exit code 3 (of another age)" in done.stderr
    # sshd takes no key from a home that others can write: installing it again would not help.
    beta.path(beta.home).chmod(0o777)
    code, seen = typed(alpha, "install-key", "beta", "--folder", FOLDER, answers=[("password of beta", PASSWORD)])
    assert code == 2 and "chmod go-w ~ ~/.ssh" in seen
    beta.run(["sh", "-c", "chmod go-w ~ ~/.ssh"])
    assert hynb(alpha, *setup).returncode == 0


def test_an_agent_with_many_keys_is_no_hindrance(hosts):
    alpha, _ = hosts
    words = shlex.join([sys.executable, "-m", "hynb.cli", "hosts", "setup", "alpha:1,beta:1", "--port", str(PORT)])
    keys = "for n in 1 2 3 4 5 6 7; do ssh-keygen -q -t ed25519 -N '' -f of_agent_$n; ssh-add -q of_agent_$n; done"
    line = f"eval $(ssh-agent); {keys}; {words} --folder {FOLDER}; code=$?; ssh-agent -k; exit $code"
    done = alpha.run(["sh", "-c", line], check=False, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0 and "key accepted" in done.stdout, done.stderr


def test_a_changed_host_key_is_an_error_until_it_is_confirmed(hosts):
    alpha, beta = hosts
    before = alpha.path(alpha.disk / FOLDER / "known_hosts").read_text()
    beta.stop_sshd()
    beta.new_host_key()
    beta.start_sshd()
    setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER]
    refused = hynb(alpha, *setup, "--accept", beta.fingerprint)
    assert refused.returncode == 2
    assert "beta: its host key has changed" in refused.stderr and beta.fingerprint in refused.stderr
    assert alpha.path(alpha.disk / FOLDER / "known_hosts").read_text() == before
    # What the message says to type, typed.
    forget = refused.stderr.split("`")[1]
    assert forget.startswith("ssh-keygen -R")
    alpha.run(shlex.split(forget))
    code, seen = typed(alpha, "trust", "beta", "--folder", FOLDER, answers=[("Keep them", "n")])
    assert code == 2 and beta.fingerprint in seen
    code, seen = typed(alpha, "trust", "beta", "--folder", FOLDER, answers=[("Keep them", "y")])
    assert code == 0, seen
    assert hynb(alpha, *setup).returncode == 0
    # A host that hides the kind that is known, and shows another.
    beta.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", "/etc/ssh/ecdsa"])
    beta.stop_sshd()
    usual = beta.host_key.with_suffix("")
    usual.rename(usual.with_name("usual"))
    beta.start_sshd(first=["HostKey /etc/ssh/ecdsa"])
    refused = hynb(alpha, *setup, "--accept", beta.fingerprint)
    assert refused.returncode == 2 and "beta: its host key has changed" in refused.stderr
    beta.stop_sshd()
    usual.with_name("usual").rename(usual)
    beta.start_sshd()


def test_every_host_to_every_other(hosts):
    alpha, beta = hosts
    beta.run(["mkdir", "-p", FOLDER])
    kept = beta.path(beta.disk / FOLDER / "known_hosts")
    kept.write_text("gamma ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJr\n")
    # What a login script prints is no key.
    beta.path(beta.home / ".bashrc").write_text("echo welcome\n")
    hynb(alpha, "exchange", "--folder", FOLDER, check=True)
    assert kept.read_text().startswith("gamma ") and "alpha" in kept.read_text()
    beta.path(beta.home / ".bashrc").unlink()
    for host in hosts:
        assert "welcome" not in host.path(host.home / ".ssh" / "authorized_keys").read_text()
    hynb(alpha, "exchange", "--folder", FOLDER, check=True)
    config = alpha.disk / FOLDER / "ssh_config"
    for here, there in ((alpha, "beta"), (beta, "alpha")):
        assert here.run(["ssh", "-F", config, "-o", "BatchMode=yes", there, "hostname"]).stdout == f"{there}\n"
    assert hynb(alpha, "setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER).returncode == 0


def test_every_host_to_every_other_over_a_shared_folder(tmp_path):
    with two_hosts(tmp_path / "shared", shared=True) as made:
        alpha, beta = made
        setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER, "--accept", beta.fingerprint]
        code, seen = typed(alpha, *setup, "--password", answers=[("password on", PASSWORD)])
        assert code == 0, seen
        for _ in range(2):
            hynb(alpha, "exchange", "--folder", FOLDER, check=True)
        config = alpha.disk / FOLDER / "ssh_config"
        assert alpha.path(config).read_text().count("Host alpha\n") == 1
        for here, there in ((alpha, "beta"), (beta, "alpha")):
            assert here.run(["ssh", "-F", config, "-o", "BatchMode=yes", there, "hostname"]).stdout == f"{there}\n"
        # Said only where it is so.
        (alpha.path(alpha.home / ".ssh") / "authorized_keys").chmod(0o666)
        alpha.path(alpha.home).chmod(0o777)
        done = hynb(alpha, "exchange", "--folder", FOLDER)
        assert done.returncode == 2 and "beta: " in done.stderr and "can't log in on alpha" in done.stderr
        hostfile = alpha.path(alpha.disk / FOLDER / "hostfile")
        hostfile.write_text("localhost slots=1\nbeta slots=1\n")
        assert "localhost is another machine" in hynb(alpha, "exchange", "--folder", FOLDER).stderr


def test_an_include_is_added_once_and_taken_back(hosts):
    alpha, _ = hosts
    mine = alpha.path(alpha.home / ".ssh" / "config")
    mine.write_text("Host other\n  Port 77\n")
    for _ in range(2):
        hynb(alpha, "include", "--folder", FOLDER, check=True)
    assert mine.read_text().count("Include") == 1 and mine.read_text().endswith("Host other\n  Port 77\n")
    assert alpha.run(["ssh", "-o", "BatchMode=yes", "beta", "hostname"]).stdout == "beta\n"
    hynb(alpha, "include", "--folder", FOLDER, "--remove", check=True)
    assert mine.read_text() == "Host other\n  Port 77\n"
    # A link into a collection of settings stays one.
    behind = mine.with_name("settings")
    mine.rename(behind)
    mine.symlink_to(behind.name)
    hynb(alpha, "include", "--folder", FOLDER, check=True)
    assert mine.is_symlink() and behind.read_text().startswith("Include ")
    hynb(alpha, "include", "--folder", FOLDER, "--remove", check=True)
    assert behind.read_text() == "Host other\n  Port 77\n"
    mine.unlink()


def test_mistakes_are_named(hosts):
    alpha, beta = hosts
    key = alpha.path(alpha.home / ".ssh" / "id_ed25519")
    key.chmod(0o644)
    said = hynb(alpha, "setup", "beta:1", "--port", PORT, "--folder", FOLDER).stderr
    key.chmod(0o600)
    assert "others can read this private key" in said and "chmod 600" in said
    alpha.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", alpha.disk / "locked"])
    said = hynb(alpha, "setup", "beta:1", "--folder", FOLDER, "--key", alpha.disk / "locked").stderr
    assert "has a passphrase" in said and "--key" in said
    assert "port = 99999" in hynb(alpha, "setup", "beta:1", "--port", 99999, "--folder", FOLDER).stderr
    many = ",".join(f"node-{number}:8,," for number in range(40)) + "beta"
    assert "hosts:1: 'beta' names no slots" in hynb(alpha, "setup", many, "--folder", FOLDER).stderr
    assert "hostfile = no/such: cannot be read" in hynb(alpha, "setup", "no/such", "--folder", FOLDER).stderr
    assert "folder = /proc/none: can't be made" in hynb(alpha, "setup", "beta:1", "--folder", "/proc/none").stderr
    assert "hosts:1: 'beta' names no slots" in hynb(alpha, "setup", "beta", "--folder", FOLDER).stderr
    alpha.run(["mkdir", "other"])
    alpha.path(alpha.disk / "other" / "ssh_config").write_text("Host mine\n")
    said = hynb(alpha, "setup", "beta:1", "--folder", "other").stderr
    assert "wasn't written by hynb" in said
    assert alpha.path(alpha.disk / "other" / "ssh_config").read_text() == "Host mine\n"
    assert "hynb hosts setup" in hynb(alpha, "trust", "beta", "--folder", "none").stderr
    alone = alpha.path(alpha.home / ".ssh" / "other.pub")
    alone.write_text("of a private key that is elsewhere\n")
    said = hynb(alpha, "setup", "beta:1", "--folder", FOLDER, "--key", alpha.home / ".ssh" / "other").stderr
    assert "its private key isn't beside it" in said and alone.read_text() == "of a private key that is elsewhere\n"
    # A hostfile of a person's own stays to the letter.
    alpha.run(["mkdir", "mine"])
    own = alpha.path(alpha.disk / "mine" / "hostfile")
    own.write_text("# ours\nalpha   slots=1\nbeta slots=1  # the old one\n")
    said = hynb(alpha, "setup", "alpha:1,beta:2", "--port", PORT, "--folder", "mine").stderr
    assert "mine/hostfile: was written by hand" in said
    hynb(alpha, "setup", "mine/hostfile", "--port", PORT, "--folder", "mine", "--accept", beta.fingerprint)
    assert own.read_text() == "# ours\nalpha   slots=1\nbeta slots=1  # the old one\n"
    bare = ["env", "PATH=/nonexistent", sys.executable, "-m", "hynb.cli"]
    for words in (
        ["hosts", "setup", "beta:1", "--folder", FOLDER],
        ["preflight", "--hostfile", f"{FOLDER}/hostfile"],
    ):
        done = alpha.run([*bare, *words], check=False, env={"PYTHONPATH": str(CHECKOUT)})
        said = done.stdout + done.stderr
        assert done.returncode == 2 and "apt-get install openssh-client" in said and "Traceback" not in said
    # ssh passes over a key that others can read, and then the host refuses: the reason is the key.
    key.chmod(0o644)
    said = alpha.hynb("preflight", "--hostfile", f"{FOLDER}/hostfile", "--no_collective").stdout
    key.chmod(0o600)
    assert "others can read it" in said and str(key.name) in said and "accepts none" not in said
    said = hynb(alpha, "setup", "alpha:1,beta:1", "--port", 36006, "--folder", "third").stderr
    assert "beta: nothing listens on port 36006" in said and "Traceback" not in said
