"""Passwordless ssh between two hosts with real sshd: keys, host keys, a password that is entered once."""

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


def test_set_up_with_a_password_that_is_entered_once(hosts):
    alpha, beta = hosts
    setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER]
    # Without a terminal nobody can confirm a host key: its fingerprint is shown, and the key isn't stored.
    first = hynb(alpha, *setup)
    assert first.returncode == 2 and beta.fingerprint in first.stderr and "--accept" in first.stderr
    key = alpha.path(alpha.home / ".ssh" / "id_ed25519")
    assert key.stat().st_mode & 0o777 == 0o600
    assert "beta" not in alpha.path(alpha.disk / FOLDER / "known_hosts").read_text()
    content = key.read_bytes()
    # The key is not accepted yet: the message says what to run, and on which host.
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
    assert not alpha.path(alpha.home / ".ssh" / "config").exists(), "changed without consent"


def test_the_shown_commands_do_the_same(hosts):
    alpha, beta = hosts
    authorized = beta.path(beta.home / ".ssh" / "authorized_keys")
    authorized.write_text("# somebody else's, without a newline")
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
    assert authorized.read_text().splitlines()[0] == "# somebody else's, without a newline"
    assert authorized.read_text().count("ssh-ed25519") == 1
    authorized.write_text("# somebody else's, without a newline")
    code, seen = typed(alpha, "install-key", "beta", "--folder", FOLDER, answers=[("password of beta", PASSWORD)])
    assert code == 0, seen
    assert authorized.read_text().splitlines()[0] == "# somebody else's, without a newline"
    assert authorized.read_text().count("ssh-ed25519") == 1


def test_the_password_is_in_no_command_line_environment_or_file(hosts):
    """Searched while ssh is using it, in every process of the host, and afterwards in all files."""
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


def test_hosts_with_other_authentication_methods(hosts):
    """After a wrong password sshd asks again by another method; and some hosts accept no passwords at all."""
    alpha, beta = hosts
    authorized = beta.path(beta.home / ".ssh" / "authorized_keys")
    kept = authorized.read_text()
    install = ["install-key", "beta", "--folder", FOLDER]
    for first, password, message in (
        (["UsePAM yes", "KbdInteractiveAuthentication yes"], "wrong", "the password was refused"),
        (["UsePAM yes", "KbdInteractiveAuthentication yes", "PasswordAuthentication no"], PASSWORD, "key installed"),
        (["PasswordAuthentication no", "KbdInteractiveAuthentication no"], PASSWORD, "takes no passwords"),
    ):
        beta.stop_sshd()
        beta.start_sshd(first=first)
        authorized.write_text("")
        code, seen = typed(alpha, *install, answers=[("password of beta", password)])
        # A second question that waited for its answer would end in "no answer within 40 s".
        assert message in seen and code == (0 if message == "key installed" else 2), seen
    beta.stop_sshd()
    code, seen = typed(alpha, *install, answers=[("password of beta", PASSWORD)])
    assert code == 2 and f"nothing listens on port {PORT}" in seen
    beta.start_sshd()
    authorized.write_text(kept)
    # Without a terminal the password would be shown while it is typed.
    done = hynb(alpha, *install, input=PASSWORD + "\n")
    assert done.returncode == 2 and "password: there is no terminal" in done.stderr


def test_a_login_without_a_usable_shell_is_a_problem(hosts):
    alpha, beta = hosts
    setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER]
    profile = beta.path(beta.home / ".bashrc")
    profile.write_text("echo of another age >&2; exit 3\n")
    done = hynb(alpha, *setup)
    profile.unlink()
    assert done.returncode == 2 and "`true` ends with exit code 3 (of another age)" in done.stderr
    # sshd ignores keys in a home directory that others can write: installing the key again would not help.
    beta.path(beta.home).chmod(0o777)
    code, seen = typed(alpha, "install-key", "beta", "--folder", FOLDER, answers=[("password of beta", PASSWORD)])
    assert code == 2 and "chmod go-w ~ ~/.ssh" in seen
    beta.run(["sh", "-c", "chmod go-w ~ ~/.ssh"])
    assert hynb(alpha, *setup).returncode == 0


