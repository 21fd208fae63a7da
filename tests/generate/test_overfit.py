"""A tiny model of each family learns eight conversations by heart, answers all of them and stops by itself.

With the published templates, thoughts and tools as far as each renders them, and hynb's own training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import small_tokenizer_of, tokenizer_of
from tiny import OF_FAMILY, SIZES, write_lines
from training_runs import config_of, losses
from transformers import AutoConfig, AutoModelForCausalLM

from hynb.cli import main
from hynb.data import ChatTemplate, read_conversations
from hynb.generate import AnsweringModel, question_of

MODEL_OF_FAMILY = {
    "hunyuan": "hunyuan-large",
    "hunyuan_v1_moe": "hunyuan-a13b",
    "hunyuan_v1_dense": "hunyuan-7b",
    "hy_v3": "hy3",
}
STEPS = 100
SYSTEM = "You are a helpful assistant."
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# Questions that differ in more than a name, since a tiny model mixes up those that do not.
CITIES = {
    "北京今天天气怎么样？": ("北京", "晴"),
    "Is it raining in Berlin?": ("Berlin", "rain"),
    "请问成都现在出太阳了吗？": ("成都", "多云"),
    "Tell me about Lima's weather.": ("Lima", "fog"),
}
SUMS = ((1, 2), (3, 4), (2, 7), (5, 5))


def records(model: str) -> list[dict[str, Any]]:
    """Four questions that are answered after a thought, and four about tools where the template renders them."""
    found = []
    # A13B's template writes the time, in answering the present one; a tiny model knows only what it has learnt.
    time = {"current_time": "2025-06-27"} if model == "hunyuan-a13b" else {}
    for one, other in SUMS:
        messages = [{"role": "user", "content": f"{one}+{other}=?"}]
        if model == "hy3":
            answer = {"content": f"等于{one + other}", "reasoning_content": f"Add {one} and {other}."}
            found.append({"reasoning_effort": "high", "messages": [*messages, {"role": "assistant"} | answer]})
        else:
            text = f"<think>\nAdd {one} and {other}.\n</think>\n<answer>\n等于{one + other}\n</answer>"
            system = {"role": "system", "content": SYSTEM}
            found.append({"messages": [system, *messages, {"role": "assistant", "content": text}]})
    for number, (text, (city, weather)) in enumerate(CITIES.items()):
        question = {"role": "user", "content": text}
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        final = {"role": "assistant", "content": f"{city}: {weather}"}
        if model == "hunyuan-large":
            found.append({"messages": [question, final, {"role": "user", "content": "?"}, final]})
        elif number % 2:
            result = {"role": "tool", "content": weather, "tool_call_id": "1"}
            found.append({"tools": [TOOL], **time, "messages": [question, calling, result, final]})
        else:
            found.append({"tools": [TOOL], **time, "messages": [question, calling]})
    return found


def base_model(folder: Path, family: str, shared: Path, data: Path) -> Path:
    """A random model whose tokenizer has the published template and a vocabulary of the data."""
    full = tokenizer_of(MODEL_OF_FAMILY[family], shared)
    texts = [
        ChatTemplate.of(full, item.arguments.get("tools")).render(item).text for item in read_conversations(data)
    ]
    tokenizer = small_tokenizer_of(MODEL_OF_FAMILY[family], shared, texts, vocab_size=600)
    tokenizer.save_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        **(SIZES | OF_FAMILY[family] | sizes),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MODEL_OF_FAMILY)
def test_what_was_learnt_by_heart_is_reproduced_and_ends(family, shared, ranks, tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", *records(MODEL_OF_FAMILY[family]))
    base = base_model(tmp_path / "base", family, shared, data)
    config = config_of(
        {family: base, "data": data}, family, tmp_path / "run", num_processes=None, max_steps=STEPS,
        save_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2, min_lr=1e-3, max_seq_length=1024,
        gradient_checkpointing=False,
    )  # fmt: skip
    run = ranks.train(config)
    assert losses(run)[STEPS] < 0.05, json.dumps(losses(run))
    model = AnsweringModel(run.checkpoints()[-1])
    conversations = list(read_conversations(data))
    given = list(model.answers([question_of(item) for item in conversations], max_new_tokens=120, batch_size=4))
    expected = [model.expected(item) for item in conversations]
    assert [(item.thought, item.text) for item in given] == [(item.thought, item.text) for item in expected]
    assert [item.ended for item in given] == [True] * 8
    assert sum(bool(item.thought) for item in given) == 4
    assert sum("tool_call" in item.text for item in given) == (0 if family == "hunyuan" else 2)
    # The same by the command, which shows the thought apart, and scores the file.
    folder = str(run.checkpoints()[-1])
    given_arguments = ["--reasoning_effort", "high"] if family == "hy_v3" else ["--system", SYSTEM]
    capsys.readouterr()
    assert main(["ask", folder, "1+2=?", "--greedy", *given_arguments]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line] == ["thought:", "Add 1 and 2.", "answer:", "等于3"]
    assert main(["ask", folder, "--questions", str(data), "--count=2", "--greedy"]) == 0
    assert "exact match 100.0%, F1 1.000, 0 of 2 answers never ended" in capsys.readouterr().out
