"""Which ops DeepSpeed compiles under each preset and under users' files, and what a host needs for them."""

from __future__ import annotations

import pytest

from hynb.plan import ops, zero

ALL = dict.fromkeys(("compiler", "ninja", "python", "cuda", "libaio"), True)


@pytest.mark.parametrize("name", zero.PRESETS)
def test_only_an_optimizer_in_host_memory_is_compiled(name):
    on_gpus = ops.compiled_ops(zero.for_machine(zero.build(name), on_cpu=False), on_cpu=False)
    assert list(on_gpus) == (["cpu_adam"] if zero.PRESETS[name].offload_optimizer else [])
    assert ops.compiled_ops(zero.for_machine(zero.build(name), on_cpu=True), on_cpu=True) == {}
    # cpu_adam has no CUDA code: neither the toolkit nor libaio is needed.
    assert ops.missing_tools(list(on_gpus), ALL | {"cuda": False, "libaio": False}, on_cpu=False) == []


def zero3(**section) -> dict:
    return {"zero_optimization": {"stage": 3, **section}}


ADAM = {"optimizer": {"type": "AdamW", "params": {}}}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
ON_NVME = zero3(offload_param={"device": "nvme", "nvme_path": "/x"})
IN_HOST_MEMORY = zero3(offload_optimizer={"device": "cpu"})


@pytest.mark.parametrize(
    ("ds_config", "compiled", "without"),
    [
        (zero3(), [], []),
        (zero3(offload_param={"device": "cpu"}), [], []),
        (zero3(offload_optimizer={"device": "none"}), [], []),
        (IN_HOST_MEMORY, ["cpu_adam"], ["g++", "ninja-build", "python3-dev"]),
        (IN_HOST_MEMORY | {"zero_force_ds_cpu_optimizer": False}, [], []),
        (IN_HOST_MEMORY | ADAM | {"zero_force_ds_cpu_optimizer": False}, ["cpu_adam"], ["g++"]),
        (IN_HOST_MEMORY | TORCH_ADAM, [], []),
        (ADAM, ["fused_adam"], ["g++", "nvidia-cuda-toolkit"]),
        (TORCH_ADAM, [], []),
        ({"optimizer": {"type": "Lion"}}, ["fused_lion"], ["nvidia-cuda-toolkit"]),
        ({"optimizer": {"type": "SGD"}}, [], []),
        (ON_NVME, ["pin_memory", "async_io"], ["nvidia-cuda-toolkit", "libaio-dev"]),
        ({"zero_optimization": "all", "optimizer": []}, [], []),
    ],
)
def test_what_a_file_makes_deepspeed_compile(ds_config, compiled, without):
    assert list(ops.compiled_ops(ds_config, on_cpu=False)) == compiled
    assert ops.compile_problem(ds_config, ALL, on_cpu=False) == ("", "")
    problem, fix = ops.compile_problem(ds_config, {}, on_cpu=False)
    assert all(name in problem for name in compiled) and bool(problem) is bool(compiled)
    assert set(without) <= set(fix.split())


def test_a_problem_names_op_reason_tool_and_package():
    problem, fix = ops.compile_problem(zero.build("ds_zero3_offload"), ALL | {"compiler": False}, on_cpu=False)
    assert problem == (
        "DeepSpeed compiles cpu_adam (optimizer.type = AdamW, offloaded), and this machine has no C++ compiler (c++)"
    )
    assert fix == "apt-get install g++"


@pytest.mark.parametrize("name", zero.PRESETS)
def test_the_presets_that_are_offered_instead_compile_nothing(name):
    for other in ops.without_ops(zero.build(name)):
        assert zero.PRESETS[other].stage == zero.PRESETS[name].stage
        assert ops.compiled_ops(zero.build(other), on_cpu=False) == {}
