"""The `hynb` command: everything that the notebooks do, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hynb.config import GROUPS, Config, parameters
from hynb.errors import HynbError, RunFailedError, nearest
from hynb.runs import RunStatus, evaluation_line, notice_line, progress_line, saved_line

if TYPE_CHECKING:
    from hynb.launch import Run

_INTERRUPTED, _BROKEN_PIPE, _TERMINATED = 130, 141, 143
# A step and its checkpoint rarely take longer; after it a person wants to know what else can be done.
_PATIENCE_SECONDS = 60.0
# Of a run that has many: what `status` and `attach` show at once.
_SHOWN_CHECKPOINTS, _SHOWN_EVENTS = 10, 20
# Commands that have their own module, which is imported only when the command is called.
_MODULES = (
    ("merge", "hynb.merge.command", "merge a LoRA adapter into its base model"),
    ("check-data", "hynb.data.command", "check training data before a GPU is used"),
    ("preflight", "hynb.preflight.command", "check every host of a run before it starts"),
    ("hosts", "hynb.cluster.command", "set up passwordless ssh to the hosts of a cluster"),
    ("checkpoints", "hynb.runs.command", "list a run's checkpoints and find damaged ones"),
    ("models", "hynb.models.command", "show what a model folder is and how it can be trained here"),
    ("ask", "hynb.generate.command", "ask a model questions, and score its answers"),
    ("demo", "hynb.demo.run", "train, merge and evaluate a small model on this machine"),
)


class _Parser(argparse.ArgumentParser):
    """Reports each mistake under the name of the command that was called, and says what to do."""

    def __init__(self, *args: Any, delegates: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        # A command's own module knows its flags.
        self._delegates = delegates

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # typeshed's overloads
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Refuses unknown flags first: what argparse says of missing arguments often is a consequence of them."""
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None or self._delegates:
            return super().parse_known_args(words, namespace)
        self._refuse_unknown_flags(words)
        parsed, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Prints the usage, the mistake and where to look, and exits."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in words[: words.index("--")] if "--" in words else words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                self.error(f"unknown flag {flag}{self._hint(flag, known)}")

    def _hint(self, flag: str, known: Sequence[str]) -> str:
        name = flag.removeprefix("--").replace("-", "_")
        if "--set" in known and any(item.name == name for item in parameters()):
            return f": a parameter of the run is given as --set {name}=VALUE, or in the file of --config"
        return nearest(flag, known)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake ends in its message and an exit code, never in a traceback."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _delegate:
        parser.error(f"unexpected argument {rest[0]} before the command")
    args.rest = rest
    try:
        return args.run(args)
    except HynbError as error:
        for problem in error.problems:
            print(f"hynb: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("hynb: interrupted; a run that has started goes on", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return _BROKEN_PIPE


def read_config(path: str | None, settings: Sequence[str]) -> Config:
    """The Config of a YAML file, with `KEY=VALUE` settings that override it.

    Args:
        path: the YAML file; None for the defaults.

    Raises:
        ConfigError: every mistake, at once.
    """
    from hynb.config import Reading, read_settings, read_yaml

    reading = read_yaml(path) if path else Reading()
    config = read_settings(reading, settings).config(path or "parameters")
    for note in reading.notes:
        print(f"hynb: {note}")
    return config


def parameter_tables() -> str:
    """Every parameter in Markdown, one table per group; the README contains this text."""
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hynb", description="Fine-tune Tencent's Hunyuan models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    launch = commands.add_parser("launch", help="start training in the background")
    _add_config_arguments(launch)
    launch.add_argument("--follow", action="store_true", help="show progress until the run ends; fail if it fails")
    launch.set_defaults(run=_launch)

    status = commands.add_parser("status", help="show the state of a run")
    status.add_argument("run_folder", metavar="RUN", help="run folder")
    status.set_defaults(run=_status)

    attach = commands.add_parser("attach", help="show a run's progress until it ends; Ctrl-C leaves the run alone")
    attach.add_argument("run_folder", metavar="RUN", help="run folder")
    attach.set_defaults(run=_attach)

    stop = commands.add_parser("stop", help="save a checkpoint and end a run")
    stop.add_argument("run_folder", metavar="RUN", help="run folder")
    stop.add_argument("--kill", action="store_true", help="end the run at once, without a checkpoint")
    stop.set_defaults(run=_stop)

    check = commands.add_parser("check", help="check the parameters of a run and show the command that it would run")
    _add_config_arguments(check, required=True)
    check.set_defaults(run=_check)

    listing = commands.add_parser("parameters", help="list every parameter")
    listing.add_argument("--yaml", action="store_true", help="as a YAML file to start from")
    listing.add_argument("--markdown", action="store_true", help="as the tables in the README")
    listing.set_defaults(run=_parameters)

    for name, module, help_text in _MODULES:
        command = commands.add_parser(name, help=help_text, add_help=False, delegates=True)
        command.set_defaults(run=_delegate, command=name, module=module)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="YAML file of parameters; `hynb parameters --yaml` prints one to start from",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter; may be repeated"
    )


def _launch(args: argparse.Namespace) -> int:
    if not args.follow:
        _start(args)
        return 0
    with _noted_sigterm() as signals:
        run = _start(args)
        code = _follow(run, signals)
    # Not 0, which would tell a scheduler that the job is done.
    return _TERMINATED if run.status().terminated else code


