"""The `hynb preflight` command."""

from __future__ import annotations

import argparse
import json
import sys

from hynb.config import Config, Reading, absolute_paths, read_settings, read_yaml
from hynb.errors import ConfigError
from hynb.preflight.examine import examine
from hynb.preflight.report import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb preflight`."""
    parser.description = "Check every host of a run before it starts."
    parser.add_argument("--hostfile", help="hosts and slots [that of --config; else this machine alone]")
    parser.add_argument(
        "--config", help="YAML file of the run: its model, data, output_dir and launcher are looked at"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one parameter on top")
    parser.add_argument("--no_collective", action="store_true", help="leave out the all-reduce over all ranks")
    parser.add_argument(
        "--fix", action="store_true", help="copy code and data to hosts that lack them, then look again"
    )
    parser.add_argument("--fix_model", action="store_true", help="copy the model folder too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 2 when a cell is red.

    Raises:
        HynbError: a config or hostfile that can't be read.
    """
    settings = [*([f"hostfile={args.hostfile}"] if args.hostfile else []), *args.set]
    reading = read_settings(read_yaml(args.config) if args.config else Reading(), settings)
    if reading.problems:
        raise ConfigError(reading.problems)
    # Not its whole check: hosts are looked at before there is a model or data.
    config = absolute_paths(Config(**reading.values, training_args=reading.training_args))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = examine(config, say, collective=not args.no_collective, copy=args.fix, copy_model=args.fix_model)
    print(json.dumps(report.to_json(), ensure_ascii=False) if args.json else text(report, colour=sys.stdout.isatty()))
    return 0 if report.ok else 2
