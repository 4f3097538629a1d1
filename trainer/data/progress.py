"""How far a preparation is: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS = 10.0  # between two lines

logger = logging.getLogger(__name__)


class Progress:
    """Counts bytes of a source; those that were done before do not count for the speed."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._done = self._made = 0
        self._start = self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        logger.info("tokenizing %s: %.1f MB", self._label, self._total / 1e6)
        watched = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, disable=not watched)
        return self

    def add(self, size: int, made: bool) -> None:
        self._done += size
        self._made += size if made else 0
        self._bar.update(size)
        now = time.monotonic()
        if self._bar.disable and now - self._told > _SECONDS:
            self._told = now
            logger.info("tokenized %s", str(self))  # now, not when a handler asks

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if error is None:
            logger.info("tokenized %s", str(self))  # now, not when a handler asks

    def __str__(self) -> str:
        seconds = time.monotonic() - self._start
        before = self._done - self._made
        kept = f", {before / 1e6:.1f} MB of them before" if before else ""
        return (
            f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB{kept}, "
            f"{self._made / 1e6 / max(seconds, 1e-9):.2f} MB/s"
        )
