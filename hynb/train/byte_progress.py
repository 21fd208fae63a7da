"""How far a rank is in reading or writing many bytes, for the run's status and its log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 1.0
_LOG_SECONDS = 30.0


class ByteProgress:
    """Called with bytes done and bytes in all; passes a text on at most once per second, and logs it now and then.

    Args:
        name: of the work, such as "loading".
        factor: ranks that do the same work at the same time, so that the text is about all of them.
        show: takes the text; None where nobody looks.
    """

    def __init__(self, name: str, *, factor: int = 1, show: Callable[[str], None] | None = None) -> None:
        self._name, self._factor, self._show = name, factor, show
        self._started = self._shown = self._logged = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Takes note of the bytes of this rank."""
        now = time.monotonic()
        if now - self._shown < _STATUS_SECONDS and done_bytes < total_bytes:
            return
        self._shown = now
        done, total = (count * self._factor / 1e9 for count in (done_bytes, total_bytes))
        text = f"{done:.3g} of {total:.3g} GB, {done / max(now - self._started, 1e-6):.2g} GB/s"
        if self._show:
            self._show(text)
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            logger.info(f"{self._name}: {text}")

    def end(self, total_bytes: int) -> None:
        """Logs how long it took, if it was long enough to be of interest."""
        seconds = time.monotonic() - self._started
        if seconds >= _STATUS_SECONDS:
            size = total_bytes * self._factor / 1e9
            logger.info(f"{self._name}: {size:.3g} GB in {seconds:.1f} s, {size / seconds:.2g} GB/s")
