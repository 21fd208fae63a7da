"""Makes the demo's small base model: `python -m hynb.demo.pretrain FOLDER` (20 minutes to an hour on a CPU)."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hynb.data import Collator, Conversation, encode
from hynb.demo.texts import corpus, pretraining_conversation
from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeForCausalLM

# Hunyuan-Large's own names for them, as its chat template writes them.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
    *(f"<|extra_{number}|>" for number in range(6)),
)
# What Hunyuan-Large's template writes, in our own words: an opening mark, the system's and the user's end.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '<|startoftext|>' + message['content'] + '<|extra_4|>' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if loop.index0 != 1 or messages[0]['role'] != 'system' -%}{{ '<|startoftext|>' }}{%- endif -%}"
    "{{ message['content'] + '<|extra_0|>' }}"
    "{%- else -%}{{ message['content'] + '<|eos|>' }}{%- endif -%}"
    "{%- endfor -%}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_topk": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 2,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
}
# A letter run, a digit, a Chinese character or a sign each for itself: a name is cut alike wherever it stands.
_SPLIT = r"[A-Za-z]+|\p{Han}|\p{N}|\s|[^A-Za-z\p{Han}\p{N}\s]"


def write_tokenizer(
    folder: Path, *, vocab_size: int = 1400, samples: int = 20_000, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the demo's texts and saves it with Hunyuan's special tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, samples), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    fast.save_pretrained(folder)
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, **sizes: Any) -> HunYuanLargeForCausalLM:
    """A random model of the demo's architecture."""
    torch.manual_seed(seed)
    config = HunYuanLargeConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(SIZES | sizes),
    )
    model = HunYuanLargeForCausalLM._from_config(config, dtype=torch.float32)
    # Heads this small look sharply at one token only with larger norms: copying is learnt in half the steps.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
                weight.fill_(2.0)
    return model


def pretrain(folder: Path, *, steps: int, batch_size: int = 48, learning_rate: float = 3e-3, seed: int = 0) -> None:
    """Pretrains on questions about a city, person, price, phone or date, never about a car, and saves in bf16.

    Args:
        folder: gets config.json, model.safetensors and the tokenizer.
        steps: optimizer steps; each sees new texts.
    """
    # Two threads wait for each other at every small matrix: one is faster wherever anything else runs.
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = new_model(tokenizer, seed=seed)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.02)
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    rng = random.Random(seed + 1)
    model.train()
    started, shown = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        copying = step <= steps // 5
        if copying:
            # Copying comes first: it is learnt in minutes from random tokens, and hardly at all from sentences.
            batch = _copies(min(len(tokenizer), 300 + 3 * step), batch_size, rng)
        else:
            drawn = [pretraining_conversation(rng)["messages"] for _ in range(batch_size)]
            talks = [Conversation(messages=messages, source="pretraining") for messages in drawn]
            batch = collate([encode(talk, tokenizer, 512) for talk in talks])
        answers = model(**batch)
        loss = answers.loss
        if not copying:
            # Some weight on the whole text teaches what names look like, the car's too.
            everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = loss + 0.1 * model.loss_function(
                logits=answers.logits, labels=everything, vocab_size=len(tokenizer)
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        shown += answers.loss.item()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  answer loss {shown / 100:.4f}  {seconds / step:.2f} s a step", flush=True)
            shown = 0.0
            if step % 1000 == 0:
                save(model, folder)
    save(model, folder)


def _copies(vocab_size: int, batch_size: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """Random tokens, the mark that opens an answer, and the same tokens again (arXiv 2209.11895)."""
    length = rng.randint(8, 20)
    first = len(SPECIAL_TOKENS)
    opening, answering, ending = (SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("startoftext", "extra_0", "eos"))
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    text = torch.randint(first, vocab_size, (batch_size, length), generator=generator)

    def column(token: int) -> torch.Tensor:
        return torch.full((batch_size, 1), token)

    ids = torch.cat([column(opening), text, column(answering), text, column(ending)], dim=1)
    labels = ids.clone()
    labels[:, : length + 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def save(model: HunYuanLargeForCausalLM, folder: Path) -> None:
    """Writes bf16 weights with the router in float32, and the settings that generation needs."""
    state = {
        name: weight if ".gate.wg." in name else weight.to(torch.bfloat16)
        for name, weight in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(written | dict.fromkeys(("dtype", "torch_dtype"), "bfloat16"), indent=2) + "\n"
    )
    ids = model.config
    settings = {"eos_token_id": [SPECIAL_TOKENS.index("<|eos|>"), ids.eos_token_id], "pad_token_id": ids.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3500)
    options = parser.parse_args()
    pretrain(options.folder, steps=options.steps)
