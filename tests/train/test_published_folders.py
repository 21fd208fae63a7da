"""From a folder as models are published: a full checkpoint and a merged LoRA have what the base has, key by key."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapters import load_tensors, make_adapter, merge_with_peft
from safetensors import safe_open
from tiny import PUBLISHED, published_model
from training_runs import config_of, losses
from transformers import AutoModelForCausalLM

from hynb.merge import merge_lora, verify_merge
from hynb.merge.forward_check import first_layers_pass

# As upstream's ds_zero3_offload.json for Hy3 has it: DeepSpeed's own checkpoints would have no file of the weights.
WITHOUT_WEIGHTS = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
GATHERED = "stage3_gather_16bit_weights_on_model_save: true is used"
# Modules of several families; hy_v3 stores its shared experts under another name than transformers gives them.
TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return {name: published_model(tmp_path_factory.mktemp("published") / name, name) for name in PUBLISHED}


def listing(folder):
    """Shape and dtype of every tensor of a folder, by its key, and the file that its index names for it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"] if index else {}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  safe_open has no iterator
                tensor = shard.get_slice(key)
                assert key not in found and weight_map[key] == path.name
                found[key] = (tensor.get_shape(), tensor.get_dtype())
    assert weight_map.keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in load_tensors(folder).values())
    return found


def assert_same_but_for_values(base, result):
    if (result / "model.safetensors").exists():
        weights = load_tensors(result)
        assert {key: (weight.shape, weight.dtype) for key, weight in weights.items()} == {
            key: (weight.shape, weight.dtype) for key, weight in load_tensors(base).items()
        }
    else:
        assert listing(result) == listing(base)
    assert json.loads((result / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    for path in base.glob("*.py"):
        assert (result / path.name).read_bytes() == path.read_bytes()


def changed(base, result):
    before, after = load_tensors(base), load_tensors(result)
    return {key for key, weight in after.items() if not torch.equal(weight, before[key])}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_checkpoint(name, published, files, ranks, tmp_path):
    base = published[name]
    (tmp_path / "ds.json").write_text(json.dumps(WITHOUT_WEIGHTS))
    values = {"deepspeed": str(tmp_path / "ds.json"), "bf16": True, "max_steps": 2, "save_steps": 2}
    run = ranks.train(config_of(files | published, name, tmp_path / "run", **values))
    result = run.checkpoints()[-1]
    assert_same_but_for_values(base, result)
    assert all(loss > 0 for loss in losses(run).values())
    moved = changed(base, result)
    assert {"model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight"} <= moved
    assert not any(".layers.4." in key or key.endswith("expert_bias") for key in moved)
    manifest = run.reader.manifest()
    assert any(GATHERED in note for note in manifest["notes"])
    assert manifest["ds_config"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    mtp = [key for key in load_tensors(base) if ".layers.4." in key]
    if mtp:
        assert sorted(manifest["copied_from_base"]["tensors"]) == sorted(mtp)
        assert any(f"{len(mtp)} tensors of MTP layers" in note for note in manifest["notes"])
    assert bool(mtp) == ("copied_from_base" in manifest) == (name == "hy_v3")
    _, info = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_a_resumed_run_has_the_mtp_layers_from_its_checkpoint(published, files, ranks, tmp_path):
    """With only the newest checkpoint kept, the one that the run was resumed from stays as long as it is needed."""
    base = shutil.copytree(published["hy_v3"], tmp_path / "base")
    values = {
        "bf16": True,
        "max_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "train_attention_params_only": True,
    }
    settings = files | {"hy_v3": base}
    run = ranks.train(config_of(settings, "hy_v3", tmp_path / "run", **values))
    shutil.rmtree(base)
    values |= {"max_steps": 3, "resume_from_checkpoint": "last", "model_name_or_path": None}
    values |= {"allow_changed": ["max_steps"]}
    run = ranks.train(config_of(settings, "hy_v3", tmp_path / "run", **values))
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-3"]
    assert_same_but_for_values(published["hy_v3"], run.checkpoints()[-1])
    # Untrained weights are the base's bit for bit, the float32 routers among them.
    moved = changed(published["hy_v3"], run.checkpoints()[-1])
    assert moved and all(".self_attn." in key and ".layers.4." not in key for key in moved)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_merged_adapter(name, published, tmp_path):
    base = published[name]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=TARGETS)
    made = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "merged")
    assert made.mtp_tensors == sum(".layers.4." in key for key in load_tensors(base))
    assert (made.mtp_tensors > 0) == (name == "hy_v3")
    assert first_layers_pass(tmp_path / "merged") == "forward pass: the first 2 layers load and give finite logits"
    assert_same_but_for_values(base, tmp_path / "merged")
    verify_merge(tmp_path / "merged")
    moved = changed(base, tmp_path / "merged")
    assert not any(".layers.4." in key or key.endswith("expert_bias") for key in moved)
    assert any("shared_mlp" in key for key in moved) == (name in ("hunyuan", "hunyuan-a13b", "hy_v3"))
    expected, merged = merge_with_peft(base, [adapter], tmp_path / "peft"), load_tensors(tmp_path / "merged")
    before = load_tensors(base)
    assert moved == {key for key, weight in expected.items() if not torch.equal(weight, before[key].float())}
    for key, weight in expected.items():
        torch.testing.assert_close(merged[key].float(), weight, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("save_dtype", ["bf16", "fp16"])
def test_what_chooses_experts_stays_float32_in_another_dtype(published, tmp_path, save_dtype):
    base = published["hy_v3"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_lora(
        base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "merged", save_dtype=save_dtype
    )
    before, after = load_tensors(base), load_tensors(tmp_path / "merged")
    kept = {key for key, weight in before.items() if weight.dtype == torch.float32}
    assert sum(key.endswith("expert_bias") for key in kept) == 4
    assert all(torch.equal(before[key], after[key]) for key in kept)


def test_an_adapter_trained_on_an_older_a13b_folder_merges(published, files, ranks, tmp_path):
    base = published["hunyuan-a13b"]
    values = {"use_lora": True, "lora_on_experts": True, "lora_dropout": 0.0, "bf16": True, "max_steps": 2}
    run = ranks.train(config_of(files | published, "hunyuan-a13b", tmp_path / "run", **values))
    merge_lora(base_model_path=base, adapter_model_path=run.checkpoints()[-1], output_path=tmp_path / "merged")
    verify_merge(tmp_path / "merged")
    assert_same_but_for_values(base, tmp_path / "merged")
    assert any(".experts.3." in key for key in changed(base, tmp_path / "merged"))


@pytest.mark.parametrize("values", [{"make_moe_param_leaf_module": True}, {"use_lora": True}], ids=["full", "LoRA"])
def test_each_header_of_the_base_is_read_once_by_each_rank(values, published, files, ranks, tmp_path):
    """Loading, routers that stay float32, MTP layers and the plan of checkpoints all need them."""
    values |= {"max_steps": 1, "save_steps": 1, "bf16": True, "deepspeed": "ds_zero3_no_offload"}
    run = ranks.train(
        config_of({"hy_v3": published["hy_v3"], "data": files["data"]}, "hy_v3", tmp_path / "run", **values),
        before="training_runs:print_headers_read",
    )
    names = sorted(path.name for path in published["hy_v3"].glob("*.safetensors"))
    assert len(names) == 2
    for path in run.dir.rank_logs():
        read = [line.removeprefix("header of ") for line in path.read_text().splitlines() if "header of" in line]
        assert sorted(read) == names, path.name
