"""Preflight of two hosts with real sshd: all checks pass, then one fault after the other, fixed by its command."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import CHECKOUT, PASSWORD, PORT, need_programs, trusting, two_hosts
from tiny import tiny_data, tiny_model

from hynb.config import Config
from hynb.preflight import examine_hosts

FOLDER = "cluster"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts that `hynb hosts setup` has set up; model and data are on alpha alone."""
    need_programs("rsync")
    with two_hosts(tmp_path_factory.mktemp("preflight"), shared=False) as made:
        setup = ["setup", "alpha:1,beta:1", "--port", PORT, "--folder", FOLDER, "--password"]
        command = [sys.executable, "-m", "hynb.cli", "hosts", *setup, "--accept", made.beta.fingerprint]
        code, seen = made.alpha.typed(command, [("password on the hosts", PASSWORD)])
        assert code == 0, seen
        tiny_model(made.alpha.path(made.alpha.disk) / "model")
        tiny_data(made.alpha.path(made.alpha.disk) / "train.jsonl")
        values = {"model_name_or_path": "model", "train_data_file": "train.jsonl", "output_dir": "runs/first"}
        values |= {"hostfile": f"{FOLDER}/hostfile", "use_lora": True}
        lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
        made.alpha.path(made.alpha.disk / "run.yaml").write_text(lines)
        yield made


def run_preflight(hosts, *words, collective=False) -> tuple[dict, set[tuple[str, str]]]:
    """The report as JSON, and host and check of each failed check."""
    more = [] if collective else ["--no_collective"]
    done = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--json", *more, *words)
    assert done.stdout.startswith("{"), done.stderr
    report = json.loads(done.stdout)
    assert (done.returncode == 0) is report["ok"] and done.returncode in (0, 2)
    return report, {(cell["host"], cell["check"]) for cell in failed_cells(report)}


def failed_cells(report) -> list[dict]:
    return [cell for cell in report["cells"] if cell["state"] == "bad"]


def texts(report) -> dict[tuple[str, str], str]:
    """The text of each cell by host and check."""
    return {(cell["host"], cell["check"]): cell["text"] for cell in report["cells"]}


def apply_fixes(hosts, report) -> None:
    """Runs the command of each failed check on the host that the report names."""
    for cell in failed_cells(report):
        host = hosts.beta if cell["fix_host"] == "beta" else hosts.alpha
        command = cell["fix"].replace("hynb hosts", f"{sys.executable} -m hynb.cli hosts")
        answer = ("password of", PASSWORD) if "install-key" in command else ("Accept them", "y")
        code, seen = host.typed(["sh", "-c", command], [answer])
        assert code == 0, (cell, seen)
        if "sshd -p" in command:
            # sshd goes into the background before it listens.
            host.until_listens(int(command.split()[-1]))


def assert_all_pass(hosts, *words) -> None:
    report, failed = run_preflight(hosts, *words)
    assert not failed, failed_cells(report)


def test_missing_files_are_copied_and_then_all_checks_pass(hosts):
    # Every rank reads the user's own DeepSpeed settings, too.
    (hosts.alpha.path(hosts.alpha.disk) / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    report, _ = run_preflight(hosts, "--set", "deepspeed=zero.json")
    text = texts(report)["beta", "data"]
    assert "/train.jsonl" in text and "/zero.json" in text
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "model"), ("beta", "data")}
    assert all(cell["fix"].startswith("rsync") for cell in failed_cells(report))
    done = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix")
    assert done.returncode == 2 and "beta, model" in done.stdout and "beta, data" not in done.stdout
    report, failed = run_preflight(hosts, "--fix_model", collective=True)
    assert not failed
    copied = hosts.beta.path(hosts.beta.disk) / "model" / "model.safetensors"
    assert copied.read_bytes() == (hosts.alpha.path(hosts.alpha.disk) / "model" / "model.safetensors").read_bytes()
    (pair,) = report["collective"]["pairs"]
    assert report["collective"]["correct"] and report["collective"]["ranks"] == 2
    assert pair["nodes"] == [0, 1] and pair["bytes_per_second"] > 1e6 and 0 < pair["latency_seconds"] < 1
    shown = texts(report)
    assert shown["beta", "output_dir"] == "a folder of its own"
    assert shown["beta", "network"] == "cable 10.77.0.2" and shown["alpha", "network"] == "cable 10.77.0.1"
    assert shown["beta", "master port"] == "reached"
    kept = json.loads(hosts.alpha.path(hosts.alpha.disk / FOLDER / "preflight.json").read_text())
    assert kept["cells"] == report["cells"]
    printed = hosts.alpha.hynb("preflight", "--config", "run.yaml", check=True).stdout
    assert "alpha – beta: " in printed and "µs one way" in printed and "all checks passed, 2 hosts" in printed
    assert not list(hosts.alpha.path(hosts.alpha.disk).rglob(".hynb-*")), "a file is left behind"


