"""Training runs for tests, on ranks that are forked from one process which has imported the libraries already.

A rank spends five seconds of processor time on imports and a launcher three more; a test of what the ranks do needs
neither twice. Runs that go through `launch`, `deepspeed` or `python -m` are tested beside these.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from tiny import OF_FAMILY, tiny_data, tiny_model, with_code

from hynb.cluster import free_port
from hynb.config import Config, to_yaml
from hynb.launch import Run, attach
from hynb.runs import Phase, RunDir, RunWriter, read_record
from hynb.supervision import processes_of

STEPS, SAVED = 6, 3
FAMILIES = tuple(OF_FAMILY)
# Time for the other ranks to end by themselves once one has failed.
_GRACE_SECONDS = 3.0


def make_files(folder: Path) -> dict[str, Path]:
    """A tiny model per family, by its name, and data: `data`, `few`, and `broken` with one invalid line."""
    files = {family: tiny_model(folder / family, family) for family in FAMILIES}
    with_code(files["hunyuan"])
    files |= {"data": tiny_data(folder / "train.jsonl"), "few": tiny_data(folder / "few.jsonl", 10)}
    files["broken"] = folder / "broken.jsonl"
    files["broken"].write_text(files["few"].read_text().replace("\n", '\n{"messages": \n', 1))
    return files


def config_of(files: dict[str, Path], family: str, output_dir: Path, **values) -> Config:
    """A run of six steps with a checkpoint in its middle."""
    given = {
        "model_name_or_path": str(files[family]),
        "train_data_file": str(files["data"]),
        "output_dir": str(output_dir),
        "num_processes": 2,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "warmup_ratio": 0.0,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_seq_length": 256,
    }
    return Config(**(given | values))


def losses(run: Run) -> dict[int, float]:
    """The loss of each logged step."""
    return {event["global_step"]: event["loss"] for event in run.events() if event["kind"] == "log"}


def process_of(run: Run, rank: int) -> psutil.Process:
    """The process of one rank of a launched run on this machine."""
    record = read_record(run.dir.launch)
    assert record
    (found,) = (item for item in processes_of(record["id"]) if f"--local_rank={rank}" in item.cmdline())
    return found


class RankServer:
    """A process that forks ranks; each runs `hynb.train_entry` as its main module.

    Args:
        folder: for the outputs of the ranks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def run(self, *argv: object, ranks: int = 1, before: str = "") -> subprocess.CompletedProcess:
        """The end of a run: the first exit code other than 0, and the output of all ranks, rank 0's first.

        Args:
            argv: of hynb.train_entry.
            ranks: their number; 1 for a process that no launcher has started.
            before: `module:function`, called in each rank before it begins.
        """
        self._count += 1
        outputs = [str(self._folder / f"{self._count}_rank{rank}") for rank in range(ranks)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "RANK"))}
        request = {"argv": [str(word) for word in argv], "outputs": outputs, "environment": environment}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request | {"before": before}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, (self._folder / "server.log").read_text()
        code = next((code for code in json.loads(line) if code), 0)
        out, err = ("".join(Path(name + end).read_text() for name in outputs) for end in (".out", ".err"))
        return subprocess.CompletedProcess(argv, code, out, err)

    def train(self, config: Config, *, before: str = "") -> Run:
        """A run that has ended well."""
        run_yaml = self._folder / f"{self._count}.yaml"
        run_yaml.write_text(to_yaml(config))
        done = self.run(run_yaml, ranks=config.num_processes or 1, before=before)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        log = RunDir(config.output_dir).log
        for rank in range(config.num_processes or 1):
            name = f"{time.strftime('%Y%m%d%H%M%S')}_rank{rank}.log"
            (log / name).write_text((self._folder / f"{self._count}_rank{rank}.out").read_text())
        return attach(config.output_dir)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        # Not by the end of its input alone, which a process that a test has forked may hold open.
        self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def print_phases() -> None:
    """To be called in a rank before it begins: each phase that rank 0 reports is printed too, and how far it is."""
    plain, plain_progress = RunWriter.phase, RunWriter.progress

    def phase(self: RunWriter, name: Phase) -> None:
        print(f"phase: {name}")
        plain(self, name)

    def progress(self: RunWriter, text: str) -> None:
        print(f"progress: {text}")
        plain_progress(self, text)

    RunWriter.phase, RunWriter.progress = phase, progress


