"""The arguments that upstream's scripts give their train.py, verbatim but for paths and lengths, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHARED
from training_runs import losses
from transformers import AutoConfig, AutoModelForCausalLM

from hynb.config import MODEL_SIZE_NAMES, random_model_config
from hynb.launch import attach
from hynb.plan.memory import count_parameters
from hynb.runs import check_run
from hynb.train_entry import RankState, read_parameters

_LISTS = SHARED / "models" / "upstream_flags.json"
if not _LISTS.is_file():
    pytest.skip("no upstream files beside the checkout", allow_module_level=True)
LISTS: dict[str, list[str]] = json.loads(_LISTS.read_text())
# By list: the folder of its DeepSpeed files, and the family of its models.
SOURCES = {
    "hunyuan-large": ("hunyuan-large", "hunyuan"),
    "hunyuan-a13b": ("hunyuan-a13b", "hunyuan_v1_moe"),
    "hunyuan-7b (dense, MT the same)": ("hunyuan-7b", "hunyuan_v1_dense"),
    "hy-mt2 moe full": ("hy-mt2", "hy_v3"),
    "hy-mt2 dense lora": ("hy-mt2", "hunyuan_v1_dense"),
    "hy3 full": ("hy3", "hy_v3"),
    "hy3 lora": ("hy3", "hy_v3"),
}
TINY = {
    "max_steps": 2,
    "save_steps": 2,
    "max_seq_length": 256,
    "model_max_length": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 4,
    "num_experts": 4,
    "moe_topk": 1,
    "model_size": "7B",
}


def flags_of(name: str, files: dict[str, Path], output_dir: Path, **changes: object) -> dict[str, list[str]]:
    """The flags of a list in their order, with their values; paths and those of `TINY` and `changes` are replaced."""
    folder, family = SOURCES[name]
    replaced = TINY | {
        "model_name_or_path": files[family],
        "tokenizer_name_or_path": files[family],
        "train_data_file": files["data"],
        "deepspeed": SHARED / "models" / folder / "ds_zero3_offload.json",
        "output_dir": output_dir,
    }
    flags: dict[str, list[str]] = {}
    for word in LISTS[name]:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[list(flags)[-1]].append(word)
    return {key: [str((replaced | changes)[key])] if key in replaced else value for key, value in flags.items()}


def words_of(flags: dict[str, list[str]]) -> list[str]:
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def test_all_lists_and_their_shell_variables_are_covered(files, tmp_path):
    assert SOURCES.keys() == LISTS.keys()
    for name in LISTS:
        assert not [word for word in words_of(flags_of(name, files, tmp_path)) if "${" in word], name


@pytest.mark.parametrize("name", LISTS)
def test_each_list_is_read_as_it_is(name, files, tmp_path):
    """Every flag is a parameter, or has a note; with the published lengths, and a model folder."""
    published = {
        flag: value for flag, value in TINY.items() if flag == "model_size" or f"--{flag}" not in LISTS[name]
    }
    flags = flags_of(name, files, tmp_path / "run")
    for flag, values in flags.items():
        if flag in TINY and flag not in published:
            (word,) = (LISTS[name][index + 1] for index, item in enumerate(LISTS[name]) if item == f"--{flag}")
            flags[flag] = values if word.startswith("${") else [word]
    state = RankState(argv=words_of(flags))
    read_parameters(state)
    check_run(state.config)
    noted = {flag for flag in flags if any(note.startswith(f"{flag} is ignored: ") for note in state.reading.notes)}
    assert noted == {"model_size"} & flags.keys() and state.config.given == flags.keys() - noted
    if "model_size" in flags:
        assert any("the tokenizer's own chat template decides" in note for note in state.reading.notes)
    assert state.config.training_args == {}
    assert state.config.max_seq_length == int(flags["max_seq_length"][0])
    if state.config.use_lora:
        assert (state.config.lora_rank, state.config.lora_alpha) == (64, 128)


@pytest.mark.parametrize("name", LISTS)
def test_each_list_without_a_model_describes_a_random_one(name, files, tmp_path):
    flags = flags_of(name, files, tmp_path / "run")
    del flags["model_name_or_path"]
    state = RankState(argv=words_of(flags))
    read_parameters(state)
    check_run(state.config)
    sizes = random_model_config(state.config) | {"vocab_size": 700}
    assert sizes["model_type"] == ("hy_v3" if "moe_intermediate_size" in flags else "hunyuan")
    if sizes["hidden_size"] == TINY["hidden_size"]:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
        assert count_parameters(sizes).total == model.num_parameters()
        expert = model.model.layers[-1].mlp
        if "moe_intermediate_size" in flags:
            assert expert.experts.gate_up_proj.shape == (4, 2 * 16, 32)
            assert model.model.layers[0].mlp.gate_proj.weight.shape == (48, 32), "a dense layer comes first"


@pytest.mark.parametrize(
    ("name", "ds_file", "count"),
    [
        ("hunyuan-7b (dense, MT the same)", "ds_zero3_offload_no_auto", 2),
        ("hy3 lora", "ds_zero2_offload", 2),
        ("hy-mt2 moe full", "ds_zero2_no_offload", 2),
        ("hunyuan-large", "ds_zero3_no_offload", 1),
        ("hunyuan-a13b", "ds_zero3_offload", 1),
        ("hy-mt2 dense lora", "ds_zero3_no_offload", 1),
        ("hy3 full", "ds_zero3_no_offload", 1),
    ],
)
def test_two_steps_of_upstreams_command_line(name, ds_file, count, files, ranks, tmp_path):
    """With a model, whose sizes count, or without one (hy-mt2), with one of upstream's DeepSpeed files."""
    folder, family = SOURCES[name]
    path = SHARED / "models" / folder / f"{ds_file}.json"
    flags = flags_of(name, files, tmp_path / "run", deepspeed=path)
    if name == "hy-mt2 moe full":
        del flags["model_name_or_path"]
    done = ranks.run(*words_of(flags), ranks=count)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = attach(tmp_path / "run")
    assert run.status().state == "finished" and list(losses(run)) == [1, 2]
    notes = run.reader.manifest()["notes"]
    ignored = ", ".join(sorted(flags.keys() & set(MODEL_SIZE_NAMES)))
    if "model_name_or_path" not in flags:
        assert any("the random model is a hy_v3, because moe_intermediate_size or" in note for note in notes)
        family = "hy_v3"
    elif ignored:
        assert f"ignored, because the model folder decides them: {ignored}" in notes
    if "model_size" in flags:
        assert sum(note.startswith("model_size is ignored: the tokenizer's own chat template") for note in notes) == 1
    assert not [note for note in notes if "left out, and different" in note], "these lists leave out nothing"
    last = run.checkpoints()[-1]
    if "use_lora" in flags:
        settings = json.loads((last / "adapter_config.json").read_text())
        given = [float(flags[name][0]) for name in ("lora_rank", "lora_alpha", "lora_dropout")]
        assert [settings["r"], settings["lora_alpha"], settings["lora_dropout"]] == given
    else:
        assert json.loads((last / "config.json").read_text())["model_type"] == family
