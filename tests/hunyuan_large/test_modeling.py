"""Hunyuan-Large: equal to upstream's values and to a plain reference; decoding, saving, tokenisation, loss."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from reference_model import logits as reference_logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hynb.config import Config
from hynb.errors import ModelError
from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeForCausalLM
from hynb.hunyuan_large.tokenization import SPECIAL_TOKENS
from hynb.train import load_model

GOLDEN = ("cla_mixed_qknorm_top1", "nocla_mixed_qknorm_top1", "cla_mixed_qknorm_top2")
PLAIN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_topk": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
VARIANTS = {
    "as released": {},
    "share factor 3": {"cla_share_factor": 3, "num_hidden_layers": 5},
    "share factor 4": {"cla_share_factor": 4},
    "no shared MLP": {"use_mixed_mlp_moe": False},
    "two shared experts": {"num_shared_expert": 2},
    "untied": {"tie_word_embeddings": False},
    "dense": {"num_experts": 1},
    "top-3": {"moe_topk": 3},
    "lists for each layer": {"moe_topk": [1, 2, 3, 1], "num_shared_expert": [1, 2, 1, 3]},
    "alpha without a factor": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0}},
    "experts in a list": {"num_experts": [4, 2, 1, 5], "moe_topk": [1, 2, 1, 3]},
    "biases": {"attention_bias": True},
    "no q/k norm, no CLA": {"use_qk_norm": False, "use_cla": False},
    "widths of experts in a list": {"moe_intermediate_size": [16, 24, 8, 40], "num_shared_expert": [1, 2, 1, 1]},
    "dense layers first": {"moe_layer_num_skipped": 2, "moe_intermediate_size": 16, "moe_topk": 2},
    "scaled, not renormalised": {"moe_topk": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "wide heads": {"attention_head_dim": 12},
}


def random_model(seed: int = 0, **changes) -> tuple[HunYuanLargeForCausalLM, dict]:
    # transformers changes the dictionaries that it is given.
    config = copy.deepcopy(PLAIN | changes)
    torch.manual_seed(seed)
    model = HunYuanLargeForCausalLM._from_config(HunYuanLargeConfig(**copy.deepcopy(config)), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif name.endswith(".bias"):
                weight.normal_(std=0.2)
    return model.eval(), config


def on_disk(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def by_disk_name(name: str, tensor: torch.Tensor):
    """A gradient under the tensor's names on the disk, with fused experts split."""
    if ".experts." not in name:
        yield name, tensor
        return
    layer = name.split("experts.")[0]
    for index, expert in enumerate(tensor):
        if name.endswith("gate_up_proj"):
            gate, up = expert.chunk(2, 0)
            yield f"{layer}experts.{index}.gate_proj.weight", gate
            yield f"{layer}experts.{index}.up_proj.weight", up
        else:
            yield f"{layer}experts.{index}.down_proj.weight", expert


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GOLDEN)
def test_equal_to_upstreams_values(shared, name, attention, checkpointing):
    folder = shared / "golden" / name
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    assert type(model) is HunYuanLargeForCausalLM
    assert model.config._experts_implementation == "grouped_mm"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
        model.train()
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "labels")}
    output = model(**inputs)
    attended = inputs["attention_mask"].bool()
    assert (output.logits - expected["logits"])[attended].abs().max() < 1e-4
    assert abs(output.loss - expected["loss"]) < 1e-5
    output.loss.backward()
    norms = json.loads((folder / "grad_norms.json").read_text())
    found = {
        disk: gradient.norm().item()
        for parameter, weight in model.named_parameters()
        for disk, gradient in by_disk_name(parameter, weight.grad)
    }
    assert found.keys() == norms.keys()
    for key, norm in norms.items():
        assert found[key] == pytest.approx(norm, rel=1e-3), key
    if not checkpointing:
        greedy = expected["greedy"].view(1, -1)
        prompt = greedy[:, :10]
        decoded = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        assert decoded.tolist() == greedy.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_reference(variant, tmp_path):
    model, config = random_model(**VARIANTS[variant])
    weights = on_disk(model, tmp_path)
    # Longer than the trained length, with which NTK-alpha RoPE does not change.
    ids = torch.randint(1, 64, (48,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0]
        assert (found - reference_logits(weights, config, ids)).abs().max() < 1e-4


def test_equal_to_the_reference_on_random_configurations(tmp_path):
    rng = random.Random(3)
    for seed in range(12):
        layers = rng.randint(1, 5)
        heads, share = rng.choice([(4, 4), (4, 2), (8, 1)]), rng.randint(1, 4)
        experts = rng.choice([1, 2, 5])
        changes = {
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "hidden_size": 32,
            "cla_share_factor": share,
            "num_experts": experts,
            "moe_topk": rng.randint(1, experts),
            "num_shared_expert": rng.randint(1, 2),
            **{key: rng.random() < 0.5 for key in ("use_cla", "use_mixed_mlp_moe", "use_qk_norm", "attention_bias")},
            "rope_theta": rng.choice([1e4, 5e5]),
        }
        model, config = random_model(seed, **changes)
        weights = on_disk(model, tmp_path / str(seed))
        ids = torch.randint(1, 64, (17,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = reference_logits(weights, config, ids)
            difference = model(input_ids=ids[None]).logits[0] - expected
        assert difference.abs().max() < 1e-4 * max(1.0, expected.abs().max()), changes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_the_references(variant, attention, tmp_path):
    """Of every tensor on the disk, in a batch whose second row is padded."""
    model, config = random_model(seed=5, **VARIANTS[variant])
    weights = {name: tensor.requires_grad_() for name, tensor in on_disk(model, tmp_path).items()}
    model.set_attn_implementation(attention)
    rows = [torch.randint(1, 64, (size,), generator=torch.Generator().manual_seed(size)) for size in (21, 13)]
    loss = sum(
        torch.nn.functional.cross_entropy(reference_logits(weights, config, row)[:-1], row[1:], reduction="sum")
        for row in rows
    ) / sum(len(row) - 1 for row in rows)
    loss.backward()
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found = model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
    assert abs(found - loss) < 1e-5
    found.backward()
    compared = set()
    for parameter, weight in model.named_parameters():
        for name, gradient in by_disk_name(parameter, weight.grad):
            expected = weights[name].grad
            # In the reference an expert without tokens has no gradient.
            expected = torch.zeros_like(gradient) if expected is None else expected
            assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name
            compared.add(name)
    assert compared == weights.keys()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("share", [2, 4])
def test_gradients_under_checkpointing_equal_those_without(share, reentrant):
    """Upstream's code loses a part of the gradients of K and V here."""
    model, _ = random_model(cla_share_factor=share)
    ids = torch.randint(1, 64, (2, 20))
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    whole = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7, msg=name)


def test_decoding_with_the_cache_equals_decoding_without():
    model, _ = random_model()
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    values = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **values), model.generate(ids, use_cache=False, **values))
    beams = model.generate(ids, num_beams=3, **values)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **values))