def test_the_all_reduce_gets_the_environment_variables_of_a_run(hosts):
    variables = hosts.alpha.path(hosts.alpha.disk / ".deepspeed_env")
    variables.write_text("TORCH_DISTRIBUTED_DEBUG=NONSENSE\n")
    report, failed = run_preflight(hosts, collective=True)
    variables.unlink()
    assert failed == {("alpha", "all-reduce"), ("beta", "all-reduce")}
    assert "TORCH_DISTRIBUTED_DEBUG" in texts(report)["alpha", "all-reduce"]


def test_a_host_without_the_program_ip(hosts):
    """As in many containers."""
    program = Path(shutil.which("ip") or "").resolve()
    hosts.beta.run(["mount", "--bind", "/etc/hostname", program])
    report, failed = run_preflight(hosts)
    hosts.beta.run(["umount", program])
    assert not failed and texts(report)["beta", "network"] == "cable 10.77.0.2"


def test_a_host_that_is_listed_by_two_names(hosts):
    listed = hosts.alpha.path(hosts.alpha.disk / FOLDER / "hostfile")
    kept = listed.read_text()
    listed.write_text("localhost slots=1\n" + kept)
    report, failed = run_preflight(hosts)
    listed.write_text(kept)
    assert ("alpha", "name") in failed
    assert texts(report)["alpha", "name"] == "is localhost by another name (this machine): list it once"


def test_hosts_that_pass_all_checks_train(hosts):
    """LoRA, with what `hynb hosts setup` and `hynb preflight --fix` have done, and nothing else."""
    need_programs("pdsh")
    assert_all_pass(hosts)
    values = ["max_steps=3", "save_steps=3", "lora_rank=4", "max_seq_length=256", "deepspeed=ds_zero3_no_offload"]
    words = [word for value in values for word in ("--set", value)]
    done = hosts.alpha.hynb("launch", "--config", "run.yaml", "--follow", *words, timeout=400)
    assert done.returncode == 0 and "step 3/3  loss" in done.stdout, done.stdout + done.stderr
    for host in hosts:
        saved = host.path(host.disk) / "runs" / "first" / "checkpoint-3"
        assert (saved / "adapter_model.safetensors").is_file(), host.name
    shutil.rmtree(hosts.beta.path(hosts.beta.disk) / "runs")


def test_problems_of_reaching_a_host(hosts):
    """sshd down, another port, the key missing, the host key changed: each is fixed by its command."""
    alpha, beta = hosts
    beta.stop_sshd()
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "port")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts)

    beta.path(beta.home / ".ssh" / "authorized_keys").unlink()
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "login")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts)

    beta.stop_sshd()
    beta.new_host_key()
    beta.start_sshd()
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "host key")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts)

    config = alpha.path(alpha.disk / FOLDER / "ssh_config")
    config.write_text(config.read_text().replace(str(PORT), "36006"))
    report, failed = run_preflight(hosts)
    assert failed == {("alpha", "port"), ("beta", "port")}, "pdsh logs in on the launching host as well"
    apply_fixes(hosts, report)
    # Another port has its own entry in known_hosts.
    report, failed = run_preflight(hosts)
    assert failed == {("alpha", "host key"), ("beta", "host key")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts)
    config.write_text(config.read_text().replace("36006", str(PORT)))

    alpha.path(alpha.home / ".ssh" / "authorized_keys").unlink()
    assert run_preflight(hosts)[1] == {("alpha", "login")}
    assert_all_pass(hosts, "--set", "launcher=openmpi", "--set", "include=alpha")
    apply_fixes(hosts, run_preflight(hosts)[0])
    assert_all_pass(hosts)


def test_files_that_differ(hosts):
    _, beta = hosts
    shutil.rmtree(beta.path(beta.disk / "model"))
    data = beta.path(beta.disk / "train.jsonl")
    data.write_text(data.read_text().replace("e", "E", 1))
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "model"), ("beta", "data")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts)
    config = beta.path(beta.disk / "model" / "config.json")
    config.write_text(config.read_text() + " ")
    assert run_preflight(hosts)[1] == {("beta", "model")}
    apply_fixes(hosts, run_preflight(hosts)[0])
    assert_all_pass(hosts)


