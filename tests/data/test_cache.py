"""Files in the cache are made once by several processes, and no dead process holds the others up."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zstandard
from tiny import exchange, tiny_data, write_lines
from waiting import wait_until

from hynb.data import ChatDataset, check_data
from hynb.data.cache import cache_folder, content_hash, locked
from hynb.errors import DataError

UNPACK = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from pathlib import Path
from hynb.data import ChatDataset
print("ready", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
for path in sys.argv[2:]:
    dataset = ChatDataset(path, None, None)
    print("lines", len(dataset), dataset.location(len(dataset) - 1), flush=True)
"""


def test_several_processes_unpack_a_file_once(tmp_path):
    plain = tiny_data(tmp_path / "plain.jsonl", 8000)
    zipped, packed, array = (tmp_path / f"data.{suffix}" for suffix in ("jsonl.gz", "jsonl.zst", "json"))
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    packed.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    array.write_text("[" + ",".join(plain.read_text().splitlines()) + "]")
    command = [sys.executable, "-c", UNPACK, str(tmp_path / "go"), *map(str, (zipped, packed, array))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for path, last in ((zipped, ":8000"), (packed, ":8000"), (array, ": record 8000")):
        assert all(f"lines 8000 {path}{last}" in output for output in outputs)
        assert sum(output.count(f"{path}: unpacked to") for output in outputs) == 1
    # One more finds it, and nothing but what is kept remains.
    assert "unpacked" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not list(cache_folder().glob(".*"))


def test_a_killed_process_holds_no_lock(tmp_path):
    target = tmp_path / "cache" / "file"
    code = (
        "import sys, time; from pathlib import Path; from hynb.data.cache import locked\n"
        "with locked(Path(sys.argv[1])) as alone: print(alone, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    lock = target.with_name(".file.lock")
    assert lock.exists()
    process.kill()
    process.wait()
    assert lock.exists(), "the killed process left its file"
    with locked(target) as alone:
        assert alone
    assert not lock.exists()


def test_a_check_that_is_killed_leaves_nothing_that_others_wait_for(tokenizer, tokenizer_folder, tmp_path):
    path = tiny_data(tmp_path / "a.jsonl", 20_000)
    code = (
        "import sys; from transformers import AutoTokenizer; import hynb.hunyuan_large\n"
        "from hynb.data import check_data\n"
        "check_data(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 300, processes=2,"
        " progress=lambda done, total: print(done, flush=True))"
    )
    command = [sys.executable, "-c", code, str(path), str(tokenizer_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2 and list(cache_folder().glob(".tokens-*.part"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = check_data(path, tokenizer, 300, processes=2)
    assert report.samples == 20_000 and report.tokens and not report.from_cache
    assert not list(cache_folder().glob(".*"))
    wait_until(lambda: not any(worker.is_running() for worker in workers))


def test_a_large_file_is_indexed_once_and_a_damaged_index_is_made_again(tmp_path, caplog):
    path = tiny_data(tmp_path / "a.jsonl", 16_000)
    path.write_bytes(b"\xef\xbb\xbf\n\n" + path.read_bytes().replace(b"\n", b"\r\n \n"))
    assert path.stat().st_size > 4 << 20
    wait_until(lambda: time.time() - path.stat().st_ctime > 2)
    with caplog.at_level("INFO", logger="hynb"):
        first, second = (ChatDataset(path, None, None) for _ in range(2))
    assert sum("lines are indexed in" in message for message in caplog.messages) == 1
    expected = [(f"{path}:{number}", line) for number, line in enumerate(path.open("rb"), 1) if line.strip()][1:]

    def compare(dataset):
        assert len(dataset) == 16_000 and list(dataset.lines(0, 16_000)) == expected
        for index in (0, 1, 7000, 15_999):
            assert (dataset.location(index), dataset.line(index)) == expected[index]

    compare(first)
    compare(second)
    (stored,) = cache_folder().glob("index-*")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:-1000], b""):
        stored.write_bytes(damaged)
        compare(ChatDataset(path, None, None))
        assert stored.stat().st_size == len(content)


def test_a_changed_file_has_another_hash_and_index(tokenizer, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", exchange("q"), exchange("r"))
    wait_until(lambda: time.time() - path.stat().st_ctime > 2)
    before = content_hash(path)
    assert list(cache_folder().glob("hash-*")) and content_hash(path) == before
    write_lines(path, exchange("x"), exchange("r"))
    assert content_hash(path) != before
    # Without a cache that can be written, everything works, only slower.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert content_hash(path) != before and len(ChatDataset(path, None, None)) == 2
    assert check_data(path).samples == 2
    report = check_data(path, tokenizer, 99)
    assert (report.samples, report.tokens) == (2, None) and "cannot be written" in report.tokens_note


def test_a_cache_without_space_for_an_unpacked_file_is_named(tmp_path, monkeypatch):
    plain = tiny_data(tmp_path / "plain.jsonl", 50)
    path = Path(f"{tmp_path}/data.jsonl.gz")
    path.write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=rf"^{path}: cannot be unpacked into .*XDG_CACHE_HOME"):
        ChatDataset(path, None, None)
