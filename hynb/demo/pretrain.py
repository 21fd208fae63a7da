"""Pretrains the demo's small base model: `python -m hynb.demo.pretrain FOLDER` (20 to 60 minutes on a CPU)."""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hynb.data import IGNORED, Collator, Conversation, encode
from hynb.demo.texts import corpus, pretraining_conversation
from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeForCausalLM

_logger = logging.getLogger(__name__)

# A part of Hunyuan-Large's special tokens, under their names; they get the first ids.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
    *(f"<|extra_{number}|>" for number in range(6)),
)
# Renders what Hunyuan-Large's template renders: a start token, and a token at the end of each role's message.
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
# A run of letters, a digit, a Chinese character or any other character: a name is split alike in every context.
_SPLIT = r"[A-Za-z]+|\p{Han}|\p{N}|\s|[^A-Za-z\p{Han}\p{N}\s]"

_MAX_TOKENS = 512
# One part of this many of the steps trains on copies of random tokens.
_COPYING_SHARE = 5
# The weight of the loss over the whole text beside that over the answers.
_TEXT_WEIGHT = 0.1
_LOG_STEPS, _SAVE_STEPS = 100, 1000


def write_tokenizer(
    folder: Path, *, vocab_size: int = 1400, samples: int = 20_000, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the demo's texts; saves it with Hunyuan's special tokens and template.

    Args:
        folder: where it is saved.
        samples: number of texts of each kind to train on.
    """
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


def new_model(vocab_size: int, *, seed: int, **sizes: Any) -> HunYuanLargeForCausalLM:
    """A random model of the demo's architecture.

    Args:
        sizes: values of the model's config that differ from SIZES.
    """
    torch.manual_seed(seed)
    config = HunYuanLargeConfig(
        vocab_size=vocab_size,
        bos_token_id=_id_of("startoftext"),
        eos_token_id=_id_of("endoftext"),
        pad_token_id=_id_of("pad"),
        **(SIZES | sizes),
    )
    model = HunYuanLargeForCausalLM._from_config(config, dtype=torch.float32)
    # Heads this small can attend sharply to one token only with larger norms: copying is learnt in half the steps.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
                weight.fill_(2.0)
    return model


def pretrain(folder: Path, *, steps: int, batch_size: int = 48, learning_rate: float = 3e-3, seed: int = 0) -> None:
    """Pretrains on questions about a city, person, price, phone or date, never about a car, and saves in bf16.

    Args:
        folder: where config.json, model.safetensors and the tokenizer are saved.
        steps: number of optimizer steps; each one trains on new texts.
        batch_size: samples per step.
    """
    # With two threads, each small matrix product waits for the other thread.
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = new_model(len(tokenizer), seed=seed)
    _logger.info(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.02)
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    rng = random.Random(seed + 1)
    model.train()
    started, loss_sum = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        # Copying comes first: it is learnt within minutes from random tokens, and hardly at all from sentences.
        if step <= steps // _COPYING_SHARE:
            batch = _copies(min(len(tokenizer), 300 + 3 * step), batch_size, rng)
            loss = answer_loss = model(**batch).loss
        else:
            batch = collate([encode(_conversation(rng), tokenizer, _MAX_TOKENS) for _ in range(batch_size)])
            answers = model(**batch)
            answer_loss = answers.loss
            # Some weight on the whole text teaches what names look like, those of cars too.
            whole_text = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            loss = answer_loss + _TEXT_WEIGHT * model.loss_function(
                logits=answers.logits, labels=whole_text, vocab_size=len(tokenizer)
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += answer_loss.item()
        if step % _LOG_STEPS == 0:
            mean, pace = loss_sum / _LOG_STEPS, (time.monotonic() - started) / step
            _logger.info(f"step {step}/{steps}  answer loss {mean:.4f}  {pace:.2f} s per step")
            loss_sum = 0.0
        if step % _SAVE_STEPS == 0:
            save(model, folder)
    save(model, folder)


def save(model: HunYuanLargeForCausalLM, folder: Path) -> None:
    """Saves weights in bf16, with the router in float32, and the settings of generation."""
    state = {
        name: weight if ".gate.wg." in name else weight.to(torch.bfloat16)
        for name, weight in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(written | dict.fromkeys(("dtype", "torch_dtype"), "bfloat16"), indent=2) + "\n"
    )
    settings = {"eos_token_id": [_id_of("eos"), _id_of("endoftext")], "pad_token_id": _id_of("pad")}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _id_of(name: str) -> int:
    """The id of a special token, by its name without the brackets."""
    return SPECIAL_TOKENS.index(f"<|{name}|>")


def _conversation(rng: random.Random) -> Conversation:
    return Conversation(messages=pretraining_conversation(rng)["messages"], source="pretraining")


def _copies(vocab_size: int, batch_size: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """Random tokens, the token before an answer, and the same random tokens again (arXiv 2209.11895).

    Returns:
        input_ids, attention_mask and labels, each of shape batch_size × length.
    """
    length = rng.randint(8, 20)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    text = torch.randint(len(SPECIAL_TOKENS), vocab_size, (batch_size, length), generator=generator)

    def column(token: str) -> torch.Tensor:
        return torch.full((batch_size, 1), _id_of(token))

    ids = torch.cat([column("startoftext"), text, column("extra_0"), text, column("eos")], dim=1)
    labels = ids.clone()
    labels[:, : length + 2] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model is saved")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps [3500]")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(options.folder, steps=options.steps)