def trace_gathering() -> None:
    """To be called in a rank before it begins: DeepSpeed prints which tensors it gathers when."""
    import logging

    from deepspeed.runtime.zero import partitioned_param_coordinator

    # Not DeepSpeed's own logger, whose level transformers sets.
    logger = logging.getLogger("trace")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(logging.StreamHandler(sys.stdout))
    partitioned_param_coordinator.logger = logger


def print_headers_read() -> None:
    """To be called in a rank before it begins: prints the name of each weight file whose header hynb reads."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(".safetensors"):
            frame = sys._getframe()
            while frame.f_back and frame.f_code.co_name != "read_shard":
                frame = frame.f_back
            if frame.f_code.co_name == "read_shard":
                print(f"header of {Path(args[0]).name}")

    sys.addaudithook(hook)


def save_in_both_ways() -> None:
    """To be called in a rank before it begins: each full model is also saved in transformers' own way, beside it."""
    from hynb.train import RunTrainer

    plain = RunTrainer.save_model

    def save_model(self: RunTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plain(self, output_dir, _internal_call)
        weights = self.accelerator.get_state_dict(self.deepspeed)
        if self.args.should_save:
            for name in getattr(self.model, "all_tied_weights_keys", {}):
                weights.pop(name, None)
            self.model.save_pretrained(self.run_dir.path / "by_transformers", state_dict=weights)

    RunTrainer.save_model = save_model


def record_routers_in_float32() -> None:
    """To be called in a rank before it begins: `routers.pt` in the run folder has the optimizer's weights of routers.

    `optimizer`: those at the last save; `logits`: inputs, logits and weights of each router in the last step.
    """
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    from hynb.train import RunTrainer
    from hynb.train.router_statistics import routers

    step, save = RunTrainer.training_step, RunTrainer.save_model
    seen: dict[str, Any] = {}

    def weights(self: RunTrainer) -> list[torch.Tensor]:
        model: Any = self.model
        found = [router for _, router in routers(model, model.config.model_type)]
        return [safe_get_full_fp32_param(next(router.parameters())).clone() for router in found]

    def training_step(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        found = [router for _, router in routers(model, model.config.model_type)]
        before, computed = weights(self), {}

        def keep(module: Any, inputs: Any, output: Any) -> None:
            logits = output if isinstance(output, torch.Tensor) else output[0]
            hidden = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            computed[module] = (hidden, logits.detach().reshape(len(hidden), -1))

        hooks = [router.register_forward_hook(keep) for router in found]
        result = step(self, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        seen["logits"] = [(*computed[router], weight) for router, weight in zip(found, before, strict=True)]
        return result

    def save_model(self: RunTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(self, output_dir, _internal_call)
        seen["optimizer"] = weights(self)
        if self.args.should_save:
            torch.save(seen, self.run_dir.path / "routers.pt")

    RunTrainer.training_step, RunTrainer.save_model = training_step, save_model


def fill_disk_of_rank_1() -> None:
    """To be called in a rank before it begins: rank 1 can write no weights."""
    import errno

    from hynb.train import saving

    def write_at(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "1":
        saving.write_at = write_at


def write_states_two_steps_late() -> None:
    """To be called in a rank before it begins: states are written two steps later, or after the last step."""
    from hynb.train import RunTrainer, background

    ended, plain_end, plain_wait = [0], RunTrainer._maybe_log_save_evaluate, background.BackgroundFiles.wait
    stop = threading.Event()

    def after_step(self: RunTrainer, *args: Any, **kwargs: Any) -> None:
        ended[0] += 1
        plain_end(self, *args, **kwargs)
        if self.state.global_step == STEPS:
            stop.set()

    def wait(self: background.BackgroundFiles) -> None:
        step = int(self.paths[0].parts[-2].removeprefix("global_step"))
        while ended[0] < step + 2 and not stop.is_set():
            time.sleep(0.01)
        plain_wait(self)

    RunTrainer._maybe_log_save_evaluate = after_step
    background.BackgroundFiles.wait = wait


def fill_disk_of_rank_1_in_background() -> None:
    """To be called in a rank before it begins: rank 1 cannot write the states of its second checkpoint."""
    import errno

    from hynb.train import background

    plain = background.BackgroundFiles.wait

    def wait(self: background.BackgroundFiles) -> None:
        if self.paths[0].parts[-2] == "global_step2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self)

    if os.environ["RANK"] == "1":
        background.BackgroundFiles.wait = wait


def fail_digests_of_rank_1() -> None:
    """To be called in a rank before it begins: rank 1 cannot read a file of its second checkpoint."""
    import errno

    from hynb.train import sealing

    plain = sealing.file_digests

    def file_digests(folder: Path, names: Any) -> Any:
        if folder.name == f"checkpoint-{STEPS}":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / "file"))
        return plain(folder, names)

    if os.environ["RANK"] == "1":
        sealing.file_digests = file_digests


def slow_work_of_one_rank() -> None:
    """To be called in a rank before it begins: rank 0 checks data, and rank 1 loads, for longer than others wait."""
    import hynb.train

    for rank, name in (("0", "check_datasets"), ("1", "load_model")):
        if os.environ["RANK"] == rank:
            _delay(hynb.train, name)


def slow_step_of_rank_1() -> None:
    """To be called in a rank before it begins: rank 1 does not end its first step for long."""
    from hynb.train import RunTrainer

    if os.environ["RANK"] == "1":
        _delay(RunTrainer, "training_step")


def slow_save_of_rank_1() -> None:
    """To be called in a rank before it begins: rank 1 writes its first tensor for long."""
    from hynb.train import saving

    if os.environ["RANK"] == "1":
        _delay(saving, "write_at")


def stop_after_step_3() -> None:
    """To be called in a rank before it begins: the run is asked to stop during step 3, and so ends at step 4."""
    from hynb.train import RunTrainer, stop_flag

    # Rank 0 looks for the file after each step.
    stop_flag._LOOK_SECONDS = 0.0
    plain = RunTrainer.training_step

    def training_step(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and self.run_writer:
            self.run_dir.stop_request.touch()
        return plain(self, *args, **kwargs)

    RunTrainer.training_step = training_step


def _delay(owner: Any, name: str) -> None:
    plain = getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, plain)
        time.sleep(float(os.environ["DELAY_SECONDS"]))
        return plain(*args, **kwargs)

    setattr(owner, name, late)


def preload() -> None:
    """Imports what ranks use, once for all that this process forks."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import gc
    import importlib

    import hynb.train

    hynb.train.import_libraries()
    importlib.import_module("hynb.hunyuan_large")
    for family in set(FAMILIES) - {"hunyuan"}:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name in hynb.train.__all__:
        getattr(hynb.train, name)
    # A rank's garbage collection would look at all of it, and copy its pages.
    gc.freeze()


def run_entry(argv: Sequence[str], before: str) -> NoReturn:
    """Runs `hynb.train_entry` as the main module of a forked rank, and ends the process.

    Args:
        before: `module:function`, called first; empty for none.
    """
    import importlib
    import runpy
    import traceback

    sys.argv = ["hynb.train_entry", *argv]
    try:
        if before:
            module, _, function = before.partition(":")
            getattr(importlib.import_module(module), function)()
        runpy.run_module("hynb.train_entry", run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve() -> None:
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        port = free_port()
        pids = [_fork(request, rank, port) for rank in range(len(request["outputs"]))]
        print(json.dumps(_wait(pids)), flush=True)


def _fork(request: dict, rank: int, port: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    for number, name in (
        (0, os.devnull),
        (1, f"{request['outputs'][rank]}.out"),
        (2, f"{request['outputs'][rank]}.err"),
    ):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ |= request["environment"] | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    count = len(request["outputs"])
    if count > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    run_entry(request["argv"], request["before"])


def _wait(pids: list[int]) -> list[int]:
    """The ranks' exit codes in the order of their ends; as under a launcher, one that fails ends the others."""
    left, codes, deadline = set(pids), [], float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1]:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        elif time.monotonic() > deadline:
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, 9)
        else:
            time.sleep(0.01)
    return codes


if __name__ == "__main__":
    _serve()
    # Without the seconds that libraries take to clean up.
    os._exit(0)
