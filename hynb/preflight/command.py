"""The `hynb preflight` command."""

from __future__ import annotations

import argparse
import json
import sys

from hynb.config import Config, Reading, absolute_paths, read_settings, read_yaml
from hynb.errors import ConfigError
from hynb.preflight.examine import run_preflight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hynb preflight`."""
    parser.description = "Check every host of a run before it starts."
    parser.add_argument("--hostfile", help="hosts and slots [that of --config; else this machine alone]")
    parser.add_argument(
        "--config", help="YAML file of the run: its model, data, output_dir and launcher are checked too"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter")
    parser.add_argument("--no_collective", action="store_true", help="leave out the all-reduce over all ranks")
    parser.add_argument(
        "--fix", action="store_true", help="copy code and data to hosts that lack them, then check again"
    )
    parser.add_argument("--fix_model", action="store_true", help="copy the model folder too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 2 when a check failed.

    Raises:
        HynbError: a config or hostfile that can't be read.
    """
    settings = [*([f"hostfile={args.hostfile}"] if args.hostfile else []), *args.set]
    reading = read_settings(read_yaml(args.config) if args.config else Reading(), settings)
    if reading.problems:
        raise ConfigError(reading.problems)
    # The whole Config is not checked: a preflight is possible before there is a model or data.
    config = absolute_paths(Config(**reading.values, training_args=reading.training_args))

    def show_progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = run_preflight(
        config, show_progress, collective=not args.no_collective, copy=args.fix, copy_model=args.fix_model
    )
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print(report.to_text(colour=sys.stdout.isatty()))
    return 0 if report.ok else 2
