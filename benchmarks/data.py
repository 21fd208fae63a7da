"""Indexing, checking and tokenizing a file, compared with the tokenizer alone: `python benchmarks/data.py`.

Hugging Face datasets is compared too where it is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROUNDS = 3


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
    with new_cache(), OwnMemory() as memory:
        start = time.perf_counter()
        dataset = ChatDataset(path, tokenizer, 2048)
        indexed = time.perf_counter() - start
        dataset[len(dataset) // 2]
        first = time.perf_counter() - start
        start = time.perf_counter()
        ChatDataset(path, tokenizer, 2048)
        again = time.perf_counter() - start
    return {
        "seconds": indexed,
        "first_sample_seconds": first,
        "again_seconds": again,
        "own_memory_mb": memory.peak_mb,
    }


class OwnMemory:
    """The highest memory of this process and its workers above that at the start, file pages left out."""

    def __init__(self) -> None:
        self._start = self._of("self")
        self._peak = 0
        self._is_done = threading.Event()

    @staticmethod
    def _of(process: str) -> int:
        with contextlib.suppress(OSError, KeyError):
            lines = dict(line.split(":") for line in Path(f"/proc/{process}/status").read_text().splitlines())
            return (int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0])) << 10
        return 0

    def _sample(self) -> None:
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
        # A worker shares what it was forked with.
        added = [max(0, self._of(child) - self._start) for child in children]
        self._peak = max(self._peak, self._of("self") - self._start, *added)

    def _watch(self) -> None:
        while not self._is_done.wait(0.02):
            self._sample()

    def __enter__(self) -> OwnMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_done.set()
        self._thread.join()
        self._sample()

    @property
    def peak_mb(self) -> float:
        return self._peak / 1e6


@contextlib.contextmanager
def new_cache():
    """A cache of its own, in which nothing is kept yet."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield Path(folder)
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def run_hynb(path: str, tokenizer_folder: str) -> dict[str, float]:
    """The whole check including tokenizing and keeping the token ids."""
    from hynb.data import check_data

    tokenizer = load_tokenizer(tokenizer_folder)
    start = time.perf_counter()
    with new_cache(), OwnMemory() as memory:
        report = check_data(path, tokenizer, 2048)
    assert report.tokens, report.tokens_note
    return {
        "seconds": time.perf_counter() - start,
        "samples": report.samples,
        "tokens": int(report.kept.sum()),
        "trained": int(report.trained_kept.sum()),
        "own_memory_mb": memory.peak_mb,
    }


def encode_batches(tokenizer, texts: list[str]) -> int:
    tokens = 0
    for start in range(0, len(texts), 1000):
        encodings = tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        tokens += sum(len(item) for item in encodings)
    return tokens


def run_bare(path: str, tokenizer_folder: str) -> dict[str, float]:
    """The tokenizer alone over the rendered texts on all cores, and the check of the file, in alternating rounds."""
    from hynb.data import check_data, read_conversations
    from hynb.data.encoding import render

    loaded = load_tokenizer(tokenizer_folder)
    texts = [render(conversation, loaded).text for conversation in read_conversations(path)]
    processes = len(os.sched_getaffinity(0))
    parts = [texts[number::processes] for number in range(processes)]
    context = multiprocessing.get_context("fork")

    def check() -> None:
        with new_cache():
            report = check_data(path, loaded, 1 << 30, processes=processes)
            assert report.tokens, report.tokens_note

    def in_threads() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        encode_batches(loaded.backend_tokenizer, texts)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def in_processes() -> None:
        workers = [context.Process(target=encode_batches, args=(loaded.backend_tokenizer, part)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    tasks = {"check": check, "threads": in_threads, "processes": in_processes}
    wall: dict[str, list[float]] = {name: [] for name in tasks}
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            start, before = time.perf_counter(), os.times()
            task()
            wall[name].append(time.perf_counter() - start)
            # User and system time, of this process and its workers.
            cpu[name].append(sum(os.times()[:4]) - sum(before[:4]))
    seconds = {name: statistics.median(values) for name, values in wall.items()}
    found = {"seconds": seconds["check"]}
    for name in ("threads", "processes"):
        found[f"bare_in_{name}_seconds"] = seconds[name]
        found[f"rate_relative_to_{name}"] = seconds[name] / seconds["check"]
        found[f"cpu_rate_relative_to_{name}"] = statistics.median(cpu[name]) / statistics.median(cpu["check"])
    return found


def run_lines(path: str, tokenizer_folder: str) -> dict[str, float]:
    """Memory of a check per line, from files of short lines, one with four times as many as the other."""
    from hynb.data import check_data

    tokenizer = load_tokenizer(tokenizer_folder)
    peaks = []
    counts = (200_000, 800_000)
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            file = Path(folder) / f"{count}.jsonl"
            with file.open("w") as out:
                for number in range(count):
                    turns = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "a"}]
                    out.write(json.dumps({"messages": turns}) + "\n")
            with new_cache(), OwnMemory() as memory:
                start = time.perf_counter()
                assert check_data(file, tokenizer, 2048, processes=2).samples == count
                seconds = time.perf_counter() - start
            peaks.append(memory.peak_mb)
    per_line = (peaks[1] - peaks[0]) * 1e6 / (counts[1] - counts[0])
    return {
        "lines_seconds": seconds,
        "own_memory_200k_lines_mb": peaks[0],
        "own_memory_800k_lines_mb": peaks[1],
        "bytes_per_line": per_line,
    }


