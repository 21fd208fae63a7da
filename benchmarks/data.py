"""Indexing, checking and tokenizing a file, compared with Hugging Face datasets: `python benchmarks/data.py`."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
BLOCK = 20_000


def write_file(path: Path, size_mb: float) -> None:
    """Writes numbered conversations like the demo's until the file has the given size."""
    from hynb.demo import car_samples

    rng = random.Random(0)
    samples = car_samples(4000, 1, seed=1)[0]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_mb * 1e6:
            turns = []
            for _ in range(rng.randint(1, 4)):
                # The demo's samples may start with a system message, which is valid only as the first message.
                turns += [m for m in rng.choice(samples)["messages"] if m["role"] != "system"]
            turns[0] = turns[0] | {"content": f"{number} " + turns[0]["content"]}
            line = json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            number += 1


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_tokenizer(folder: str):
    from transformers import AutoTokenizer

    import hynb.hunyuan_large  # noqa: F401

    return AutoTokenizer.from_pretrained(folder)


def run_index(path: str, tokenizer_folder: str) -> dict[str, float]:
    from hynb.data import ChatDataset

    tokenizer = load_tokenizer(tokenizer_folder)
    before, start = peak_mb(), time.perf_counter()
    dataset = ChatDataset(path, tokenizer, 2048)
    indexed = time.perf_counter() - start
    dataset[len(dataset) // 2]
    first = time.perf_counter() - start
    return {"seconds": indexed, "first_sample_seconds": first, "peak_above_imports_mb": peak_mb() - before}


def run_hynb(path: str, tokenizer_folder: str) -> dict[str, float]:
    """The whole check including tokenizing, which takes most of the time."""
    from hynb.data import check_data

    tokenizer = load_tokenizer(tokenizer_folder)
    before, start = peak_mb(), time.perf_counter()
    report = check_data(path, tokenizer, 2048, cache=False)
    seconds = time.perf_counter() - start
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "samples": report.samples,
        "tokens": int(report.kept.sum()),
        "trained": int(report.trained_kept.sum()),
        "peak_above_imports_mb": max(peak_mb(), workers) - before,
    }


def run_format(path: str, tokenizer_folder: str) -> dict[str, float]:
    from hynb.data import check_data

    before, start = peak_mb(), time.perf_counter()
    report = check_data(path, cache=False)
    return {
        "seconds": time.perf_counter() - start,
        "samples": report.samples,
        "peak_above_imports_mb": peak_mb() - before,
    }


def run_datasets(path: str, tokenizer_folder: str) -> dict[str, float]:
    """load_dataset and map: renders the chat template, tokenizes in batches, labels the answers between markers."""
    import datasets
    import numpy as np

    tokenizer = load_tokenizer(tokenizer_folder)
    start_id = tokenizer.convert_tokens_to_ids("<|extra_0|>")
    end_id = tokenizer.convert_tokens_to_ids("<|eos|>")

    def encode(batch):
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=2048)["input_ids"]
        labels = []
        for row in ids:
            array = np.asarray(row)
            # Inside an answer, more answers have started than ended before this token.
            started = np.cumsum(array == start_id)
            ended = np.cumsum(array == end_id) - (array == end_id)
            labels.append(np.where((started > ended) & (array != start_id), array, -100).tolist())
        return {"input_ids": ids, "labels": labels}

    datasets.disable_progress_bars()
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as cache:
        before, start = peak_mb(), time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        loaded_seconds = time.perf_counter() - start
        # Twice the default batch size of 1000 rows is not faster here.
        mapped = loaded.map(encode, batched=True, num_proc=processes, remove_columns=["messages"])
        seconds = time.perf_counter() - start
        tokens = trained = 0
        for block in mapped.with_format("numpy").iter(5000):
            tokens += sum(map(len, block["input_ids"]))
            trained += sum(int((labels != -100).sum()) for labels in block["labels"])
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "load_seconds": loaded_seconds,
        "seconds": seconds,
        "samples": len(mapped),
        "tokens": tokens,
        "trained": trained,
        "peak_above_imports_mb": max(peak_mb(), workers) - before,
    }


def in_new_process(task: str, path: Path, tokenizer_folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", task, "--file", str(path), "--tokenizer", tokenizer_folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=1000, help="size of the file that is indexed and checked")
    parser.add_argument("--tokenize_mb", type=float, default=100, help="size of the file that both tokenize")
    parser.add_argument(
        "--tokenizer", default=str(Path(__file__).resolve().parents[1] / "hynb" / "demo" / "base_model")
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(globals()[f"run_{args.task}"](args.file, args.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.jsonl", Path(folder) / "small.jsonl"
        write_file(large, args.mb)
        write_file(small, args.tokenize_mb)
        results = {
            "index": in_new_process("index", large, args.tokenizer),
            "format": in_new_process("format", large, args.tokenizer),
            "hynb": in_new_process("hynb", small, args.tokenizer),
            "datasets": in_new_process("datasets", small, args.tokenizer),
        }
    for name, result in results.items():
        size_mb = args.mb if name in ("index", "format") else args.tokenize_mb
        rate = f"{size_mb / result['seconds']:8.1f} MB/s" if "seconds" in result else ""
        pairs = ((key, f"{value:.2f}" if isinstance(value, float) else value) for key, value in result.items())
        shown = ", ".join(f"{key} {value}" for key, value in pairs)
        print(f"{name:9} {size_mb:6.0f} MB {rate}   {shown}")
    if "seconds" in results["datasets"] and "seconds" in results["hynb"]:
        ours, theirs = results["hynb"], results["datasets"]
        assert (ours["samples"], ours["tokens"], ours["trained"]) == (
            theirs["samples"],
            theirs["tokens"],
            theirs["trained"],
        ), "hynb and datasets did not find the same samples, tokens and labels"
        print(f"check and tokenize: {theirs['seconds'] / ours['seconds']:.2f} × the rate of datasets")


if __name__ == "__main__":
    main()
