"""Weights gathered ahead under ZeRO-3, read from DeepSpeed's own trace of real trainings."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from training_runs import config_of, losses

from hynb.launch import Run
from hynb.plan import limits, memory, zero
from hynb.runs import model_config, workload

# As partitioned_param_coordinator.py prints it when a module begins: the module, its tensors, and those under way.
MODULE = re.compile(r"^\d+: M\d+\((\w+)\) P\[([\d, ]*)\] .*'inflight': \[([\d, ]*)\]")


def experts_under_way(run: Run) -> list[bool]:
    """For each time that a layer's experts compute: whether those of another layer are being gathered meanwhile."""
    log = next(run.dir.log.glob("*_rank0.log")).read_text()
    modules = [
        (match[1], set(filter(None, match[2].split(", "))), set(filter(None, match[3].split(", "))))
        for match in map(MODULE.match, log.splitlines())
        if match
    ]
    experts = set().union(*(tensors for name, tensors, _ in modules if name.endswith("Experts")))
    assert experts, "the trace has experts"
    return [
        bool(under_way & experts - tensors)
        for (name, tensors, _), (_, _, under_way) in itertools.pairwise(modules)
        if name.endswith("Experts")
    ]


@pytest.fixture(scope="module")
def trained(files, ranks, tmp_path_factory):
    """Runs of the same training with limits of Hunyuan-Large's size, scaled to a small model, and with the preset."""
    folder = tmp_path_factory.mktemp("prefetch")

    def train(name: str, deepspeed: str) -> Run:
        config = config_of(files, "hunyuan", folder / name, deepspeed=deepspeed, max_steps=4)
        return ranks.train(config, before="training_runs:trace_gathering")

    def file(name: str, max_live: float, prefetch: float) -> str:
        ds_config = zero.build("ds_zero3_no_offload")
        ds_config["zero_optimization"] |= {
            "stage3_max_live_parameters": int(max_live),
            "stage3_prefetch_bucket_size": int(prefetch),
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 100,
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(ds_config))
        return str(path)

    count = memory.count_parameters(json.loads((files["hunyuan"] / "config.json").read_text()))
    layer, tensor = count.layers[0].total, max(count.matrices)
    # 1e9 and 0.9 * hidden_size ** 2, of 5.6e9 parameters of a layer's experts.
    of_experts = count.layers[0].experts / 5.6e9
    return {
        "before": train("before", file("before", 1e9 * of_experts, 0.9 * 6400**2 * of_experts)),
        "two_layers": train("two_layers", file("two_layers", 2 * layer, layer)),
        "no_more": train("no_more", file("no_more", 2 * layer - tensor, layer)),
        "preset": train("preset", "ds_zero3_no_offload"),
    }


# Four layers forward and backward, and the last backward has no layer before it. DeepSpeed knows the order from its
# second step on.
UNDER_WAY = {
    "before": [False] * 8,
    "two_layers": [True] * 7 + [False],
    "no_more": [True, True, True, False] * 2,
    # Everything stays gathered until the backward pass, because the whole model is smaller than the limit.
    "preset": [True, True, True] + [False] * 5,
}


@pytest.mark.parametrize("name", UNDER_WAY)
def test_the_next_layers_experts_are_gathered_while_one_layer_computes(trained, name):
    first, *others = (experts_under_way(trained[name])[start : start + 8] for start in range(0, 32, 8))
    assert first == [False] * 8 and others == [UNDER_WAY[name]] * 3
    assert losses(trained[name]) == losses(trained["before"]), "only the time of gathering differs"


def test_a_run_uses_the_derived_limits_and_says_why(trained):
    run = trained["preset"]
    used = json.loads(run.dir.ds_config.read_text())["zero_optimization"]
    config = config_of({"hunyuan": None, "data": None}, "hunyuan", run.output_dir)
    base = run.reader.manifest()["config"]["model_name_or_path"]
    config = config.replace(model_name_or_path=base)
    expected = limits.limits_of(
        model_config(config), workload(config, [2]), preset="ds_zero3_no_offload", gpu_bytes=None
    )
    assert used["stage3_max_live_parameters"] == expected.max_live == 10**9
    assert used["stage3_prefetch_bucket_size"] == expected.prefetch
    assert used["reduce_bucket_size"] == expected.reduced
    (note,) = (text for text in run.reader.manifest()["notes"] if "stage3_max_live_parameters" in text)
    assert expected.reason in note
    assert "stage3_max_live" not in str(trained["before"].reader.manifest()["notes"]), "a file is used as it is"