def run_first_batch(path: str, tokenizer_folder: str) -> dict[str, float]:
    """Seconds of two ranks from the data files to the first batch, after a run that has filled the cache.

    Both ranks start at the same time, and rank 1 waits for rank 0's plan, as in a run.
    """
    with new_cache() as cache:
        filled = in_ranks("rank", 1, path, tokenizer_folder, cache)
        found = {"fill_the_cache_seconds": filled[0]["first_batch_seconds"]}
        for task in ("rank", "packed_rank"):
            for rank, result in enumerate(in_ranks(task, 2, path, tokenizer_folder, cache)):
                found[f"{task}_{rank}_seconds"] = result["first_batch_seconds"]
                found[f"{task}_{rank}_own_memory_mb"] = result["own_memory_mb"]
    return found


def in_ranks(task: str, count: int, path: str, tokenizer_folder: str, folder: Path) -> list[dict[str, float]]:
    """What each rank of a process group finds.

    Args:
        folder: for the file by which the ranks meet.
    """
    store = folder / f"{task}_of_{count}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = [
            pool.submit(in_new_process, f"{task}_{rank}", Path(path), tokenizer_folder, f"{store} {count}")
            for rank in range(count)
        ]
        return [future.result() for future in started]


def run_rank(path: str, tokenizer_folder: str, meeting: str, *, rank: int, packing: bool) -> dict[str, float]:
    import torch
    from torch.utils.data import DataLoader

    from hynb.config import Config
    from hynb.data import Collator
    from hynb.train import broadcast_plan, build_datasets, check_datasets, training_sampler

    tokenizer = load_tokenizer(tokenizer_folder)
    store, count = meeting.rsplit(" ", 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=int(count))
    torch.distributed.barrier()
    with tempfile.TemporaryDirectory() as run, OwnMemory() as memory:
        config = Config(train_data_file=path, output_dir=run, max_seq_length=2048, packing=packing)
        start = time.perf_counter()
        plan = broadcast_plan(check_datasets(config, tokenizer) if rank == 0 else None)
        datasets = build_datasets(config, tokenizer, plan)
        sampler = training_sampler(config, datasets, 2)
        loader = DataLoader(datasets.train, batch_size=4, sampler=sampler, collate_fn=Collator(pad_token_id=0))
        batch = next(iter(loader))
        seconds = time.perf_counter() - start
        assert isinstance(batch["input_ids"], torch.Tensor)
    # A rank that ended first would take the group's connections with it.
    torch.distributed.barrier()
    return {"first_batch_seconds": seconds, "own_memory_mb": memory.peak_mb}


def run_format(path: str, tokenizer_folder: str) -> dict[str, float]:
    from hynb.data import check_data

    start = time.perf_counter()
    with OwnMemory() as memory:
        report = check_data(path, cache=False)
    return {
        "seconds": time.perf_counter() - start,
        "samples": report.samples,
        "own_memory_mb": memory.peak_mb,
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


def in_new_process(task: str, path: Path, tokenizer_folder: str, meeting: str = "") -> dict[str, float]:
    command = [sys.executable, __file__, "--task", task, "--file", str(path), "--tokenizer", tokenizer_folder]
    done = subprocess.run([*command, "--meeting", meeting], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def run_task(args: argparse.Namespace) -> dict[str, float]:
    if "rank_" in args.task:
        rank, packing = int(args.task[-1]), args.task.startswith("packed")
        return run_rank(args.file, args.tokenizer, args.meeting, rank=rank, packing=packing)
    return globals()[f"run_{args.task}"](args.file, args.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=1000, help="size of the file of index, format and first batch")
    parser.add_argument("--tokenize_mb", type=float, default=100, help="size of the file that is tokenized")
    parser.add_argument(
        "--only", nargs="*", default=["index", "format", "bare", "hynb", "lines", "first_batch", "datasets"]
    )
    parser.add_argument(
        "--tokenizer", default=str(Path(__file__).resolve().parents[1] / "hynb" / "demo" / "base_model")
    )
    for name in ("task", "file", "meeting"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(run_task(args)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.jsonl", Path(folder) / "small.jsonl"
        write_file(large, args.mb)
        write_file(small, args.tokenize_mb)
        for name in args.only:
            is_large = name in ("index", "format", "first_batch")
            result = results[name] = in_new_process(name, large if is_large else small, args.tokenizer)
            size_mb = args.mb if is_large else args.tokenize_mb
            rate = f"{size_mb / result['seconds']:8.1f} MB/s" if "seconds" in result else ""
            pairs = ((key, f"{value:.2f}" if isinstance(value, float) else value) for key, value in result.items())
            shown = ", ".join(f"{key} {value}" for key, value in pairs)
            print(f"{name:11} {size_mb:6.0f} MB {rate}   {shown}", flush=True)
    ours, theirs = results.get("hynb", {}), results.get("datasets", {})
    if "seconds" in theirs and "seconds" in ours:
        names = ("samples", "tokens", "trained")
        assert all(ours[name] == theirs[name] for name in names), "datasets did not find the same samples and labels"
        print(f"check and tokenize: {theirs['seconds'] / ours['seconds']:.2f} × the rate of datasets")


if __name__ == "__main__":
    main()
