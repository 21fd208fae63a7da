"""Where the lines of a file begin; made once per host for a large file, and mapped by every process."""

from __future__ import annotations

import functools
import logging
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hynb.data.arrays import map_arrays, write_arrays
from hynb.data.cache import cache_folder, identity, made_once
from hynb.data.files import bounded_lines, without_bom

logger = logging.getLogger(__name__)

# Part of the name of a stored index; to be raised when it changes.
_VERSION = 1
# Smaller files are indexed again in less time than it takes to find an index.
_STORED_BYTES = 4 << 20


@dataclass(kw_only=True, frozen=True)
class LineIndex:
    """The lines of a file that are not blank.

    Args:
        offsets: of each line, in bytes, and the size of the file; uint64 of shape (lines + 1,).
        blank: numbers of the lines that are blank, from 1; uint64.
    """

    offsets: np.ndarray
    blank: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def number(self, index: int) -> int:
        """The number of a line in the file, from 1."""
        if not len(self.blank):
            return index + 1
        return index + 1 + int(np.searchsorted(self._lines_before_blank, index, side="right"))

    @functools.cached_property
    def _lines_before_blank(self) -> np.ndarray:
        """Of each blank line, the number of lines before it that are not."""
        return self.blank - np.arange(1, len(self.blank) + 1, dtype=np.uint64)

    def index(self, number: int) -> int:
        """The index of the line with a number that is not that of a blank line."""
        return number - 1 - int(np.searchsorted(self.blank, number))

    @classmethod
    def of(cls, path: Path, named: Path) -> LineIndex:
        """The index of a file, found in the cache or made.

        Args:
            named: the file that messages name, of which the first one may be a copy.

        Raises:
            OSError: it cannot be read.
            DataError: a line is too long.
        """
        key = identity(path) if path.stat().st_size >= _STORED_BYTES else None
        if key is None:
            return cls._made(path, named)
        target = cache_folder() / f"index-{_VERSION}-{key}.npz"
        made: LineIndex | None = None

        def write(temporary: Path) -> None:
            nonlocal made
            made = cls._made(path, named)
            write_arrays(temporary, {"offsets": made.offsets, "blank": made.blank}, {"file": str(path)})
            logger.info(f"{path}: {len(made):,} lines are indexed in {target}")

        for _ in range(2):
            try:
                arrays, _record = map_arrays(made_once(target, write), verify=True)
                return cls(offsets=arrays["offsets"], blank=arrays["blank"])
            except OSError:
                break
            except (ValueError, KeyError):
                # A damaged one is made again.
                target.unlink(missing_ok=True)
        return made or cls._made(path, named)

    @classmethod
    def _made(cls, path: Path, named: Path) -> LineIndex:
        offsets, blank = array("Q"), array("Q")
        offset = 0
        with path.open("rb", buffering=1 << 20) as file:
            for number, line in enumerate(bounded_lines(file, named), 1):
                if line.isspace() or (number == 1 and not without_bom(line, 1).strip()):
                    blank.append(number)
                else:
                    offsets.append(offset)
                offset += len(line)
        offsets.append(offset)
        return cls(offsets=_array(offsets), blank=_array(blank))


def _array(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, np.uint64)
