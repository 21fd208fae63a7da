"""Four hosts with two ranks each: ZeRO-2 and -3, LoRA and full, stopped, saved, resumed to the last digit.

Supervisor, guards, ssh, pdsh, network and disks are those of a real run. The ranks are forked from one process:
DeepSpeed's launcher takes a minute to start eight of them on two cores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from adapters import load_tensors
from clusters import SECONDS, Cluster, until
from conftest import need
from host_ranks import MASTER_PORT, HostRanks
from hosts import many_hosts, need_two_hosts
from tiny import tiny_data, tiny_model

from hynb.runs import RunDir, RunReader

HOSTS, SLOTS, STEPS, STOPPED = 4, 2, 5, 4
CASES = {
    "ZeRO-2, full": {"deepspeed": "ds_zero2_no_offload"},
    "ZeRO-2, LoRA": {"deepspeed": "ds_zero2_no_offload", "use_lora": True},
    "ZeRO-3, full": {"deepspeed": "ds_zero3_no_offload"},
    "ZeRO-3, LoRA": {"deepspeed": "ds_zero3_no_offload", "use_lora": True},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[HostRanks]:
    need_two_hosts()
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    made = HostRanks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(ranks, tmp_path_factory) -> Iterator[Cluster]:
    files = tmp_path_factory.mktemp("files")
    tiny_model(files / "model", "hunyuan_v1_moe")
    tiny_data(files / "train.jsonl")
    with many_hosts(tmp_path_factory.mktemp("hosts"), HOSTS, shared=False) as hosts:
        made = Cluster(hosts)
        for host in hosts:
            shutil.copytree(files, host.path(host.disk), dirs_exist_ok=True)
        made.on_all("cluster/slots", "".join(f"{host.name} slots={SLOTS}\n" for host in hosts))
        ranks.until_ready()
        yield made


def train(cluster: Cluster, ranks: HostRanks, name: str, before: str = "", **values) -> RunDir:
    """A run that has ended well."""
    ranks.before(before)
    given = {
        "hostfile": str(cluster.first.disk / "cluster" / "slots"),
        "master_port": MASTER_PORT,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_seq_length": 256,
        # Nothing is lost here, however busy the machine is.
        "silence_timeout_seconds": SECONDS,
    }
    process = cluster.launch(name, *ranks.command, **(given | values))
    run_dir = cluster.run_dir(name)
    until(
        lambda: process.poll() is not None,
        lambda: (RunReader(run_dir.path).status(), shown_output(cluster, ranks, name)),
    )
    assert run_dir.exit.exists(), shown_output(cluster, ranks, name)
    end = json.loads(run_dir.exit.read_text())
    assert end["state"] in ("finished", "stopped"), (end["reason"], shown_output(cluster, ranks, name))
    until(lambda: not cluster.left(name), lambda: cluster.left(name))
    return run_dir


def shown_output(cluster: Cluster, ranks: HostRanks, name: str) -> str:
    launcher = cluster.run_dir(name).launcher_log
    return (
        f"{cluster.output(name).read_text()}\n{ranks.output()}\n{launcher.read_text() if launcher.exists() else ''}"
    )


def losses(run_dir: RunDir) -> dict[int, float]:
    events = RunReader(run_dir.path).events()
    return {event["global_step"]: event["loss"] for event in events if event["kind"] == "log"}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_and_resumed_run_of_eight_ranks_equals_an_undisturbed_one(name, cluster, ranks):
    whole = train(cluster, ranks, f"whole {name}", **CASES[name])
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    manifest = json.loads(whole.manifest.read_text())
    assert manifest["hosts"] == [host.name for host in cluster.hosts] and manifest["world_size"] == HOSTS * SLOTS

    run_dir = train(cluster, ranks, f"stopped {name}", "training_runs:stop_after_step_3", **CASES[name])
    assert RunReader(run_dir.path).status().state == "stopped"
    assert [path.name for path in run_dir.checkpoints()] == [f"checkpoint-{STOPPED}"]
    assert list(losses(run_dir)) == list(range(1, STOPPED + 1))
    for host in cluster.hosts:
        # Each host has the parts of its own ranks, and what rank 0 wrote.
        checkpoint = host.path(cluster.first.disk / f"stopped {name}" / f"checkpoint-{STOPPED}")
        assert len(list(checkpoint.glob("global_step*/*optim_states.pt"))) == SLOTS, host.name
        assert (checkpoint / "trainer_state.json").is_file(), host.name
    before = load_tensors(run_dir.checkpoint(STOPPED))

    train(cluster, ranks, f"stopped {name}", resume_from_checkpoint="last", **CASES[name])
    assert losses(run_dir) == losses(whole)
    one, other = load_tensors(whole.checkpoint(STEPS)), load_tensors(run_dir.checkpoint(STEPS))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(other[key], before[key]) for key in before)
    for host in cluster.hosts:
        theirs = load_tensors(host.path(cluster.first.disk / f"stopped {name}" / f"checkpoint-{STEPS}"))
        assert theirs.keys() == one.keys() and all(torch.equal(theirs[key], one[key]) for key in one), host.name
