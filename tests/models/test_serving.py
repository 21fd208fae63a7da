"""What hynb writes has the architectures and tensor names that vLLM's and SGLang's loaders look for."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from adapters import ATTENTION, load_tensors, make_adapter
from training_runs import FAMILIES, config_of

from hynb.cli import main
from hynb.errors import ModelError
from hynb.merge import merge_lora
from hynb.models import serving_text

# Of SGLang's srt/models/hunyuan.py, which loads `gate` from `gate.wg` and joins projections of these names.
HUNYUAN = {
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(f"model.layers.N.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
    *(f"model.layers.N.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.layers.N.self_attn.{name}_layernorm.weight" for name in ("query", "key")),
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"model.layers.N.mlp.{name}.weight" for name in PROJECTIONS}
EXPERTS = {f"model.layers.N.mlp.{part}.{name}.weight" for part in ("experts.N", "shared_mlp") for name in PROJECTIONS}
MOE = EXPERTS | {"model.layers.N.mlp.gate.wg.weight"}
# Of vLLM 0.33.0's model_executor/models/hy_v3.py and SGLang's srt/models/hunyuan_v3.py.
HY_V3 = {name.replace("query_layernorm", "q_norm").replace("key_layernorm", "k_norm") for name in HUNYUAN}
HY_V3 |= DENSE | EXPERTS | {"model.layers.N.mlp.router.gate.weight", "model.layers.N.mlp.expert_bias"}
LOADED = {
    "hunyuan": ("HunYuanForCausalLM", HUNYUAN | MOE),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", HUNYUAN | MOE),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", HUNYUAN | DENSE),
    "hy_v3": ("HYV3ForCausalLM", HY_V3),
}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, files, ranks, tmp_path_factory):
    """A family, and its folders after a full training and after a merge."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(files, request.param, folder / "run", max_steps=1, num_processes=None)
    full = ranks.train(config).checkpoints()[-1]
    adapter = make_adapter(files[request.param], folder / "adapter", target_modules=ATTENTION)
    merge_lora(base_model_path=files[request.param], adapter_model_path=adapter, output_path=folder / "merged")
    return request.param, (full, folder / "merged")


def test_servers_know_every_tensor_and_the_architecture(written):
    family, folders = written
    architecture, known = LOADED[family]
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
        names = {re.sub(r"\.\d+\.", ".N.", name) for name in load_tensors(folder)}
        # With tied embeddings there may be no lm_head.
        assert known - names <= {"lm_head.weight"} and names <= known, folder


def test_the_commands_or_why_there_are_none(written):
    family, folders = written
    for folder in folders:
        lines = serving_text(folder).splitlines()
        if family == "hunyuan":
            assert all("does not serve this model: its architecture, HunYuanForCausalLM" in line for line in lines)
        else:
            assert lines == [
                f"vLLM: vllm serve {folder}",
                f"SGLang: python -m sglang.launch_server --model-path {folder}",
            ]


def test_shared_k_and_v_are_not_served(files, tmp_path):
    """Hunyuan-Large under the name of an architecture that servers know would be computed without them."""
    folder = shutil.copytree(files["hunyuan"], tmp_path / "a model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["HunYuanMoEV1ForCausalLM"]}))
    assert serving_text(folder).count("its layers share K and V (use_cla)") == 2
    config |= {"architectures": ["HunYuanMoEV1ForCausalLM"], "use_cla": False, "auto_map": {"AutoConfig": "a.B"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert serving_text(folder).splitlines()[0] == f"vLLM: vllm serve '{folder}' --trust-remote-code"
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        serving_text(folder)


def test_the_merge_prints_the_commands(files, tmp_path, capsys):
    adapter = make_adapter(files["hunyuan_v1_dense"], tmp_path / "adapter", target_modules=ATTENTION)
    words = ["--base_model_path", files["hunyuan_v1_dense"], "--adapter_model_path", adapter]
    assert main(["merge", *map(str, words), "--output_path", str(tmp_path / "merged")]) == 0
    assert f"vLLM: vllm serve {tmp_path / 'merged'}\n" in capsys.readouterr().out
