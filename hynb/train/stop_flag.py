"""A stop request, seen by rank 0, or a SIGTERM to any rank: followed by all ranks at the same step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from hynb.files import is_there
from hynb.runs import RunDir, stop_cause
from hynb.train.gathering import LateAnswer
from hynb.train.termination import Termination

# A look at a network disk may take milliseconds, and a message between the ranks half a millisecond of each.
_LOOK_SECONDS = 0.5
# Between two messages: steps may become slower than they have been.
_MOST_STEPS = 10


class StopFlag:
    """Rank 0 looks for a request; all ranks learn of it, and of a SIGTERM to one of them, one step later.

    None of them waits for that.

    Where steps are short it looks about twice per second; with each message it tells all ranks when the next one is
    due. The flag travels between CPUs, beside the GPUs' own messages. Every rank creates one at the same point.

    Args:
        run_dir: where a request is left.
        termination: notes a SIGTERM to this rank.
    """

    def __init__(self, run_dir: RunDir, termination: Termination) -> None:
        self._run_dir = run_dir
        self._termination = termination
        self._terminated = 0
        self._looked_at = -_LOOK_SECONDS
        self._requested = False
        self._answer = LateAnswer()
        self._due_in = self._steps = 1
        self._sent_at: float | None = None

    def is_set(self) -> bool:
        """Whether all ranks are to stop now; called by every rank once per step."""
        if not self._answer.is_needed:
            return self._look()
        stop = self.finish()
        self._due_in -= 1
        if not stop and self._due_in <= 0:
            self._send()
        return stop

    def finish(self) -> bool:
        """Waits for the message that is under way; whether it said to stop."""
        message = self._answer.take()
        if message is None:
            return False
        requested, self._steps, self._terminated = message.int().tolist()
        self._due_in = self._steps
        return bool(requested or self._terminated)

    def cause(self) -> str:
        """Who has asked for the end, as a text that follows "stopped"; of a request rank 0 alone knows."""
        if self._terminated:
            ranks = dist.get_world_size() if self._answer.is_needed else 1
            return f"by SIGTERM to {self._terminated} of {ranks} ranks" if ranks > 1 else "by SIGTERM to its rank"
        return stop_cause(self._run_dir)

    def _send(self) -> None:
        """The sum of all ranks' messages: whether to stop, steps until the next one, and how many got SIGTERM."""
        message = torch.zeros(3)
        if dist.get_rank() == 0:
            now, steps = time.monotonic(), 1
            if self._sent_at is not None:
                steps = int(_LOOK_SECONDS / max(1e-6, now - self._sent_at) * self._steps)
            self._sent_at = now
            message[0], message[1] = float(is_there(self._run_dir.stop_request)), min(max(1, steps), _MOST_STEPS)
        message[2] = float(self._termination.noted)
        self._answer.ask(message)

    def _look(self) -> bool:
        self._terminated = int(self._termination.noted)
        now = time.monotonic()
        if not self._requested and now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._requested = is_there(self._run_dir.stop_request)
        return bool(self._requested or self._terminated)
