"""Preflight over two hosts with real sshd: green, then one fault after the other, each mended by what is printed."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import CHECKOUT, PASSWORD, PORT, two_hosts
from tiny import tiny_data, tiny_model

from hynb.cluster import Host, Ssh, host_facts, hostfile
from hynb.config import Config
from hynb.preflight import text
from hynb.preflight.checks import compare
from hynb.preflight.examine import preflight
from hynb.preflight.report import Known, Target

FOLDER = "cluster"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts that trust each other by what `hynb hosts` does; model and data are on alpha alone."""
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


def look(hosts, *words, collective=False) -> tuple[dict, set[tuple[str, str]]]:
    """The report, and host and check of each red cell."""
    more = [] if collective else ["--no_collective"]
    done = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--json", *more, *words)
    assert done.stdout.startswith("{"), done.stderr
    report = json.loads(done.stdout)
    assert (done.returncode == 0) is report["ok"] and done.returncode in (0, 2)
    return report, {(cell["host"], cell["check"]) for cell in report["cells"] if cell["state"] == "bad"}


def mend(hosts, report) -> None:
    """Types each red cell's command where the report says."""
    for cell in report["cells"]:
        if cell["state"] != "bad":
            continue
        host = hosts.beta if cell["mend_on"] == "beta" else hosts.alpha
        command = cell["mend"].replace("hynb hosts", f"{sys.executable} -m hynb.cli hosts")
        answers = [("password of", PASSWORD), ("Keep them", "y")]
        asked = [item for item in answers if ("install-key" in command) == ("password" in item[0])]
        code, seen = host.typed(["sh", "-c", command], asked)
        assert code == 0, (cell, seen)
        if "sshd -p" in command:
            # It goes into the background before it listens.
            host.until_listens(int(command.split()[-1]))


def green(hosts, *words) -> None:
    report, red = look(hosts, *words)
    assert not red, [cell for cell in report["cells"] if cell["state"] == "bad"]