def test_fixes_with_spaces_and_shell_syntax_in_paths(hosts):
    """The path of a data file, for a shell and rsync on two hosts, and of the ssh_config, for rsync's own parser."""
    folder = "it's a $(touch hit) `touch hit`; touch hit"
    disk = hosts.alpha.path(hosts.alpha.disk)
    shutil.copytree(disk / FOLDER, disk / folder)
    shutil.copy(disk / "train.jsonl", disk / folder)
    values = {"train_data_file": f"{folder}/train.jsonl", "hostfile": f"{folder}/hostfile", "use_lora": True}
    values |= {"output_dir": f"{folder}/run"}
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
    (disk / folder / "run.yaml").write_text(lines)
    config = ["--config", f"{folder}/run.yaml"]
    report, failed = run_preflight(hosts, *config)
    assert failed == {("beta", "data")}
    apply_fixes(hosts, report)
    assert_all_pass(hosts, *config)
    copied = hosts.beta.path(hosts.beta.disk) / folder / "train.jsonl"
    assert copied.read_bytes() == (disk / "train.jsonl").read_bytes()
    assert not [path for host in hosts for path in host.root.rglob("hit")]


def test_a_host_without_code_and_environment(hosts):
    """The code is copied; the environment is created there."""
    alpha, beta = hosts
    beta.run(["mount", "-t", "tmpfs", "tmpfs", CHECKOUT])
    try:
        report, failed = run_preflight(hosts)
        assert ("beta", "code") in failed
        alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix")
        copied = beta.run(["cat", CHECKOUT / "hynb" / "errors.py"]).stdout
        assert copied == (CHECKOUT / "hynb" / "errors.py").read_text()
        if Path(sys.executable).is_relative_to(CHECKOUT):
            report, failed = run_preflight(hosts)
            assert failed == {("beta", "python")}
            (cell,) = failed_cells(report)
            need_programs("make")
            beta.run(["sh", "-c", cell["fix"].replace("make", "make --dry-run")])
    finally:
        beta.run(["umount", CHECKOUT])


def test_another_version_of_the_code_is_replaced(hosts):
    alpha, beta = hosts
    # Mounted over the checkout's on beta alone.
    own = beta.root / "code"
    shutil.copytree(CHECKOUT / "hynb", own, ignore=shutil.ignore_patterns("__pycache__"))
    (own / "errors.py").write_text("# another version\n")
    beta.run(["mount", "--bind", own, CHECKOUT / "hynb"])
    try:
        _, failed = run_preflight(hosts)
        assert failed == {("beta", "code")}
        done = alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix", check=True)
        assert "all checks passed" in done.stdout and "rsync" in done.stderr
        assert (own / "errors.py").read_bytes() == (CHECKOUT / "hynb" / "errors.py").read_bytes()
    finally:
        beta.run(["umount", CHECKOUT / "hynb"])


def test_another_version_of_a_package(hosts):
    _, beta = hosts
    metadata = next(Path(path) for path in sys.path for path in Path(path).glob("peft-*.dist-info/METADATA"))
    version = next(line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Version:"))
    other = beta.root / "METADATA"
    other.write_text(metadata.read_text().replace(f"Version: {version}", "Version: 0.1.0"))
    beta.run(["mount", "--bind", other, metadata])
    report, failed = run_preflight(hosts)
    beta.run(["umount", metadata])
    assert failed == {("beta", "versions")}
    (cell,) = failed_cells(report)
    # Not run: the two hosts share this checkout's environment, which pip would change.
    assert cell["fix"] == shlex.join([sys.executable, "-m", "pip", "install", f"peft=={version}"])
    assert cell["text"] == f"peft 0.1.0, but {version} here" and cell["fix_host"] == "beta"


def test_a_clock_that_is_off(hosts):
    _, beta = hosts
    beta.stop_sshd()
    beta.start_sshd(clock_shift_seconds=-90)
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "clock")}
    assert texts(report)["beta", "clock"].startswith("-")
    beta.stop_sshd()
    beta.start_sshd()


def test_more_slots_than_cores(hosts):
    alpha, _ = hosts
    listed = alpha.path(alpha.disk / FOLDER / "hostfile")
    listed.write_text("alpha slots=1\nbeta slots=512\n")
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "GPUs"), ("beta", "memory")}, "512 processes need memory too"
    apply_fixes(hosts, report)
    assert listed.read_text().splitlines()[1] != "beta slots=512"
    assert_all_pass(hosts)
    listed.write_text("alpha slots=1\nbeta slots=1\n")


