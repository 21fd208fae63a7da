"""Mutated input of every kind ends in the project's own errors or is read as a whole; nothing hangs or takes 1 GB.

HYNB_FUZZ=10000 tries so many inputs of each kind; otherwise each kind gets 40. The seeds are fixed. With `-s` each
kind prints how many inputs it tried, in how many seconds, and the memory that it took.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard
from tiny import model_and_data
from transformers import PreTrainedTokenizerBase

from hynb import cli
from hynb.cluster import host_facts, hostfile
from hynb.config import Config, read_flags, read_yaml, to_yaml
from hynb.config.reading import IGNORED, RENAMED, Reading
from hynb.data import LabelOptions, check_data, encode, load_tokenizer_folder, read_conversations
from hynb.data.files import lines
from hynb.data.records import parse_line
from hynb.errors import HynbError
from hynb.files import write_json
from hynb.launch import Run
from hynb.merge import shards
from hynb.merge.adapter import open_adapter
from hynb.models import describe
from hynb.plan import ops, zero
from hynb.runs import RunReader, RunWriter, check_checkpoint, check_run, check_same_shape, compare, made_with
from hynb.runs.checkpoint import saved_step
from hynb.runs.command import describe_checkpoint
from hynb.widgets.curve import Curve

COUNT = int(os.environ.get("HYNB_FUZZ", "40"))
HANG_SECONDS, MEMORY_BYTES = 60, 1 << 30
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1 << 40, 1 << 70, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "1",
        "auto",
        "last",
        "..",
        "../x",
        "/",
        "\0",
        "\ud800",
        "é" * 200,
        "x" * 5000,
        "[",
        "*",
        "%s",
        "{}",
        "~x",
    ),
    *([], [[]], [None], {}, {"": None}, {"a": {"a": {}}}, [1, 2], ["x", 1]),
]
TOKENS = [
    "\0",
    "\n",
    "\t",
    "[" * 2000,
    "{" * 2000,
    "&a",
    "*a",
    "!!",
    "!!python/name:x",
    "<<:",
    "- ",
    ": ",
    "#",
    '"',
    "'",
]
TOKENS += ["9" * 5000, "1e999", "-", "--", "=", ",", "[::1]:8", "\ufeff", "\x85", "￿", "0x", "1:30:00", "2001-01-01"]


def mutated_text(random_: random.Random, data: bytes) -> bytes:
    """The bytes with one to three changes: flipped, cut, removed, doubled or replaced by something odd."""
    for _ in range(random_.randint(1, 3)):
        at, length = random_.randint(0, len(data)), random_.randint(0, 30)
        match random_.randrange(6):
            case 0:
                data = data[:at] + bytes([random_.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[:at] + data[at : at + length] * random_.randint(2, 50) + data[at + length :]
            case 4:
                data = data[:at] + random_.choice(TOKENS).encode("utf-8", "surrogatepass") + data[at:]
            case 5:
                data = data[:at] + random_.choice(TOKENS).encode("utf-8", "surrogatepass") + data[at + length :]
    return data


def mutated_json(random_: random.Random, value: Any) -> bytes:
    """JSON with one to three values replaced, removed, renamed or moved; or its text changed."""
    value = copy.deepcopy(value)
    if random_.random() < 0.3:
        return mutated_text(random_, json.dumps(value).encode())
    for _ in range(random_.randint(1, 3)):
        places = list(places_of(value))
        if not places or random_.random() < 0.02:
            value = random_.choice(ODD)
            break
        holder, key = random_.choice(places)
        match random_.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random_.choice(["x", "", "__metadata__", "v", "id"])] = holder.pop(key)
            case 2:
                holder[key] = copy.deepcopy(random_.choice(places)[0])
            case _:
                holder[key] = copy.deepcopy(random_.choice(ODD))
    return json.dumps(value).encode("utf-8", "surrogatepass")


def places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places_of(item)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Within it allocations fail where the process would take 1 GB more than it has."""
    status = Path("/proc/self/status").read_text()
    used_bytes = int(status.split("VmData:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def fuzz(seed: int, mutate: Callable[[random.Random], Any], use: Callable[[Any], object]) -> None:
    """Gives mutated inputs to the code under test.

    Raises:
        pytest.fail.Exception: an input ended in another error than the project's own, hung, or took too much memory.
    """
    random_ = random.Random(seed)
    failures: dict[str, list[tuple[str, Any]]] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def hung(*_: object) -> None:
        raise TimeoutError(f"more than {HANG_SECONDS} s")

    signal.signal(signal.SIGALRM, hung)
    started = time.monotonic()
    for _ in range(COUNT):
        item = mutate(random_)
        signal.alarm(HANG_SECONDS)
        try:
            with (
                limited_memory(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                use(item)
        except HynbError as error:
            assert error.problems and all(isinstance(text, str) and text for text in error.problems)
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            failures.setdefault(f"{type(error).__name__} at {where}", []).append((str(error)[:200], item))
        finally:
            signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{os.environ['PYTEST_CURRENT_TEST']}: {COUNT} inputs, {sum(map(len, failures.values()))} failures, "
        f"{time.monotonic() - started:.0f} s, memory grew by {grown / 1e6:.0f} MB"
    )
    shown = "\n".join(
        f"{len(found)} times {kind}: {found[0][0]}: {found[0][1]!r:.300}" for kind, found in failures.items()
    )
    if failures:
        # An assertion would print all inputs.
        pytest.fail(shown, pytrace=False)
    assert grown < MEMORY_BYTES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return model_and_data(folder)


@functools.cache
def parser() -> argparse.ArgumentParser:
    return cli._parser()


def shown(command: str, folder: Path) -> None:
    """Runs a command of `hynb`, without the milliseconds of building its parser."""
    args = parser().parse_args([command, str(folder)])
    args.run(args)


def of_text(data: bytes) -> Callable[[random.Random], bytes]:
    return lambda random_: mutated_text(random_, data)


def of_json(value: Any) -> Callable[[random.Random], bytes]:
    return lambda random_: mutated_json(random_, value)


def all_taken(reading: Reading, given: Iterable[str]) -> None:
    """Fails where a reading without a problem has left out a name that was given."""
    names = {RENAMED.get(name, name) for name in given}
    assert names <= reading.values.keys() | reading.training_args.keys() | IGNORED.keys() | {"local_rank"}


def test_run_yaml(tmp_path):
    path = tmp_path / "run.yaml"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        reading = read_yaml(path)
        reading.config(str(path))
        all_taken(reading, yaml.safe_load(path.read_text(encoding="utf-8-sig")) or ())

    fuzz(1, of_text(to_yaml(Config(model_name_or_path="m", train_data_file="d.jsonl")).encode()), use)
    fuzz(
        2, of_json({"max_steps": 3, "lora_target_modules": ["q_proj"], "adam_beta2": 0.9, "learning_rate": 1e-4}), use
    )


def test_flags():
    words = ["--model_name_or_path", "m", "--train_data_file=d", "--bf16", "--max_steps", "3", "--adam_beta2", "0.9"]
    words += ["--lora_target_modules", "q_proj", "k_proj", "--lr_scheduler_kwargs", '{"a": 1}', "--optim_args", "x"]

    def mutate(random_: random.Random) -> list[str]:
        given = list(words)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(given))
            text = given[at]
            odd = str(random_.choice([*(item for item in ODD if item != 10**400), *TOKENS]))
            given[at : at + 1] = random_.choice(
                [[], [odd], [text, text], [text, odd], [f"{text}={odd}"], [text[:-1]]]
            )
            if not given:
                break
        return given

    def use(given: list[str]) -> None:
        reading = read_flags(given)
        reading.config("command line")
        all_taken(reading, [word[2:].partition("=")[0].replace("-", "_") for word in given if word[:2] == "--"])

    fuzz(3, mutate, use)


def test_deepspeed_json(tmp_path):
    path = tmp_path / "ds.json"
    values = Config(model_name_or_path="m", train_data_file="d").deepspeed_values()

    def use(data: bytes) -> None:
        path.write_bytes(data)
        ds_config = zero.load(str(path))
        zero.stage_of(ds_config)
        ops.compiled_ops(zero.for_machine(ds_config, on_cpu=False), on_cpu=False)
        if not zero.problems(ds_config, values):
            ds_config, _ = zero.correct(ds_config, values)
            zero.for_machine(zero.saving_whole_weights(ds_config)[0], on_cpu=True)

    fuzz(4, of_json(zero.load("ds_zero3_offload")), use)


def entries(text: str) -> int:
    """The number of hosts in a hostfile or a list of them."""
    return sum(1 for line in text.split("\n") for entry in line.partition("#")[0].split(",") if entry.strip())


def test_hosts(tmp_path):
    path = tmp_path / "hostfile"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        hosts = hostfile.read(path)
        assert len(hosts) == entries(data.decode())
        hostfile.select(hosts, include=data[:40].decode(errors="replace") or None)
        hostfile.to_text(hosts)

    fuzz(5, of_text(b"# hosts\nworker-0 slots=8\n10.0.0.2 slots=4\n[fe80::1%eth0]:2\n"), use)

    def use_named(data: bytes) -> None:
        text = data.decode(errors="replace")
        assert len(hostfile.named(text)) == entries(text)

    fuzz(6, of_text(b"10.0.0.1:8,10.0.0.2:8,[::1]:4"), use_named)


STEP = {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9.0, "step_seconds": 1.0, "grad_norm": 0.1}
PROCESS = {"host": "elsewhere", "pid": 1, "boot_id": "b", "start_ticks": 1}
END = {"state": "failed", "exit_code": 1, "reason": "r", "host": "h", "rank": 0}
RECORDS = {
    "status.json": {"state": "running", "phase": "saving", "global_step": 3, "max_steps": 9, "process": PROCESS},
    "launch.json": {
        "id": "1" * 32,
        "process": PROCESS,
        "started_at": 1.0,
        "ssh": "",
        "membership": {"start_seconds": 600, "hosts": [["a", 1], ["b", 2]], "run_folder": "/r"},
    },
    "exit.json": END | {"id": "1" * 32},
    "hosts.json": {"hosts": [{"name": "a", "ranks": [0], "state": "waiting"}] * 2, "output_dir": ""},
    "manifest.json": {"world_size": 2, "versions": {"torch": "2"}, "hosts": ["a"]},
    "heartbeat": {"phase": "training", "global_step": 3, "progress": "1 of 2"},
    "log/failure_rank0.json": {"rank": 0, "host": "h", "time": 1.0, "reason": "r", "lost_connection": True},
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_a_run_folder(tmp_path, name):
    folder = tmp_path / "run"
    writer = RunWriter(folder)
    writer.event("log", 1, **STEP)
    (folder / "log").mkdir()
    given = RECORDS | ({"status.json": END} if name in ("manifest.json", "log/failure_rank0.json") else {})
    for other, content in given.items():
        if other != "exit.json" or name == "exit.json":
            write_json(folder / other, content)

    def use(data: bytes) -> None:
        (folder / name).write_bytes(data)
        shown("status", folder)
        run = Run(folder)
        run.reader.manifest()
        run.frozen_processes()
        run.paste_lines()
        str(run.status())

    fuzz(7, of_json(given[name]), use)


def test_events(tmp_path):
    writer = RunWriter(tmp_path)
    writer.event("start", 0)
    writer.event("log", 1, **STEP)
    writer.event("eval", 1, eval_loss=0.5, eval_tokens=10, eval_perplexity=1.6, eval_seconds=2.0)
    writer.event("save", 1, path="checkpoint-1", seconds=0.1)
    writer.event("resume", 1)
    writer.event("log", 2, **STEP)
    writer.status("finished", exit_code=0, global_step=2, max_steps=2)
    events = [json.loads(line) for line in writer.dir.events.read_text().splitlines()]

    def mutate(random_: random.Random) -> bytes:
        if random_.random() < 0.2:
            return mutated_text(random_, b"".join(json.dumps(event).encode() + b"\n" for event in events))
        chosen = random_.randrange(len(events))
        return b"".join(
            (mutated_json(random_, event) if number == chosen else json.dumps(event).encode()) + b"\n"
            for number, event in enumerate(events)
        )

    def use(data: bytes) -> None:
        writer.dir.events.write_bytes(data)
        shown("status", tmp_path)
        shown("attach", tmp_path)
        Curve.of(RunReader(tmp_path).events())

    fuzz(8, mutate, use)


def test_checkpoints(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "global_step3").mkdir()
    (folder / "x.bin").write_bytes(bytes(8))
    config = Config(model_name_or_path="m", train_data_file="d.jsonl")
    record = {
        "world_size": 2,
        "zero_stage": 2,
        "use_lora": False,
        "global_batch_size": 2,
        "global_step": 3,
        "saved_at": 1.0,
        "loss": 0.5,
        "files": {"x.bin": {"bytes": 8, "sha256": "0" * 64}, "trainer_state.json": {"bytes": 30, "sha256": "1" * 64}},
        "made_with": made_with(config, "h"),
    }
    state = {"global_step": 3, "max_steps": 9, "epoch": 1.0}
    shape = {"world_size": 2, "zero_stage": 2, "use_lora": False, "sequence_parallel_size": 1}

    def use(data: bytes, name: str) -> None:
        write_json(folder / "hynb_checkpoint.json", record)
        write_json(folder / "trainer_state.json", state)
        (folder / name).write_bytes(data)
        with contextlib.suppress(HynbError):
            check_checkpoint(folder, trusted=False)
            describe_checkpoint(folder, deep=True)
        with contextlib.suppress(HynbError):
            saved_step(folder)
        check_same_shape(folder, shape)
        compare(folder, made_with(config, "h"), [], samples=(2, 2))

    for name, content in (("hynb_checkpoint.json", record), ("trainer_state.json", state)):
        fuzz(9, of_json(content), lambda data, name=name: use(data, name))


def test_adapter_config(tmp_path):
    header = shards.file_header([("base_model.model.q.lora_A.weight", "F32", (2, 2))], {})
    (tmp_path / "adapter_model.safetensors").write_bytes(header + bytes(16))
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "alpha_pattern": {"q": 4},
        "rank_pattern": {"q": 4},
        "use_rslora": True,
        "target_modules": ["q", "v"],
        "target_parameters": ["e"],
        "init_lora_weights": True,
        "base_model_name_or_path": "/no/base",
    }

    def use(data: bytes) -> None:
        (tmp_path / "adapter_config.json").write_bytes(data)
        adapter = open_adapter(tmp_path, 1.0)
        adapter.problems() or adapter.factor("model.q", 8)
        describe(tmp_path)

    fuzz(10, of_json(settings), use)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_base(files, tmp_path, name, monkeypatch):
    # What of this machine each check looks at, which takes most of its time, is the same for all inputs.
    for of_machine in ("version", "build_tools"):
        monkeypatch.setattr(host_facts, of_machine, functools.cache(getattr(host_facts, of_machine)))
    folder = tmp_path / "model"
    # Chat templates have a test of their own.
    shutil.copytree(files / "model", folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    path = folder / name
    run = Config(
        model_name_or_path=str(folder),
        train_data_file=str(files / "train.jsonl"),
        output_dir=str(tmp_path / "run"),
        sequence_parallel_size=1 if name != "config.json" else 2,
    )
    if name == "config.json":
        mutate = of_json(json.loads(path.read_text()))
    elif name == "model.safetensors":
        whole = path.read_bytes()
        length = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:length])

        def mutate(random_: random.Random) -> bytes:
            if random_.random() < 0.3:
                return mutated_text(random_, whole[: length + 100])
            text = mutated_json(random_, header)
            return len(text).to_bytes(8, "little") + text + whole[length:]

    else:
        names = [entry.name for entry in shards.read_shard(folder / "model.safetensors").tensors]
        mutate = of_json({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")})

    def use(data: bytes) -> None:
        path.write_bytes(data)
        for work in (lambda: check_run(run), lambda: shards.model_shards(folder), lambda: describe(folder)):
            with contextlib.suppress(HynbError):
                work()

    fuzz(11, mutate, use)


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}], "id": 1},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "Wie heißt es?"},
            {"role": "assistant", "content": "so 车", "reasoning_content": "hm"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes", "train": False},
            {"role": "user", "content": "ok"},
            {"role": "assistant", "content": "fine"},
        ]
    },
    {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]},
]
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in CONVERSATIONS)


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz", "train.jsonl.zst"])
def test_data_files(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / name
    whole = {
        "train.jsonl": LINES,
        "train.json": json.dumps(CONVERSATIONS, indent=1).encode(),
        "train.jsonl.gz": gzip.compress(LINES * 9, mtime=1),
        "train.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINES * 9),
    }[name]

    def mutate(random_: random.Random) -> bytes:
        if name == "train.json" and random_.random() < 0.7:
            return mutated_json(random_, CONVERSATIONS)
        if name == "train.jsonl" and random_.random() < 0.7:
            chosen = random_.randrange(len(CONVERSATIONS))
            return b"".join(
                (mutated_json(random_, record) if number == chosen else json.dumps(record).encode()) + b"\n"
                for number, record in enumerate(CONVERSATIONS)
            )
        return mutated_text(random_, whole)

    def use(data: bytes) -> None:
        path.write_bytes(data)
        try:
            if name not in ("train.jsonl", "train.json") and data:
                # Both formats have checksums: what is not refused is what was compressed.
                assert b"".join(line for _, line in lines(path)) == LINES * 9
            report = check_data(path, on_bad_sample="report", cache=False)
            assert report.lines == report.samples + len(report.rejected)
            if not report.rejected:
                assert len(list(read_conversations(path))) == report.samples
        finally:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    fuzz(12, mutate, use)


def trained_text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """The answers that a conversation is trained on."""
    conversation = parse_line(json.dumps(CONVERSATIONS[number]).encode(), "f:1")
    labels = encode(conversation, tokenizer, 1 << 20, LabelOptions(allow_ignored_fields=True))["labels"]
    return tokenizer.decode([label for label in labels if label >= 0])


def test_tokenizer_config(files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json.loads(path.read_text()) | {
        "chat_template": template.read_text(),
        "added_tokens_decoder": {"3": {"content": "<|extra_0|>", "special": True, "lstrip": False}},
        "additional_special_tokens": ["<|extra_4|>"],
        "extra_special_tokens": {"image_token": "<|extra_1|>"},
        "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    template.unlink()

    def use(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(HynbError):
            describe(folder)
        tokenizer = load_tokenizer_folder(folder)
        if tokenizer.chat_template:
            text = trained_text(tokenizer, 0)
            assert "because" in text, text

    fuzz(13, of_json(settings), use)


TEMPLATE = """{%- macro thought(text) -%}{%- if text is string and text %}<think>{{ text | trim }}</think>{% endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}
{%- if tools -%}<|extra_1|>{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}<|extra_2|>{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ '<|startoftext|>' + message['content'] + '<|extra_4|>' }}
{%- elif message['role'] == 'user' -%}{{ message['content'] + '<|extra_0|>' }}
{%- elif message['role'] == 'assistant' -%}
{%- if message.tool_calls -%}{%- for call in message.tool_calls -%}{{ call.function | tojson }}{%- endfor -%}
{%- endif -%}
{{ thought(message.reasoning_content) }}{{ message['content'].split('</think>')[-1] + '<|eos|>' }}
{%- else -%}{{ raise_exception('unknown role ' ~ message.role) }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '' }}{%- endif -%}"""
JINJA = ["{{", "}}", "{%", "%}", "{#", "#}", "{% for x in range(99999) %}", "{% endfor %}", "{{ 'x' * 999999999 }}"]
JINJA += [
    "{% set messages = [] %}",
    "messages[0]",
    "loop.index",
    " | tojson",
    " | safe",
    " ~ ",
    "'",
    "%s",
    " ** 9999",
]
JINJA += [
    "{{ messages.append(1) }}",
    "{{ ''.__class__ }}",
    "{% include 'x' %}",
    "{{ self }}",
    "is_training",
    "\ufdd0",
]


def test_chat_template(files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    tokenizer = load_tokenizer_folder(folder)

    def mutate(random_: random.Random) -> bytes:
        data = TEMPLATE
        for _ in range(random_.randint(0, 2)):
            # Between words, so that more of the templates are valid.
            words = re.split(r"(\W)", data)
            at = random_.randrange(len(words))
            words[at : at + random_.randint(0, 3)] = [random_.choice([random_.choice(words), random_.choice(JINJA)])]
            data = "".join(words)
        return mutated_text(random_, data.encode()) if data == TEMPLATE or random_.random() < 0.3 else data.encode()

    def use(data: bytes) -> None:
        (folder / "chat_template.jinja").write_bytes(data)
        with contextlib.suppress(HynbError):
            describe(folder)
        tokenizer.chat_template = data.decode(errors="replace")
        for number, answers in enumerate((["because"], ["so 车", "fine"])):
            with contextlib.suppress(HynbError):
                text = trained_text(tokenizer, number)
                assert all(answer in text for answer in answers), text

    fuzz(14, mutate, use)