def test_what_is_missing_is_copied_and_then_all_is_green(hosts):
    # Settings of one's own are files that every rank reads, too.
    (hosts.alpha.path(hosts.alpha.disk) / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    report, _ = look(hosts, "--set", "deepspeed=zero.json")
    (text_of_data,) = (c["text"] for c in report["cells"] if (c["host"], c["check"]) == ("beta", "data"))
    assert "/train.jsonl" in text_of_data and "/zero.json" in text_of_data
    report, red = look(hosts)
    assert red == {("beta", "model"), ("beta", "data")}
    assert all(cell["mend"].startswith("rsync") for cell in report["cells"] if cell["state"] == "bad")
    done = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix")
    assert done.returncode == 2 and "beta, model" in done.stdout and "beta, data" not in done.stdout
    report, red = look(hosts, "--fix_model", collective=True)
    assert not red
    copied = hosts.beta.path(hosts.beta.disk) / "model" / "model.safetensors"
    assert copied.read_bytes() == (hosts.alpha.path(hosts.alpha.disk) / "model" / "model.safetensors").read_bytes()
    (pair,) = report["collective"]["pairs"]
    assert report["collective"]["right"] and report["collective"]["ranks"] == 2
    assert pair["nodes"] == [0, 1] and pair["bytes_per_second"] > 1e6 and 0 < pair["latency_seconds"] < 1
    texts = {(cell["host"], cell["check"]): cell["text"] for cell in report["cells"]}
    assert texts["beta", "output_dir"] == "a folder of its own"
    assert texts["beta", "network"] == "cable 10.77.0.2" and texts["alpha", "network"] == "cable 10.77.0.1"
    assert texts["beta", "master port"] == "reached"
    kept = json.loads(hosts.alpha.path(hosts.alpha.disk / FOLDER / "preflight.json").read_text())
    assert kept["cells"] == report["cells"]
    shown = hosts.alpha.hynb("preflight", "--config", "run.yaml", check=True).stdout
    assert "alpha – beta: " in shown and "µs one way" in shown and "all is well, 2 hosts" in shown
    assert not list(hosts.alpha.path(hosts.alpha.disk).rglob(".hynb-*")), "nothing is left behind"
    # What a user sets for the ranks of a run holds for these, on every host.
    variables = hosts.alpha.path(hosts.alpha.disk / ".deepspeed_env")
    variables.write_text("TORCH_DISTRIBUTED_DEBUG=NONSENSE\n")
    report, red = look(hosts, collective=True)
    variables.unlink()
    assert red == {("alpha", "all-reduce"), ("beta", "all-reduce")}
    assert "TORCH_DISTRIBUTED_DEBUG" in next(cell for cell in report["cells"] if cell["state"] == "bad")["text"]
    # Without the program `ip`, as in many containers.
    program = Path(shutil.which("ip")).resolve()
    hosts.beta.run(["mount", "--bind", "/etc/hostname", program])
    report, red = look(hosts)
    hosts.beta.run(["umount", program])
    texts = {(cell["host"], cell["check"]): cell["text"] for cell in report["cells"]}
    assert not red and texts["beta", "network"] == "cable 10.77.0.2"
    listed = hosts.alpha.path(hosts.alpha.disk / FOLDER / "hostfile")
    kept = listed.read_text()
    listed.write_text("localhost slots=1\n" + kept)
    report, red = look(hosts)
    listed.write_text(kept)
    assert ("alpha", "name") in red
    texts = {(cell["host"], cell["check"]): cell["text"] for cell in report["cells"]}
    assert texts["alpha", "name"] == "is localhost by another name (this machine): list it once"


def test_what_is_green_trains_over_both_hosts(hosts):
    """LoRA, from nothing but what `hynb hosts setup` and `hynb preflight --fix` have done."""
    green(hosts)
    values = ["max_steps=3", "save_steps=3", "lora_rank=4", "max_seq_length=256", "deepspeed=ds_zero3_no_offload"]
    words = [word for value in values for word in ("--set", value)]
    done = hosts.alpha.hynb("launch", "--config", "run.yaml", "--follow", *words, timeout=150)
    assert done.returncode == 0 and "step 3/3  loss" in done.stdout, done.stdout + done.stderr
    for host in hosts:
        saved = host.path(host.disk) / "runs" / "first" / "checkpoint-3"
        assert (saved / "adapter_model.safetensors").is_file(), host.name
    shutil.rmtree(hosts.beta.path(hosts.beta.disk) / "runs")


def test_the_way_to_a_host(hosts):
    """sshd down, another port, the key gone, the host key changed: each is mended by its own command."""
    alpha, beta = hosts
    beta.stop_sshd()
    report, red = look(hosts)
    assert red == {("beta", "port")}
    mend(hosts, report)
    green(hosts)

    beta.path(beta.home / ".ssh" / "authorized_keys").unlink()
    report, red = look(hosts)
    assert red == {("beta", "login")}
    mend(hosts, report)
    green(hosts)

    beta.stop_sshd()
    beta.new_host_key()
    beta.start_sshd()
    report, red = look(hosts)
    assert red == {("beta", "host key")}
    mend(hosts, report)
    green(hosts)

    config = alpha.path(alpha.disk / FOLDER / "ssh_config")
    config.write_text(config.read_text().replace(str(PORT), "36006"))
    report, red = look(hosts)
    assert red == {("alpha", "port"), ("beta", "port")}, "pdsh logs in on the launching host too"
    mend(hosts, report)
    # On another port it is another entry of known_hosts.
    report, red = look(hosts)
    assert red == {("alpha", "host key"), ("beta", "host key")}
    mend(hosts, report)
    green(hosts)
    config.write_text(config.read_text().replace("36006", str(PORT)))

    alpha.path(alpha.home / ".ssh" / "authorized_keys").unlink()
    assert look(hosts)[1] == {("alpha", "login")}
    green(hosts, "--set", "launcher=openmpi", "--set", "include=alpha")
    mend(hosts, look(hosts)[0])
    green(hosts)


def test_files_that_differ(hosts):
    alpha, beta = hosts
    shutil.rmtree(beta.path(beta.disk / "model"))
    data = beta.path(beta.disk / "train.jsonl")
    data.write_text(data.read_text().replace("e", "E", 1))
    report, red = look(hosts)
    assert red == {("beta", "model"), ("beta", "data")}
    mend(hosts, report)
    green(hosts)
    config = beta.path(beta.disk / "model" / "config.json")
    config.write_text(config.read_text() + " ")
    assert look(hosts)[1] == {("beta", "model")}
    mend(hosts, look(hosts)[0])
    green(hosts)
    # A host that has neither the code nor an environment: the first is copied, the second is made there.
    beta.run(["mount", "-t", "tmpfs", "tmpfs", CHECKOUT])
    try:
        report, red = look(hosts)
        assert ("beta", "code") in red
        alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix")
        assert not beta.run(
            ["cmp", CHECKOUT / "hynb" / "data.py", "-"], input=(CHECKOUT / "hynb" / "data.py").read_text()
        ).stdout
        if Path(sys.executable).is_relative_to(CHECKOUT):
            report, red = look(hosts)
            assert red == {("beta", "python")}
            (cell,) = (cell for cell in report["cells"] if cell["state"] == "bad")
            beta.run(["sh", "-c", cell["mend"].replace("make", "make --dry-run")])
    finally:
        beta.run(["umount", CHECKOUT])
    # A copy of the code of its own, in place of the checkout's.
    own = beta.root / "code"
    shutil.copytree(CHECKOUT / "hynb", own, ignore=shutil.ignore_patterns("__pycache__"))
    (own / "data.py").write_text("# another version\n")
    beta.run(["mount", "--bind", own, CHECKOUT / "hynb"])
    try:
        report, red = look(hosts)
        assert red == {("beta", "code")}
        done = alpha.hynb("preflight", "--config", "run.yaml", "--no_collective", "--fix", check=True)
        assert "all is well" in done.stdout and "rsync" in done.stderr
        assert (own / "data.py").read_bytes() == (CHECKOUT / "hynb" / "data.py").read_bytes()
    finally:
        beta.run(["umount", CHECKOUT / "hynb"])


def test_software_clock_slots_disk_port_and_interface(hosts):
    alpha, beta = hosts
    metadata = next(Path(path) for path in sys.path for path in Path(path).glob("peft-*.dist-info/METADATA"))
    version = next(line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Version:"))
    other = beta.root / "METADATA"
    other.write_text(metadata.read_text().replace(f"Version: {version}", "Version: 0.1.0"))
    beta.run(["mount", "--bind", other, metadata])
    report, red = look(hosts)
    beta.run(["umount", metadata])
    assert red == {("beta", "versions")}
    (cell,) = (cell for cell in report["cells"] if cell["state"] == "bad")
    # Not typed: the two hosts share this checkout's environment, which pip would change.
    assert cell["mend"] == shlex.join([sys.executable, "-m", "pip", "install", f"peft=={version}"])
    assert cell["text"] == f"peft 0.1.0, and {version} here" and cell["mend_on"] == "beta"

    beta.stop_sshd()
    beta.start_sshd(clock_shift_seconds=-90)
    report, red = look(hosts)
    assert red == {("beta", "clock")}
    assert next(cell for cell in report["cells"] if cell["state"] == "bad")["text"].startswith("-")
    beta.stop_sshd()
    beta.start_sshd()

    listed = alpha.path(alpha.disk / FOLDER / "hostfile")
    listed.write_text("alpha slots=1\nbeta slots=512\n")
    report, red = look(hosts)
    assert red == {("beta", "GPUs")}
    mend(hosts, report)
    assert listed.read_text().splitlines()[1] != "beta slots=512"
    green(hosts)
    listed.write_text("alpha slots=1\nbeta slots=1\n")

    (beta.path(beta.disk) / "runs").mkdir(exist_ok=True)
    beta.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", beta.disk / "runs"])
    report, red = look(hosts)
    assert red == {("beta", "disk")}
    mend(hosts, report)
    beta.run(["umount", beta.disk / "runs"])
    green(hosts)

    listening = (
        "import socket, time; s = socket.create_server(('10.77.0.1', 29555)); print(1, flush=True); time.sleep(60)"
    )
    taken = alpha.popen([sys.executable, "-c", listening], stdout=subprocess.PIPE)
    taken.stdout.readline()
    report, red = look(hosts, "--set", "master_port=29555")
    assert red == {("alpha", "master port")}
    (cell,) = (cell for cell in report["cells"] if cell["state"] == "bad")
    assert "29555 is taken: process" in cell["text"]
    green(hosts, *cell["mend"].split())
    taken.kill()
    taken.wait()

    report, red = look(hosts, "--set", "network_interface=eth9")
    assert red == {("alpha", "network"), ("beta", "network")}
    (words,) = {cell["mend"] for cell in report["cells"] if cell["state"] == "bad"}
    assert words == "--set network_interface=cable"
    green(hosts, *words.split())


def test_mpi_needs_logins_between_all_hosts(hosts):
    green(hosts)
    report, red = look(hosts, "--set", "launcher=openmpi")
    assert ("beta", "hosts' logins") in red, "beta has no key of its own yet"
    mend(hosts, {"cells": [cell for cell in report["cells"] if cell["host"] == "beta"]})
    green(hosts, "--set", "launcher=openmpi")
    refused = hosts.alpha.hynb("preflight", "--config", "run.yaml", "--set", "launcher=no_ssh")
    assert refused.returncode == 2 and "launcher = no_ssh: its hosts are not reached over ssh" in refused.stderr


def test_a_host_that_hangs_or_is_cut_off_ends_in_time(hosts):
    began = time.monotonic()
    hosts.beta.freeze()
    report, red = look(hosts)
    hosts.beta.thaw()
    assert red == {("beta", "login")} and time.monotonic() - began < 40
    (cell,) = (cell for cell in report["cells"] if cell["state"] == "bad")
    assert cell["mend"] == f"ssh -v -F {hosts.alpha.disk / FOLDER / 'ssh_config'} beta true"
    assert (
        next(cell for cell in report["cells"] if cell["host"] == "beta" and cell["check"] == "data")["state"]
        == "unknown"
    )
    began = time.monotonic()
    hosts.beta.link(up=False)
    report, red = look(hosts)
    hosts.beta.link(up=True)
    assert ("beta", "port") in red and time.monotonic() - began < 40
    green(hosts)


def test_a_shared_folder_is_seen(tmp_path):
    with two_hosts(tmp_path / "shared", shared=True) as made:
        from hosts import trusting

        trusting(made)
        config = made.alpha.path(made.alpha.disk / "run.yaml")
        config.write_text(f"hostfile: {FOLDER}/hostfile\noutput_dir: runs/first\n")
        report, red = look(made)
        assert not red
        texts = {cell["host"]: cell["text"] for cell in report["cells"] if cell["check"] == "output_dir"}
        assert texts == {"alpha": "this host's", "beta": "shared with this host"}


def test_this_machine_alone(tmp_path):
    report = preflight(Config(output_dir=str(tmp_path / "run"), num_processes=1))
    assert report.ok, text(report)
    assert report.hosts == ["localhost"] and report.seconds < 30
    assert "all is well, 1 host," in text(report)
    coloured = text(preflight(Config(output_dir=str(tmp_path), num_processes=999), collective=False), colour=True)
    assert "\x1b[31m✗" in coloured and "999 slots" in coloured and "1 red" in coloured


def test_identities(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 40_000)
    whole = host_facts.file_identity(path)
    monkeypatch.setattr(host_facts, "WHOLE_BYTES", 1000)
    sampled = host_facts.file_identity(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert sampled != whole and host_facts.file_identity(path) != sampled
    assert host_facts.file_identity(tmp_path / "none") is None and host_facts.folder_hash(tmp_path) is None


def test_what_can_not_be_read_is_said_and_many_files_are_asked_for(tmp_path):
    """A file that gives an error is no fault of Python's; names of files may be longer than a command line."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "first.jsonl").write_text("{}\n")
    for number in range(1500):
        (folder / f"{'a long name ' * 8}{number}.jsonl").touch()
    config = Config(output_dir=str(tmp_path / "run"), num_processes=1, train_data_file=f"{folder}/*.jsonl")
    report = preflight(config, collective=False)
    assert report.ok and report.cell("localhost", "data").text == "the same", text(report)
    # A file of the system's that may be opened and gives an error when it is read.
    config = Config(output_dir=str(tmp_path / "run"), num_processes=1, train_data_file="/proc/self/mem")
    report = preflight(config, collective=False)
    (cell,) = report.bad
    assert (cell.check, "can't be read" in cell.text) == ("data", True), text(report)


def test_interfaces_are_the_same_with_and_without_the_program():
    found = host_facts.interfaces_of_kernel()
    assert "127.0.0.1" in found["lo"] and set(found) == set(host_facts.interfaces())


def test_ranks_that_wait_in_vain_are_named():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    request = {"node": 0, "slots": [1, 1], "address": "127.0.0.1", "port": port, "interface": None}
    words = [sys.executable, "-m", "hynb.preflight.collective", json.dumps(request | {"deadline_seconds": 5})]
    done = subprocess.run(words, capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert done.returncode == 1 and "no sum within 5 s" in done.stderr.splitlines()[-1]


def test_a_clock_is_compared_with_the_moment_at_which_it_was_read():
    """A host that hashes for a minute before it answers has no minute more to be wrong by."""
    told = facts("", time=1030.0, taken_seconds=59.0)
    target = Target(host=Host(name="a", slots=1), local=False, address="", port=22, facts=told)
    target.asked, target.answered = 1000.0, 1060.0
    known = Known(config=Config(), targets=[target], reference=told, ssh=Ssh(), port=1, port_taken="", data=[])
    (cell,) = (cell for cell in compare(target, known) if cell.state == "bad")
    assert cell.check == "clock" and cell.text.startswith("-29.0 s off")


@pytest.mark.parametrize("line", ["b    slots=8  # new", "[b]:8,c:8", "c:8, b:8"])
def test_fewer_slots_in_every_form_of_a_hostfile(line, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(f"a slots=8\n{line}\nbb slots=8\n")
    told = facts(ROW.format(0, 0, 97000, "550"))
    target = Target(host=Host(name="b", slots=8), local=False, address="", port=22, facts=told)
    target.asked = target.answered = told["time"]
    known = Known(
        config=Config(hostfile=str(path)), targets=[target], reference=told, ssh=Ssh(), port=1, port_taken="", data=[]
    )
    (cell,) = (cell for cell in compare(target, known) if cell.state == "bad")
    subprocess.run(["sh", "-c", cell.mend], check=True)
    slots = {host.name: host.slots for host in hostfile.read(path)}
    assert slots.pop("b") == 1 and set(slots.values()) == {8}


def test_gpus_that_were_not_chosen_may_be_taken():
    told = facts(ROW.format(0, 0, 100, "550") + ROW.format(1, 1, 97000, "550"))
    target = Target(host=Host(name="a", slots=1, slot_ids=(1,)), local=True, address="", port=22, facts=told)
    target.asked = target.answered = told["time"]
    known = Known(config=Config(), targets=[target], reference=told, ssh=Ssh(), port=1, port_taken="", data=[])
    assert not [cell for cell in compare(target, known) if cell.state == "bad"]


def facts(gpus: str, **changes) -> dict:
    """What a host with GPUs tells, as far as the checks of GPUs look at it."""
    disk = {"total": 10**12, "free": 10**12, "writable": True, "place": "/"}
    told = {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "cuda": {"cuda": "12.8", "nccl": "2.27.3"}}
    told |= {"gpus": gpus, "cuda_visible_devices": None, "cpu_cores": 64, "shm": disk, "output_disk": disk}
    told |= {"memory_bytes": 10**12, "memory_free_bytes": 10**12, "cache_disk": disk, "code": "x", "data": {}}
    told |= {"sees_token": False, "interfaces": {}, "route": {}, "connects": {}, "logins": {}, "time": time.time()}
    told |= {"taken_seconds": 0.0}
    return told | changes


ROW = "{}, GPU-{}, NVIDIA H20, 97871, {}, {}\n"


@pytest.mark.parametrize(
    ("gpus", "changes", "check", "says", "mend"),
    [
        (ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 97000, "550"), {}, "", "", ""),
        (
            ROW.format(0, 0, 97000, "550"),
            {},
            "GPUs",
            "2 slots, and 1 GPUs",
            "[0-9]+/\\1\\2\\31/' hosts",
        ),
        ("", {}, "GPUs", "none, and a has some", "nvidia-smi"),
        (
            ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 50000, "550"),
            {},
            "GPUs",
            "GPU 1: 50 of 103 GB",
            "nvidia-smi",
        ),
        (
            ROW.format(0, 0, 97000, "535") + ROW.format(1, 1, 97000, "535"),
            {},
            *("versions", "driver 535, and 550 here", "apt-get install --only-upgrade 'nvidia-driver-*'"),
        ),
        (
            ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 97000, "550"),
            {"cuda": {"cuda": "12.6", "nccl": "2.27.3"}},
            *("versions", "cuda 12.6, and 12.8 here", "make clean .venv"),
        ),
        (
            ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 97000, "550"),
            {"shm": {"total": 64e6, "free": 64e6, "writable": True, "place": "/"}},
            *("shared memory", "/dev/shm: 64 MB free, 512 MB needed", "mount -o remount,size=8G /dev/shm"),
        ),
    ],
)
def test_gpus_are_compared_by_what_hosts_tell(gpus, changes, check, says, mend):
    good = ROW.format(0, 0, 97000, "550") + ROW.format(1, 1, 97000, "550")
    targets = [
        Target(host=Host(name=name, slots=2), local=name == "a", address="", port=22, facts=told)
        for name, told in (("a", facts(good)), ("b", facts(gpus, **changes)))
    ]
    for target in targets:
        target.asked = target.answered = target.facts["time"]
    config = Config(hostfile="hosts", use_lora=True)
    known = Known(
        config=config, targets=targets, reference=targets[0].facts, ssh=Ssh(), port=1, port_taken="", data=[]
    )
    assert not [cell for cell in compare(targets[0], known) if cell.state == "bad"]
    red = [cell for cell in compare(targets[1], known) if cell.state == "bad"]
    assert [cell.check for cell in red] == ([check] if check else [])
    for cell in red:
        assert says in cell.text and mend in cell.mend
