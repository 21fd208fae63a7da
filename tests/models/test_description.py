"""`hynb models`: sizes, precision, template and fitting preset of every family; broken folders in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import ATTENTION, make_adapter
from real_models import MODELS, tokenizer_of
from training_runs import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.cli import main
from hynb.data import ChatTemplate
from hynb.models import describe


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_every_family(family, files):
    found = describe(files[family])
    model = AutoModelForCausalLM.from_pretrained(files[family])
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    assert (found.family, found.total) == (family, sum(sizes.values()))
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    chosen = {"hunyuan": 1 / 4, "hunyuan_v1_moe": 2 / 4, "hy_v3": 2 / 4}.get(family, 1)
    assert found.active == found.total - experts * (1 - chosen)
    assert found.experts == (0 if family == "hunyuan_v1_dense" else 4)
    # Hy3 also stores a bias per expert, which is not trained.
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if "bias" in name)
    assert found.weights.parameters == {"F32": found.total + biases} and found.weights.missing == ()
    assert found.context_tokens == 512 and found.lora_targets == tuple(ATTENTION)
    assert [(fit.method, fit.preset) for fit in found.fits] == [
        ("full", "ds_zero2_no_offload"),
        ("LoRA", "ds_zero2_no_offload"),
    ]


def test_the_published_sizes(shared):
    """Of Hy3 (295B-A21B), Hunyuan-A13B (80B-A13B) and Hunyuan-7B."""
    sizes = {"hy3": (295, 21), "hunyuan-a13b": (80, 13), "hunyuan-7b": (7.5, 7.5)}
    for model, (total, active) in sizes.items():
        found = describe(shared / "models" / model)
        assert found.total / 1e9 == pytest.approx(total, rel=0.01), model
        assert found.active / 1e9 == pytest.approx(active, rel=0.03), model
        assert found.weights.kind == "none" and found.mtp_layers == (model == "hy3")


@pytest.mark.parametrize("model", MODELS)
def test_the_template_is_found_as_the_tokenizer_has_it(model, files, shared, tmp_path):
    tokenizer = tokenizer_of(model, shared)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(files["hunyuan_v1_dense"] / "config.json", tmp_path)
    found = describe(tmp_path)
    assert found.template == ChatTemplate.of(tokenizer).features() and found.template_problem == ""
    assert found.template and found.template.end_tokens


def test_the_template_of_a_folder_as_upstream_publishes_it(files, shared, tmp_path):
    """Its special tokens are in no file."""
    for path in (shared / "hunyuan-large").iterdir():
        shutil.copy(path, tmp_path)
    shutil.copy(files["hunyuan"] / "config.json", tmp_path)
    expected = ChatTemplate.of(AutoTokenizer.from_pretrained(shared / "hunyuan-large")).features()
    assert describe(tmp_path).template == expected and "<|eos|>" in expected.end_tokens


@pytest.mark.parametrize(
    ("removed", "tokenizer", "template"),
    [
        ([], "", "renders "),
        (["tokenizer_config.json"], "MISSING: tokenizer_config.json; copy", "chat_template.jinja, which needs the"),
        (["tokenizer.json"], "MISSING: tokenizer.json (or hy.tiktoken); copy", "renders "),
        (["chat_template.jinja"], "", "none: neither a file chat_template.jinja nor"),
        (
            ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"],
            "MISSING: tokenizer_config.json, tokenizer.json (or hy.tiktoken); copy",
            "none: neither",
        ),
    ],
)
def test_a_missing_file_of_the_tokenizer_is_named(files, tmp_path, capsys, removed, tokenizer, template):
    folder = shutil.copytree(files["hunyuan"], tmp_path / "model")
    for name in removed:
        (folder / name).unlink()
    assert main(["models", str(folder)]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows.get("tokenizer", "").startswith(tokenizer) and ("tokenizer" in rows) == bool(tokenizer)
    assert rows["chat template"].startswith(template)


def test_an_adapter_is_described_with_its_base(files, tmp_path, capsys):
    adapter = make_adapter(files["hunyuan_v1_moe"], tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    assert main(["models", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert f"LoRA of rank 4 on q_proj, v_proj, for the base {files['hunyuan_v1_moe']}" in out
    for text in (
        "hunyuan_v1_moe (HunYuanMoEV1ForCausalLM)",
        "4 experts per layer",
        "F32 100% of the parameters; 1 file(s)",
        "512 tokens",
    ):
        assert text in out, text
    assert main(["models", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    assert found["base"] == str(files["hunyuan_v1_moe"]) and found["fits"][1]["method"] == "LoRA"


def test_the_preset_that_fits_the_gpus(shared, tmp_path, monkeypatch, capsys):
    """With nvidia-smi's table of a machine of eight GPUs with 80 GB; host memory is this machine's own."""
    program = tmp_path / "nvidia-smi"
    lines = "".join(f"{number}, GPU-{number}, H100, 81559, 81000, 570\\n" for number in range(8))
    listed = "".join(f"GPU {number}: H100\\n" for number in range(8))
    program.write_text(f"#!/bin/sh\nif [ \"$1\" = -L ]; then printf '{listed}'; else printf '{lines}'; fi\n")
    program.chmod(0o755)
    # As without nvidia-ml-py, which would ask the driver itself.
    (tmp_path / "pynvml.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = describe(shared / "models" / "hunyuan-4b")
    assert (found.gpus, found.gpu_bytes) == (8, 81559 << 20)
    large = describe(shared / "models" / "hy3")
    assert [fit.preset for fit in large.fits] == [None, None]
    # Eight processes with six GB each are the least that any preset needs of host memory.
    if found.host_bytes >= 8 * (6 << 30):
        assert all(fit.preset for fit in found.fits)
    assert main(["models", str(shared / "models" / "hy3")]) == 0
    assert capsys.readouterr().out.count("does not fit (8 GPU(s) of 85.5 GB") == 2


def test_it_imports_no_heavy_library(files):
    code = (
        "import sys; from hynb.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "models", str(files["hy_v3"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def break_sizes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "hunyuan", "hidden_size": "32", "vocab_size": 9}))


def break_shard(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")


def set_in_tokenizer(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def break_eos_token(folder: Path) -> None:
    set_in_tokenizer(folder, eos_token={"text": "<|eos|>"})


def break_added_tokens(folder: Path) -> None:
    set_in_tokenizer(folder, added_tokens_decoder={"3": 1.5})


def break_named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    set_in_tokenizer(folder, chat_template=[{"name": "default"}])


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "there is no such folder"),
        (empty, "has neither config.json nor adapter_config.json"),
        (break_config, "config.json: cannot be read"),
        (break_family, "model_type = llama: not supported"),
        (break_sizes, "config.json: hidden_size = 32: must be a whole number"),
        (break_shard, "model.safetensors: is truncated or not a safetensors file"),
        (break_index, "model.safetensors.index.json: is not a valid index"),
        (break_tokenizer, "tokenizer_config.json: must be a JSON object"),
        (break_template, "chat_template.jinja: cannot be read as UTF-8 text"),
        (break_eos_token, "tokenizer_config.json: eos_token: has {"),
        (break_added_tokens, "tokenizer_config.json: added_tokens_decoder: has 1.5 for a token"),
        (break_named_templates, "tokenizer_config.json: chat_template: must be a template's text, or a list"),
    ],
)
def test_a_broken_folder_ends_in_one_line(damage, message, files, tmp_path, capsys):
    folder = shutil.copytree(files["hunyuan_v1_dense"], tmp_path / "model")
    damage(folder)
    assert main(["models", str(folder)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_what_is_missing_is_shown(files, tmp_path, capsys):
    folder = shutil.copytree(files["hunyuan_v1_dense"], tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert main(["models", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "MISSING: model-00002-of-00002.safetensors" in out and "the template ends no answer" in out