def _start(args: argparse.Namespace) -> Run:
    """Launches a run, and prints how to watch and to stop it."""
    from hynb.launch import launch

    run = launch(read_config(args.config, args.set))
    print(f"started: {run.output_dir}")
    folder = shlex.quote(str(run.output_dir))
    print(f"watch:   hynb attach {folder}")
    print(f"stop:    hynb stop {folder}")
    if lines := run.paste_lines():
        print(f"to join the other hosts, run one of these lines on each:\n{lines}", end="")
    return run


def _status(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    run = attach(args.run_folder)
    status = run.status()
    print(status)
    if event := run.reader.last_log():
        print(progress_line(event, status.max_steps))
    if checkpoints := run.checkpoints():
        earlier = len(checkpoints) - _SHOWN_CHECKPOINTS
        names = [f"{earlier} earlier ones"] if earlier > 0 else []
        print("checkpoints: " + ", ".join([*names, *(item.name for item in checkpoints[-_SHOWN_CHECKPOINTS:])]))
    return RunFailedError.exit_code if status.state == "failed" else 0


def _attach(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    run = attach(args.run_folder)
    recent = run.reader.recent_events(_SHOWN_EVENTS + 1)
    if len(recent) > _SHOWN_EVENTS:
        print(f"earlier lines are in {run.dir.events}; the last {_SHOWN_EVENTS}:", flush=True)
    max_steps = run.status().max_steps
    for event in recent[-_SHOWN_EVENTS:]:
        _print_event(event, max_steps)
    return _follow(run)


def _stop(args: argparse.Namespace) -> int:
    from hynb.launch import attach

    run = attach(args.run_folder)
    if args.kill:
        print(run.kill())
        return 0
    if run.status().live:
        print("stop requested: the ranks finish their step, save a checkpoint and end", flush=True)
    run.stop(wait=False)
    print(_wait_for_stop(run))
    return 0


def _wait_for_stop(run: Run) -> RunStatus:
    """Waits for the end of a run, and from time to time says what it waits for."""
    noted = time.monotonic()
    for status in run.states():
        if status.live and time.monotonic() - noted >= _PATIENCE_SECONDS:
            noted = time.monotonic()
            frozen = run.frozen_processes()
            what = f"; stopped by a signal: {', '.join(frozen)}" if frozen else ""
            kill = f"hynb stop --kill {shlex.quote(str(run.output_dir))}"
            print(f"still {status}{what}. `{kill}` ends it at once, without a checkpoint", flush=True)
    return run.wait()


def _check(args: argparse.Namespace) -> int:
    from hynb.cluster import gpu_count, this_machine
    from hynb.launch import check_launch
    from hynb.plan import zero
    from hynb.runs import planned_slots, with_derived_limits, workload
    from hynb.supervision import command_text

    config, plan = check_launch(read_config(args.config, args.set))
    ds_config, notes = zero.used(config.deepspeed, config.deepspeed_values(), on_cpu=not gpu_count())
    gpus = this_machine().gpus
    work = workload(config, planned_slots(config, len(gpus)))
    gpu_bytes = min((gpu.memory_bytes for gpu in gpus), default=None)
    notes.append(with_derived_limits(config, ds_config, work, gpu_bytes)[1])
    for note in filter(None, notes):
        print(f"hynb: {note}")
    print("no problems found; the lines of the data are checked by `hynb check-data`, and when a run starts")
    print("this command would run:")
    print(command_text(config, plan))
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
    module = importlib.import_module(args.module)
    parser = _Parser(prog=f"hynb {args.command}")
    module.add_arguments(parser)
    return module.run(parser.parse_args(args.rest))


def _follow(run: Run, signals: Sequence[int] = ()) -> int:
    """Prints every new state and phase, and one line per log event, until the run ends.

    Args:
        signals: grows when this process gets SIGTERM, which then is a request to stop.
    """
    before: RunStatus | None = None
    asked = False
    for status, events in run.follow():
        if signals and not asked:
            # Tried again at the next turn where the disk refuses it.
            with contextlib.suppress(OSError):
                run.stop(wait=False, by="by SIGTERM to `hynb launch --follow`")
                asked = True
                print("got SIGTERM: the ranks finish their step, save a checkpoint and end", flush=True)
        if status.live and _is_news(status, before):
            print(status, flush=True)
        before = status
        for event in events:
            _print_event(event, status.max_steps)
    # The processes take a moment to end, and of several hosts the final record is written then.
    status = run.wait()
    print(status)
    return 1 if status.state == "failed" else 0


@contextlib.contextmanager
def _noted_sigterm() -> Iterator[list[int]]:
    """Within it, SIGTERM, as a container's first process gets it, is only noted.

    Yields:
        the signals that have come.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_event(event: dict[str, Any], max_steps: int | None) -> None:
    if event["kind"] == "log":
        print(progress_line(event, max_steps), flush=True)
    elif event["kind"] == "eval":
        print(evaluation_line(event), flush=True)
    elif event["kind"] == "save":
        print(saved_line(event), flush=True)
    elif line := notice_line(event):
        print(line, flush=True)


def _is_news(status: RunStatus, before: RunStatus | None) -> bool:
    if before is None or (status.state, status.reason) != (before.state, before.reason):
        return True
    # That training goes on after a checkpoint or an evaluation is clear from the lines of their events.
    return status.phase not in (before.phase, "training")


if __name__ == "__main__":
    sys.exit(main())
