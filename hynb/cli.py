"""The `hynb` command: the same verbs as the notebooks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from hynb.config import GROUPS, Config, parameters
from hynb.errors import HynbError, RunFailedError
from hynb.runs import evaluation_line, progress_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; a user's mistake ends in its message and an exit code, never in a traceback."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _delegate:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args)
    except HynbError as error:
        for problem in error.problems:
            print(f"hynb: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("hynb: interrupted; a run that was started goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hynb", description="Fine-tune Tencent Hunyuan models.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    launch = verbs.add_parser("launch", help="start training in the background")
    launch.add_argument("--config", help="YAML file of parameters; `hynb parameters --yaml` writes one")
    launch.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one parameter on top")
    launch.add_argument("--follow", action="store_true", help="stay and show progress; fail if the run fails")
    launch.set_defaults(run=_launch)

    status = verbs.add_parser("status", help="say how a run is doing")
    status.add_argument("run_folder", metavar="RUN")
    status.set_defaults(run=_status)

    attach = verbs.add_parser("attach", help="show a run's progress until it ends; Ctrl-C leaves it running")
    attach.add_argument("run_folder", metavar="RUN")
    attach.set_defaults(run=_attach)

    stop = verbs.add_parser("stop", help="save a checkpoint and end a run")
    stop.add_argument("run_folder", metavar="RUN")
    stop.add_argument("--kill", action="store_true", help="end it at once, without a checkpoint")
    stop.set_defaults(run=_stop)

    check = verbs.add_parser("check", help="check a config and say what it would do, without starting it")
    check.add_argument("--config", required=True)
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    check.set_defaults(run=_check)

    listing = verbs.add_parser("parameters", help="list every parameter")
    listing.add_argument("--yaml", action="store_true", help="as a YAML file to start from")
    listing.add_argument("--markdown", action="store_true", help="as the tables of the README")
    listing.set_defaults(run=_parameters)

    for name, module, help_text in (
        ("merge", "hynb.merge.command", "merge a LoRA adapter into its base model"),
        ("check-data", "hynb.data.command", "check training data before a GPU is touched"),
        ("preflight", "hynb.preflight.command", "check every host of a run before it starts"),
        ("hosts", "hynb.cluster.command", "set up passwordless ssh to the hosts of a cluster"),
        ("demo", "hynb.demo.run", "run the whole job with a small model on this machine"),
    ):
        # The room's own arguments come from the room, which is imported only when its verb is called.
        verb = verbs.add_parser(name, help=help_text, add_help=False)
        verb.set_defaults(run=_delegate, verb=name, module=module)
    return parser


def read_config(path: str | None, settings: Sequence[str]) -> Config:
    """The Config of a YAML file and `--set` words on top.

    Raises:
        ConfigError: all mistakes at once.
    """
    from hynb.config import Reading, read_settings, read_yaml

    reading = read_yaml(path) if path else Reading()
    config = read_settings(reading, settings).config(path or "parameters")
    for note in reading.notes:
        print(f"hynb: {note}")
    return config


def _launch(args: argparse.Namespace) -> int:
    from hynb.launch import launch

    run = launch(read_config(args.config, args.set))
    print(f"started: {run.output_dir}")
    print(f"watch:   hynb attach {run.output_dir}")
    print(f"stop:    hynb stop {run.output_dir}")
    if lines := run.paste_lines():
        print(f"paste on the other hosts, of which each joins then:\n{lines}", end="")
    return _follow(run) if args.follow else 0


def _status(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    run = attach(args.run_folder)
    status = run.status()
    print(status)
    logs = [event for event in run.events() if event["kind"] == "log"]
    if logs:
        print(progress_line(logs[-1], status.max_steps))
    if run.checkpoints():
        print("checkpoints: " + ", ".join(item.name for item in run.checkpoints()))
    return 1 if status.state == "failed" else 0


def _attach(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    return _follow(attach(args.run_folder))


def _stop(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    run = attach(args.run_folder)
    if args.kill:
        print(run.kill())
        return 0
    if run.status().live:
        print("asked all ranks to save a checkpoint and end; this takes as long as a step and a save")
    print(run.stop())
    return 0


def _check(args: argparse.Namespace) -> int:
    from hynb.config import absolute_paths
    from hynb.runs import check_run
    from hynb.supervision import command_text, make_plan

    config = absolute_paths(read_config(args.config, args.set))
    check_run(config)
    make_plan(config)
    print("all is well; this would run:")
    print(command_text(config))
    return 0


def _parameters(args: argparse.Namespace) -> int:
    from hynb.config import to_yaml

    if args.yaml:
        print(to_yaml(Config(), explain=True), end="")
    elif args.markdown:
        print(parameter_tables(), end="")
    else:
        for item in parameters():
            print(f"--{item.name:32} {item.help} [{item.default_text}]")
    return 0


def _delegate(args: argparse.Namespace) -> int:
    room = importlib.import_module(args.module)
    parser = argparse.ArgumentParser(prog=f"hynb {args.verb}")
    room.add_arguments(parser)
    return room.run(parser.parse_args(args.rest))


def _follow(run: Any) -> int:
    """Prints a line a log step until the run ends."""
    shown = ("", "")
    for status, events in run.follow():
        if (status.state, status.reason) != shown and status.live:
            print(status, flush=True)
            shown = (status.state, status.reason)
        for event in events:
            if event["kind"] == "log":
                print(progress_line(event, status.max_steps), flush=True)
            elif event["kind"] == "eval":
                print(evaluation_line(event), flush=True)
            elif event["kind"] == "save":
                print(f"saved {event['path']} in {event['seconds']} s", flush=True)
    # The processes take a moment to go, and of several hosts the last word comes then.
    status = run.wait()
    print(status)
    if status.state == "failed":
        raise RunFailedError(f"{run.output_dir}: {status}\nThe end of its log:\n{run.reader.log_tail()}")
    return 0


def parameter_tables() -> str:
    """Every parameter in Markdown, a table a group; the README's tables are this text."""
    lines = []
    for group, title in GROUPS.items():
        lines += [f"### {title}", "", "| parameter | default | range | what it does |", "|---|---|---|---|"]
        for item in parameters():
            if item.group == group:
                bounds = ", ".join(item.choices) or item.range
                unit = f" {item.unit}" if item.unit else ""
                text = item.help.replace("|", "\\|")
                lines.append(f"| `{item.name}` | `{item.default_text}`{unit} | {bounds} | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