def test_left_padding_changes_nothing():
    model, _ = random_model()
    ids = torch.randint(1, 64, (1, 7))
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    longer = torch.randint(1, 64, (1, 12))
    batch = torch.cat([torch.nn.functional.pad(ids, (5, 0)), longer])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert together[0, 12:].tolist() == alone[0, 7:].tolist()


@pytest.mark.parametrize("variant", ["as released", "untied", "lists for each layer"])
def test_a_save_reads_back_bit_for_bit(variant, tmp_path):
    model, config = random_model(**VARIANTS[variant])
    first = on_disk(model, tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    second = on_disk(again, tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert ("lm_head.weight" in first) is not config["tie_word_embeddings"]
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in first
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    for key, value in config.items():
        assert written[key] == value, key
    assert written["model_type"] == "hunyuan"
    assert written["architectures"] == ["HunYuanForCausalLM"] and written["torch_dtype"] == "float32"
    again.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert all(torch.equal(third[name], weight) for name, weight in model.state_dict().items())
    decoder = AutoModel.from_pretrained(tmp_path / "c").state_dict()
    assert all(torch.equal(decoder[name], weight) for name, weight in model.model.state_dict().items())


def test_code_in_the_folder_is_not_run(tmp_path):
    model, _ = random_model()
    model.save_pretrained(tmp_path)
    for name in ("modeling_hunyuan", "configuration_hunyuan"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_hunyuan.HunYuanConfig",
        "AutoModelForCausalLM": "modeling_hunyuan.HunYuanForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoConfig.from_pretrained(tmp_path)) is HunYuanLargeConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HunYuanLargeForCausalLM


def a13b_config(shared) -> dict:
    """The published config.json of an older Hunyuan-A13B folder, with every size made small and every list kept."""
    config = json.loads((shared / "models" / "hunyuan-a13b" / "config.json").read_text())
    layers = {key: value[:4] for key, value in config.items() if isinstance(value, list) and len(value) == 32}
    assert sorted(layers) == ["moe_intermediate_size", "moe_topk", "num_shared_expert"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"attention_head_dim": 12, "vocab_size": 90, "num_experts": 16, "max_position_embeddings": 64}
    sizes |= {"intermediate_size": 24, "moe_intermediate_size": [24] * 4, "initializer_range": 0.4}
    ids = {key: 3 for key in config if key.endswith("_token_id")} | {"pad_token_id": 0}
    return config | layers | sizes | ids


def test_an_older_folder_of_hunyuan_a13b_equals_transformers_own_model(shared, tmp_path):
    """model_type `hunyuan` with the same weights as `hunyuan_v1_moe`: the same logits, loss and gradients."""
    config = a13b_config(shared)
    folders = {name: tmp_path / name for name in ("hunyuan", "hunyuan_v1_moe")}
    for name, folder in folders.items():
        folder.mkdir()
        # transformers' own class takes the head size by one name only.
        own = {"model_type": name} | ({"head_dim": 12} if name == "hunyuan_v1_moe" else {})
        (folder / "config.json").write_text(json.dumps(config | own))
    torch.manual_seed(0)
    own_config = AutoConfig.from_pretrained(folders["hunyuan_v1_moe"])
    made = AutoModelForCausalLM.from_config(own_config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    made.save_pretrained(tmp_path / "written")
    found = {}
    for name, folder in folders.items():
        (folder / "model.safetensors").write_bytes((tmp_path / "written" / "model.safetensors").read_bytes())
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = torch.randint(4, 90, (2, 40), generator=torch.Generator().manual_seed(1))
        output = model.eval()(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        found[name] = output.logits.detach(), output.loss.detach(), gradients
    assert type(model).__module__.startswith("transformers.") and found["hunyuan"][0].std() > 1
    for left, right in zip(found["hunyuan"][:2], found["hunyuan_v1_moe"][:2], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    assert found["hunyuan"][2].keys() == found["hunyuan_v1_moe"][2].keys()
    for key, gradient in found["hunyuan"][2].items():
        torch.testing.assert_close(gradient, found["hunyuan_v1_moe"][2][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", ["group_limited_greedy", "use_mla", "mlp_bias"])
def test_an_option_that_the_model_does_not_have_is_refused(option, tmp_path):
    model, _ = random_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {option: True}))
    with pytest.raises(ModelError, match=f"{option} = true: not supported for model_type hunyuan"):
        load_model(Config(), tmp_path, tokenizer=None)


def test_a_model_folder_with_a_missing_tensor_is_refused(tmp_path):
    model, _ = random_model()
    weights = on_disk(model, tmp_path)
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.k_proj"):
        load_model(Config(), tmp_path, tokenizer=None)


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "hunyuan-large")


def test_the_tokenizers_special_tokens(tokenizer, shared, tmp_path):
    assert len(tokenizer) == 128166
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.convert_tokens_to_ids(token) == 127957 + number
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|endoftext|>", 127961)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "奥迪q5l最高优惠8.47万 <|extra_0|> 12345 ñandú \n\n  x😀"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("trusted", [True, False])
def test_code_beside_the_vocabulary_is_not_run(shared, tmp_path, trusted):
    for path in (shared / "hunyuan-large").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenization_hy.py").write_text("raise SystemExit('run')\n")
    made = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trusted)
    assert made.is_fast and made.encode("a<|eos|>")[-1] == 127960
    # As in a model folder, whose config.json names the code too.
    names = {
        "AutoConfig": "configuration_hunyuan.HunYuanConfig",
        "AutoTokenizer": ["tokenization_hy.HYTokenizer", None],
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hunyuan", "auto_map": names}))
    made = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trusted)
    assert made.is_fast and len(made) == 128166


def test_the_conversion_is_cached(shared, tmp_path, monkeypatch):
    from hynb.hunyuan_large import tokenization

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    (converted,) = (tmp_path / "cache").rglob("*.json")
    monkeypatch.setattr(tokenization, "convert", None)
    second = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    monkeypatch.undo()
    # Where the cache cannot be written, because its folder is a file, each call converts.
    (tmp_path / "no").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no"))
    third = AutoTokenizer.from_pretrained(shared / "hunyuan-large")
    text = "奥迪q5l最高优惠8.47万 <|extra_0|> 12345"
    assert first.encode(text) == second.encode(text) == third.encode(text)
    assert converted.stat().st_size > 1_000_000
    assert [item for item in (tmp_path / "cache").rglob("*") if item.is_file()] == [converted]


def test_ids_equal_tiktokens_own_merging(tokenizer, shared):
    """Compared with a slow byte-pair merge by rank, as in tiktoken, on random text."""
    import base64

    ranks = {}
    for line in (shared / "hunyuan-large" / "hy.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)

    def merged(word: bytes) -> list[int]:
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            pairs = [(ranks.get(parts[i] + parts[i + 1], 1 << 40), i) for i in range(len(parts) - 1)]
            rank, place = min(pairs)
            if rank == 1 << 40:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [ranks[part] for part in parts]

    rng = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyzäéñ的一是在不了有和人这中大为上个国"
    for _ in range(400):
        word = "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
        expected = [ranks[word.encode()]] if word.encode() in ranks else merged(word.encode())
        assert tokenizer.encode(word, add_special_tokens=False) == expected, word


@pytest.mark.parametrize("piece", [3, 16, 1000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("counted", [None, 37])
def test_the_loss_in_pieces_is_the_loss(piece, tied, counted):
    model, _ = random_model(tie_word_embeddings=tied)
    ids = torch.randint(1, 64, (3, 20))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)

    def loss_and_gradients():
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, num_items_in_batch=counted)
        output.loss.backward()
        return output, {name: weight.grad.clone() for name, weight in model.named_parameters()}

    whole, gradients = loss_and_gradients()
    model.loss_piece_tokens = piece
    pieces, found = loss_and_gradients()
    assert pieces.logits is None and whole.logits is not None
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    model.requires_grad_(False)
    assert torch.equal(model(input_ids=ids, labels=labels, num_items_in_batch=counted).loss, pieces.loss)


@pytest.mark.parametrize("counted", [None, 0])
def test_a_batch_without_labels_has_a_loss_of_zero(counted):
    model, _ = random_model()
    model.loss_piece_tokens = 8
    ids = torch.randint(1, 64, (1, 9))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=counted).loss
    loss.backward()
    assert loss == 0 and all(
        torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None
    )