def test_an_agent_with_many_keys_does_not_prevent_a_login(hosts):
    alpha, _ = hosts
    words = shlex.join([sys.executable, "-m", "hynb.cli", "hosts", "setup", "alpha:1,beta:1", "--port", str(PORT)])
    keys = "for n in 1 2 3 4 5 6 7; do ssh-keygen -q -t ed25519 -N '' -f of_agent_$n; ssh-add -q of_agent_$n; done"
    line = f"eval $(ssh-agent); {keys}; {words} --folder {FOLDER}; code=$?; ssh-agent -k; exit $code"
    done = alpha.run(["sh", "-c", line], check=False, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0 and "key accepted" in done.stdout, done.stderr


def test_a_changed_host_key_is_an_error_until_it_is_accepted(hosts):
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
    # The command in the message.
    forget = refused.stderr.split("`")[1]
    assert forget.startswith("ssh-keygen -R")
    alpha.run(shlex.split(forget))
    code, seen = typed(alpha, "trust", "beta", "--folder", FOLDER, answers=[("Accept them", "n")])
    assert code == 2 and beta.fingerprint in seen
    code, seen = typed(alpha, "trust", "beta", "--folder", FOLDER, answers=[("Accept them", "y")])
    assert code == 0, seen
    assert hynb(alpha, *setup).returncode == 0
    # A host that no longer offers the stored kind of key, but another one.
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


def test_logins_between_all_hosts(hosts):
    alpha, beta = hosts
    beta.run(["mkdir", "-p", FOLDER])
    kept = beta.path(beta.disk / FOLDER / "known_hosts")
    kept.write_text("gamma ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJr\n")
    # The output of a login script is not a key.
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


def test_logins_between_all_hosts_with_a_shared_disk(tmp_path):
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
        # A login that fails is reported.
        (alpha.path(alpha.home / ".ssh") / "authorized_keys").chmod(0o666)
        alpha.path(alpha.home).chmod(0o777)
        done = hynb(alpha, "exchange", "--folder", FOLDER)
        assert done.returncode == 2 and "beta: " in done.stderr and "can't log in on alpha" in done.stderr
        hostfile = alpha.path(alpha.disk / FOLDER / "hostfile")
        hostfile.write_text("localhost slots=1\nbeta slots=1\n")
        assert "localhost is a different machine" in hynb(alpha, "exchange", "--folder", FOLDER).stderr


def test_an_include_is_added_once_and_removed(hosts):
    alpha, _ = hosts
    own = alpha.path(alpha.home / ".ssh" / "config")
    own.write_text("Host other\n  Port 77\n")
    for _ in range(2):
        hynb(alpha, "include", "--folder", FOLDER, check=True)
    assert own.read_text().count("Include") == 1 and own.read_text().endswith("Host other\n  Port 77\n")
    assert alpha.run(["ssh", "-o", "BatchMode=yes", "beta", "hostname"]).stdout == "beta\n"
    hynb(alpha, "include", "--folder", FOLDER, "--remove", check=True)
    assert own.read_text() == "Host other\n  Port 77\n"
    # A symbolic link into a collection of settings stays one.
    behind = own.with_name("settings")
    own.rename(behind)
    own.symlink_to(behind.name)
    hynb(alpha, "include", "--folder", FOLDER, check=True)
    assert own.is_symlink() and behind.read_text().startswith("Include ")
    hynb(alpha, "include", "--folder", FOLDER, "--remove", check=True)
    assert behind.read_text() == "Host other\n  Port 77\n"
    own.unlink()


def test_mistakes_are_named(hosts):
    alpha, _ = hosts

    def problem(*words) -> str:
        done = hynb(alpha, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    setup = ["setup", "beta:1", "--folder", FOLDER]
    key = alpha.path(alpha.home / ".ssh" / "id_ed25519")
    key.chmod(0o644)
    unsafe = problem(*setup, "--port", PORT)
    key.chmod(0o600)
    assert "others can read this private key" in unsafe and "chmod 600" in unsafe
    alpha.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", alpha.disk / "locked"])
    locked = problem(*setup, "--key", alpha.disk / "locked")
    assert "has a passphrase" in locked and "--key" in locked
    alone = alpha.path(alpha.home / ".ssh" / "other.pub")
    alone.write_text("of a private key that is elsewhere\n")
    assert "its private key is missing" in problem(*setup, "--key", alpha.home / ".ssh" / "other")
    assert alone.read_text() == "of a private key that is elsewhere\n"
    assert "no key can be created" in problem(*setup, "--key", "/proc/none/key")
    assert "port = 99999" in problem(*setup, "--port", 99999)
    assert "user = root -oProxyCommand=x: is not a login name" in problem(*setup, "--user", "root -oProxyCommand=x")
    many = ",".join(f"node-{number}:8,," for number in range(40)) + "beta"
    assert "hosts:1: 'beta' names no slots" in problem("setup", many, "--folder", FOLDER)
    assert "hostfile = no/such: cannot be read" in problem("setup", "no/such", "--folder", FOLDER)
    assert "folder = /proc/none: can't be created" in problem("setup", "beta:1", "--folder", "/proc/none")
    assert "hosts:1: 'beta' names no slots" in problem("setup", "beta", "--folder", FOLDER)
    assert "hynb hosts setup" in problem("trust", "beta", "--folder", "none")
    assert "beta: nothing listens on port 36006" in problem(
        "setup", "alpha:1,beta:1", "--port", 36006, "--folder", "third"
    )


def test_files_that_a_person_wrote_are_not_replaced(hosts):
    alpha, beta = hosts
    alpha.run(["mkdir", "other", "own"])
    alpha.path(alpha.disk / "other" / "ssh_config").write_text("Host mine\n")
    assert "was not written by hynb" in hynb(alpha, "setup", "beta:1", "--folder", "other").stderr
    assert alpha.path(alpha.disk / "other" / "ssh_config").read_text() == "Host mine\n"
    own = alpha.path(alpha.disk / "own" / "hostfile")
    own.write_text("# ours\nalpha   slots=1\nbeta slots=1  # the old one\n")
    refused = hynb(alpha, "setup", "alpha:1,beta:2", "--port", PORT, "--folder", "own")
    assert "own/hostfile: was written by hand" in refused.stderr
    hynb(alpha, "setup", "own/hostfile", "--port", PORT, "--folder", "own", "--accept", beta.fingerprint)
    assert own.read_text() == "# ours\nalpha   slots=1\nbeta slots=1  # the old one\n"


def test_a_machine_without_ssh(hosts):
    alpha, _ = hosts
    bare = ["env", "PATH=/nonexistent", sys.executable, "-m", "hynb.cli"]
    for words in (
        ["hosts", "setup", "beta:1", "--folder", FOLDER],
        ["preflight", "--hostfile", f"{FOLDER}/hostfile"],
    ):
        done = alpha.run([*bare, *words], check=False, env={"PYTHONPATH": str(CHECKOUT)})
        output = done.stdout + done.stderr
        assert done.returncode == 2 and "apt-get install openssh-client" in output and "Traceback" not in output


def test_a_key_that_others_can_read_is_the_reported_reason(hosts):
    """ssh ignores such a key, and then the host refuses the login."""
    alpha, _ = hosts
    key = alpha.path(alpha.home / ".ssh" / "id_ed25519")
    key.chmod(0o644)
    output = alpha.hynb("preflight", "--hostfile", f"{FOLDER}/hostfile", "--no_collective").stdout
    key.chmod(0o600)
    assert "others can read it" in output and str(key.name) in output and "accepts none" not in output


def test_paths_with_spaces_and_shell_syntax(tmp_path):
    """The folder and the key of a cluster, in settings of ssh, in scripts on hosts and in printed commands."""
    with two_hosts(tmp_path, shared=False) as made:
        alpha, beta = made
        folder, key = "it's $(touch hit) `touch hit`; touch hit", alpha.disk / "a key; $(touch hit)"
        setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", folder, "--key", key]
        refused = hynb(alpha, *setup)
        fingerprint = beta.fingerprint
        trust = next(part for part in refused.stderr.split("then: `")[1:] if fingerprint in part)
        words = shlex.split(trust[: trust.index(fingerprint) + len(fingerprint)])
        assert words[:4] == ["hynb", "hosts", "trust", "beta"] and words[5].endswith(folder)
        hynb(alpha, *words[2:], check=True)
        code, seen = typed(alpha, *setup, "--password", answers=[("password on", PASSWORD)])
        assert code == 0, seen
        hynb(alpha, "exchange", "--folder", folder, check=True)
        for here, there in ((alpha, "beta"), (beta, "alpha")):
            login = ["ssh", "-F", alpha.disk / folder / "ssh_config", "-o", "BatchMode=yes", there, "hostname"]
            assert here.run(login).stdout == f"{there}\n"
        hynb(alpha, "include", "--folder", folder, check=True)
        assert alpha.run(["ssh", "-o", "BatchMode=yes", "beta", "hostname"]).stdout == "beta\n"
        beta.stop_sshd()
        beta.new_host_key()
        beta.start_sshd()
        changed = hynb(alpha, *setup).stderr
        start = changed.index("`ssh-keygen -R") + 1
        alpha.run(["sh", "-c", changed[start : changed.index("` and `hynb hosts trust", start)]])
        assert hynb(alpha, *setup, "--accept", beta.fingerprint).returncode == 0
        assert not list(tmp_path.rglob("hit"))
        for special in ('a"b', "50%", "${HOME}", "a\\b"):
            done = hynb(alpha, "setup", "alpha:1,beta:1", "--folder", special)
            assert done.returncode == 2 and "can't be used in an ssh_config" in done.stderr, special
