"""`hynb checkpoints`: what checkpoints a run has, and whether they are whole."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hynb.errors import HynbError, RunError
from hynb.files import size_text
from hynb.runs.folder import RunDir
from hynb.runs.integrity import CHECKPOINT_RECORD, check_files, checkpoint_files
from hynb.runs.records import read_record

_DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.description = (
        "List the checkpoints of a run with step, size, loss, time and verdict; exit code 1 where one is damaged."
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument(
        "--verify", action="store_true", help="compare the digest of every file too, which reads all of them"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, one object per line")


def run(args: argparse.Namespace) -> int:
    """Prints one line per checkpoint, oldest first.

    Raises:
        RunError: the folder has no checkpoints.
    """
    run_dir = RunDir(args.run_folder)
    folders = run_dir.checkpoints()
    if not folders:
        what = "has no checkpoints" if run_dir.path.is_dir() else "there is no such folder"
        raise RunError(f"{args.run_folder}: {what}")
    exit_code = 0
    for number, folder in enumerate(folders):
        row = describe_checkpoint(folder, deep=args.verify)
        exit_code = _DAMAGED if row["damage"] else exit_code
        if args.json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
            continue
        if number == 0:
            print(f"{'step':>8}  {'size':>8}  {'loss':>8}  {'saved':16}  verdict")
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["saved_at"]))
        size = size_text(row["size_bytes"])
        print(f"{row['global_step']:>8}  {size:>8}  {loss:>8}  {saved:16}  {row['verdict']}", flush=True)
    return exit_code


def describe_checkpoint(folder: Path, *, deep: bool) -> dict[str, Any]:
    """Step, size in bytes, loss, time of saving and verdict of a checkpoint.

    Args:
        deep: compare the digest of every file.
    """
    damage = check_files(folder, deep=deep)
    try:
        record = read_record(folder / CHECKPOINT_RECORD) or {}
    except HynbError:
        # It is among the damage.
        record = {}
    whole = "whole, by sizes and headers"
    if deep:
        whole = "whole, by all digests"
    if "files" not in record:
        whole = "no digests: resuming needs trust_checkpoint"
    return {
        "checkpoint": str(folder),
        "global_step": int(folder.name.rpartition("-")[2]),
        "size_bytes": sum(checkpoint_files(folder).values()),
        "loss": record.get("loss"),
        "saved_at": record.get("saved_at") or folder.stat().st_mtime,
        "damage": damage,
        "verdict": f"damaged: {'; '.join(damage)}" if damage else whole,
    }