def test_a_full_disk(hosts):
    _, beta = hosts
    (beta.path(beta.disk) / "runs").mkdir(exist_ok=True)
    beta.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", beta.disk / "runs"])
    report, failed = run_preflight(hosts)
    assert failed == {("beta", "disk")}
    apply_fixes(hosts, report)
    beta.run(["umount", beta.disk / "runs"])
    assert_all_pass(hosts)


def test_a_master_port_that_is_taken(hosts):
    listening = "import socket; s = socket.create_server(('10.77.0.1', 29555)); print(1, flush=True); input()"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with hosts.alpha.popen([sys.executable, "-c", listening], **streams) as taken:
        taken.stdout.readline()
        report, failed = run_preflight(hosts, "--set", "master_port=29555")
        assert failed == {("alpha", "master port")}
        (cell,) = failed_cells(report)
        assert "29555 is taken: process" in cell["text"]
        assert_all_pass(hosts, *cell["fix"].split())


def test_a_network_interface_that_does_not_exist(hosts):
    report, failed = run_preflight(hosts, "--set", "network_interface=eth9")
    assert failed == {("alpha", "network"), ("beta", "network")}
    (words,) = {cell["fix"] for cell in failed_cells(report)}
    assert words == "--set network_interface=cable"
    assert_all_pass(hosts, *words.split())


def test_mpi_needs_logins_between_all_hosts(hosts):
    assert_all_pass(hosts)
    report, failed = run_preflight(hosts, "--set", "launcher=openmpi")
    assert ("beta", "hosts' logins") in failed, "beta has no key of its own yet"
    apply_fixes(hosts, {"cells": [cell for cell in report["cells"] if cell["host"] == "beta"]})
    assert_all_pass(hosts, "--set", "launcher=openmpi")
    refused = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--set", "launcher=no_ssh")
    assert refused.returncode == 2 and "launcher = no_ssh: its hosts are not reached over ssh" in refused.stderr


def test_a_host_that_hangs_or_is_cut_off(hosts):
    hosts.beta.freeze()
    report, failed = run_preflight(hosts)
    hosts.beta.thaw()
    assert failed == {("beta", "login")}
    (cell,) = failed_cells(report)
    assert cell["fix"] == f"ssh -v -F {hosts.alpha.disk / FOLDER / 'ssh_config'} beta true"
    states = {(cell["host"], cell["check"]): cell["state"] for cell in report["cells"]}
    assert states["beta", "data"] == "unknown"
    # The preflight's own limits end it: asking a host for its facts may take 40 s, the command above 120 s.
    assert report["seconds"] < 60
    hosts.beta.link(up=False)
    report, failed = run_preflight(hosts)
    hosts.beta.link(up=True)
    assert ("beta", "port") in failed and report["seconds"] < 60
    assert_all_pass(hosts)


def test_a_shared_folder_is_recognized(tmp_path):
    with two_hosts(tmp_path / "shared", shared=True) as made:
        trusting(made)
        config = made.alpha.path(made.alpha.disk / "run.yaml")
        config.write_text(f"hostfile: {FOLDER}/hostfile\noutput_dir: runs/first\n")
        report, failed = run_preflight(made)
        assert not failed
        shown = texts(report)
        assert shown["alpha", "output_dir"] == "this host's"
        assert shown["beta", "output_dir"] == "shared with this host"


def test_this_machine_alone(tmp_path):
    report = examine_hosts(Config(output_dir=str(tmp_path / "run"), num_processes=1))
    assert report.ok, report.to_text()
    assert report.hosts == ["localhost"]
    assert "all checks passed, 1 host," in report.to_text()
    report = examine_hosts(Config(output_dir=str(tmp_path), num_processes=999), collective=False)
    coloured = report.to_text(colour=True)
    assert "\x1b[31m✗" in coloured and "999 slots" in coloured and "1 failed" in coloured


def test_more_files_than_a_command_line_holds(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "first.jsonl").write_text("{}\n")
    for number in range(1500):
        (folder / f"{'a long name ' * 8}{number}.jsonl").touch()
    config = Config(output_dir=str(tmp_path / "run"), num_processes=1, train_data_file=f"{folder}/*.jsonl")
    report = examine_hosts(config, collective=False)
    assert report.ok and report.cell("localhost", "data").text == "the same", report.to_text()


def test_a_file_that_cannot_be_read(tmp_path):
    # This file of the kernel can be opened, but reading it is an error.
    config = Config(output_dir=str(tmp_path / "run"), num_processes=1, train_data_file="/proc/self/mem")
    (cell,) = examine_hosts(config, collective=False).bad
    assert cell.check == "data" and "can't be read" in cell.text
