"""Progress of a long loop: a bar where tqdm and a terminal are there, lines where not."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Counts steps up to `total` from `start`; every line carries the newest values.

    lines: how many lines are printed over the whole loop where there is no bar.
    """

    def __init__(self, name: str, total: int, start: int = 0, lines: int = 6) -> None:
        self.name, self.total, self.step, self.lines = name, total, start, max(lines, 1)
        self.began, self.first = time.perf_counter(), start
        self.bar = _bar(name, total, start)

    def advance(self, **values: float) -> None:
        """One step is done; values are shown beside it."""
        self.step += 1
        text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif (
            self.step == self.total or self.step * self.lines // self.total > (self.step - 1) * self.lines // self.total
        ):
            rate = (self.step - self.first) / (time.perf_counter() - self.began)
            print(f"{self.name}: step {self.step} of {self.total}, {text}, {rate:.1f} steps/s", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar(name: str, total: int, start: int) -> Any:
    """A tqdm bar, or None without tqdm or where nobody watches."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=name, total=total, initial=start, unit="step")
