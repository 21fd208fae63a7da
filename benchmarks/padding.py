"""Tokens per second with plain padding, with group_by_length and with packing: `python benchmarks/padding.py`."""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from hynb.data import IGNORED, Collator, PackedDataset, SeededSampler, best_fit
from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8, help="samples per padded batch")
    parser.add_argument("--median", type=float, default=70.0, help="median of the lognormal lengths, in tokens")
    parser.add_argument("--sigma", type=float, default=0.9)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    rng = random.Random(0)
    limit = args.max_seq_length
    lengths = [min(limit, 8 + int(args.median * rng.lognormvariate(0, args.sigma))) for _ in range(args.samples)]
    samples = [{"input_ids": [rng.randrange(1000) for _ in range(length)]} for length in lengths]
    for sample in samples:
        half = len(sample["input_ids"]) // 2
        sample["labels"] = [IGNORED] * half + sample["input_ids"][half:]
    packed = PackedDataset(samples, best_fit(lengths, limit))
    # As many positions per step as a padded batch has on average, so that a step takes as much memory.
    plain_order = list(SeededSampler(len(samples), 0))
    grouped_order = list(SeededSampler(len(samples), 0, lengths=lengths, group=args.batch_size))
    collate = Collator(pad_token_id=0)

    def batches(dataset, order, size):
        return [collate([dataset[index] for index in order[at : at + size]]) for at in range(0, len(order), size)]

    plain = batches(samples, plain_order, args.batch_size)
    positions = sum(batch["input_ids"].numel() for batch in plain)
    packs_per_step = max(1, round(positions / len(plain) / limit))
    work = {
        "plain padding": plain,
        "group_by_length": batches(samples, grouped_order, args.batch_size),
        "packing": batches(packed, list(SeededSampler(len(packed), 0)), packs_per_step),
    }
    config = HunYuanLargeConfig(
        vocab_size=1000,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden_size // 4,
        num_experts=8,
        moe_topk=1,
        use_cla=True,
        cla_share_factor=2,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cache=False,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    # With matrices this small, two threads would mostly wait for each other.
    torch.set_num_threads(1)
    model = HunYuanLargeForCausalLM(config)

    def run(name):
        start = time.perf_counter()
        for batch in work[name]:
            model(**batch).loss.backward()
            model.zero_grad()
        return time.perf_counter() - start

    model(**work["packing"][0]).loss.backward()
    # Alternating, so that other load on the machine affects all of them equally.
    seconds = {name: [] for name in work}
    for _ in range(args.rounds):
        for name in work:
            seconds[name].append(run(name))
    tokens = sum(lengths)
    print(f"{len(samples)} samples, {tokens} tokens; lognormal: median {args.median}, sigma {args.sigma}, <= {limit}")
    base = statistics.median(seconds["plain padding"])
    for name, of_rounds in seconds.items():
        middle = statistics.median(of_rounds)
        filled = tokens / sum(batch["input_ids"].numel() for batch in work[name])
        print(
            f"{name:16} {tokens / middle:8.0f} tokens/s   {base / middle:5.2f} × plain   "
            f"{filled:6.1%} of positions hold a token   {len(work[name])} steps"
        )


if __name__ == "__main__":
    main()
