"""The exceptions that hynb raises for a user's mistake, and the nearest valid name for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class HynbError(Exception):
    """A mistake that the user can fix; shown as its message alone, never as a traceback.

    Args:
        problems: one message, or several that are shown together; each names the thing, its value, the rule,
            its location (file:line, key, host) and the next action.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {problem}" for problem in self.problems]


class ConfigError(HynbError):
    """A parameter, flag, YAML key or DeepSpeed setting that cannot be used."""


class DataError(HynbError):
    """Broken training data, with file:line."""


class ModelError(HynbError):
    """A model, tokenizer or checkpoint folder that is missing, incomplete or of the wrong kind."""


class RunError(HynbError):
    """A run folder in the wrong state: a live run, no run, an earlier run, too little disk space."""


class RunFailedError(RunError):
    """A run that failed; the message has the reason and the end of its log."""

    exit_code = 1


class RankError(RunFailedError):
    """A failure that all ranks know of and that comes from one of them.

    Args:
        rank, host: of the rank that it comes from.
    """

    def __init__(self, problem: str, *, rank: int, host: str) -> None:
        super().__init__(problem)
        self.rank = rank
        self.host = host


class MergeError(HynbError):
    """An adapter and a base that cannot be merged, or an output that cannot be written."""


class ClusterError(HynbError):
    """A host, hostfile line or ssh setting that cannot be used."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean X?)` for the valid name that is nearest to a wrong one; empty if none is near.

    A valid name that begins with the wrong one wins over a similar one (`difflib.get_close_matches`).
    """
    valid = list(valid)
    completions = [item for item in valid if len(name) > 3 and item.startswith(name)]
    matches = completions or difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
