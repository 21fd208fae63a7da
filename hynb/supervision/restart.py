"""Whether and how a run that has failed starts again by itself (`max_restarts`, `min_hosts`).

A run goes on from its newest checkpoint, on the hosts that still answer. A user's mistake is not tried again, nor is
what has ended the run at the same step in the same way before.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hynb.config import Config
from hynb.errors import ClusterError, HynbError
from hynb.runs import RunDir, RunReader
from hynb.supervision.plan import Plan, chosen_hosts, make_plan, unreachable_hosts, without_hosts

logger = logging.getLogger(__name__)

# Between two looks at hosts that do not answer, which may be starting up again.
_LOOK_SECONDS = 10.0
# At hosts that answer, and on which something that the run needs is not free yet.
_LOOKS = 3


@dataclass(kw_only=True, frozen=True)
class Restart:
    """One restart, as events.jsonl and the manifest record it.

    Args:
        number: 1 for a run's first.
        reason: why the run had ended.
        global_step: the step at which it ended.
        checkpoint: name of the checkpoint that it goes on from; None: from the beginning.
        lost_hosts: hosts that take no part any more.
    """

    number: int
    reason: str
    global_step: int
    checkpoint: str | None
    lost_hosts: list[str]


class Restarts:
    """Decides about the restarts of one run.

    Args:
        config: the run's, as it was launched; every restart begins from it, so that a host may come back.
    """

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        self._dir = run_dir
        self._config = config
        self._number = 0
        # Step and cause of the failure before.
        self._before: tuple[int, str] | None = None

    @property
    def left(self) -> int:
        """How many are left."""
        return self._config.max_restarts - self._number

    def after(self, end: dict[str, Any], keep_waiting: Callable[[], bool]) -> tuple[Config, Restart]:
        """The Config to start again with after a failure.

        Args:
            end: the supervisor's record of the end.
            keep_waiting: asked while hosts do not answer; False as soon as a person ends the run.

        Raises:
            HynbError: the run must not be started again, and why.
        """
        step = RunReader(self._dir.path).status().global_step
        self._refuse(end, step)
        lost = self._lost_hosts(keep_waiting)
        kept = self._dir.checkpoints()
        config = without_hosts(self._config, lost)
        # Without a checkpoint nothing is lost by starting over, but the checkpoint of another run that it began from.
        config = config.replace(resume_from_checkpoint="last") if kept else config.replace(overwrite_output_dir=True)
        self._number += 1
        restart = Restart(
            number=self._number,
            reason=first_line(end["reason"]),
            global_step=step,
            checkpoint=kept[-1].name if kept else None,
            lost_hosts=lost,
        )
        return config, restart

    def plan(self, config: Config, keep_waiting: Callable[[], bool]) -> Plan:
        """The plan of the next start; memory and ports of the processes that have ended may take a moment to be free.

        Raises:
            ClusterError: what still keeps the run from starting, with the host.
        """
        for _ in range(_LOOKS):
            try:
                return make_plan(config)
            except ClusterError as error:
                logger.info("cannot start yet: %s", error)
                if not keep_waiting():
                    break
                time.sleep(_LOOK_SECONDS)
        return make_plan(config)

    def _refuse(self, end: dict[str, Any], step: int) -> None:
        most = self._config.max_restarts
        before, self._before = self._before, (step, _cause(end))
        if self.left <= 0:
            times = f"all {most} restarts" if most > 1 else "the one restart"
            raise HynbError(f"{times} of max_restarts are used up")
        if any(record.get("exit_code") == HynbError.exit_code for record in self._dir.failures()):
            raise HynbError("it would fail in the same way: what the rank reports has to be changed first")
        if before == self._before:
            raise HynbError(f"it has failed at step {step} for this reason before")

    def _lost_hosts(self, keep_waiting: Callable[[], bool]) -> list[str]:
        """Hosts that do not answer, after a wait for those that the run cannot do without.

        Raises:
            HynbError: too few hosts answer.
        """
        hosts = [host.name for host in chosen_hosts(self._config)]
        needed = len(hosts) if self._config.min_hosts is None else self._config.min_hosts
        deadline = time.monotonic() + self._config.start_timeout_seconds
        while len(lost := unreachable_hosts(self._config)) > len(hosts) - needed:
            if time.monotonic() > deadline or not keep_waiting():
                raise HynbError(_too_few(lost, hosts, needed, self._config))
            logger.info("%s: no answer; the run needs %d hosts to start again", ", ".join(lost), needed)
            time.sleep(_LOOK_SECONDS)
        return lost


def first_line(reason: str) -> str:
    """The first line of a reason, without the end of a log behind it."""
    return reason.partition("\n")[0]


def _too_few(lost: Sequence[str], hosts: Sequence[str], needed: int, config: Config) -> str:
    found = f"{', '.join(lost)} did not answer within start_timeout_seconds = {config.start_timeout_seconds}"
    if config.min_hosts is None:
        return f"{found}; with min_hosts the run would go on without"
    return f"{found}; {len(hosts) - len(lost)} hosts are left, and min_hosts = {needed}"


def _cause(end: dict[str, Any]) -> str:
    """What two failures for the same reason have in common: numbers such as pids and seconds are left out."""
    return f"{end.get('host')} {end.get('rank')} {re.sub(r'[0-9.]+', '#', first_line(end['reason']))}"
