"""One row over several ranks by DeepSpeed's Ulysses sequence parallelism (arXiv 2309.14509), without the Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from tiny import OF_FAMILY, tiny_model

LENGTHS = (37, 20, 20, 9, 1, 33)


def row(vocab_size: int) -> dict[str, torch.Tensor]:
    """A packed row of 120 tokens, of which the last fifth has no label, so that a rank of four has almost none."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocab_size, (1, sum(LENGTHS)), generator=random)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
    labels[:, 96:] = -100
    starts = torch.tensor((0, *LENGTHS[:-1])).cumsum(0)
    labels[:, starts] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return {"input_ids": ids, "position_ids": positions, "labels": shifted, "shift_labels": shifted}


def train_once(folders: dict[str, str], target: str) -> None:
    """What each rank runs: loss and gradients of its part of the row, summed over the ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AutoModelForCausalLM

    from hynb.hunyuan_large import PACKED_SDPA
    from hynb.train import init_process_group, save_loss_memory

    init_process_group(timedelta(minutes=30))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for number, (family, folder) in enumerate(folders.items()):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED_SDPA, dtype=torch.float32)
        model.train()
        save_loss_memory(model, piece_tokens=16)
        if number == 0:
            # All families have as many heads, and DeepSpeed knows one model per process.
            UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=model,
                core_attn_implementation=PACKED_SDPA,
                sequence_parallel_size=size,
                micro_batch_size=1,
            )
        whole = row(model.config.vocab_size)
        part = {name: value.chunk(size, dim=1)[rank] for name, value in whole.items()}
        count = int((whole["shift_labels"] != -100).sum())
        loss = model(**part, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        gradients = {}
        for name, weight in model.named_parameters():
            gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(gradients[name])
        found[family] = {"loss": total.item(), "gradients": gradients}
    if rank == 0:
        torch.save(found, target)


def serve(folders: dict[str, str], target: str) -> None:
    """Forks the ranks of each run from one process, which has imported the libraries."""
    import deepspeed  # noqa: F401
    import transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense
    import transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe
    import transformers.models.hy_v3.modeling_hy_v3  # noqa: F401

    import hynb.train
    from hynb.cluster import free_port

    assert hynb.train.init_process_group and hynb.train.save_loss_memory
    for size in (1, 2, 4):
        port, pids = free_port(), []
        for rank in range(size):
            if pid := os.fork():
                pids.append(pid)
                continue
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
            code = 1
            try:
                train_once(folders, f"{target}/{size}.pt")
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert not any(codes), codes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ulysses")
    folders = {family: str(tiny_model(folder / family, family)) for family in OF_FAMILY}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__, json.dumps(folders), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return {size: torch.load(folder / f"{size}.pt") for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", OF_FAMILY)
def test_a_row_over_several_ranks_has_the_loss_of_one_rank(results, family, size):
    """Conversations apart, cross-layer K and V, and fewer K and V heads than ranks; gradients as well."""
    expected, found = results[1][family], results[size][family]
    assert abs(found["loss"] - expected["loss"]) < 1e-5
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", OF_FAMILY)
def test_one_rank_has_the_loss_of_transformers_dense_mask(results, tmp_path, family):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    batch = row(model.config.vocab_size)
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss.item()
    assert abs(results[1][family]["loss"] - loss) < 1e-5


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2])
    os._exit(0)
