"""Progress of a job on standard error: a bar on a terminal, a line once a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydraopt_jax import report
from hydraopt_jax.rate_control.work import Progress

EVERY = 60.0


class Lines:
    """Progress as lines of text, at most one in `every` seconds."""

    def __init__(
        self,
        say: Callable[[str], None],
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say, self.every, self.clock = say, every, clock
        self.total = self.done = self.before = self.bytes = 0
        self.begun = self.last = clock()

    def start(self, total: int, done: int) -> None:
        """Modules in all and done before."""
        self.total, self.done, self.before = total, done, done
        self.begun = self.last = self.clock()
        if done:
            self.say(f"going on: {done} of {total} modules were done before")

    def step(self, done: int) -> None:
        """Modules just done."""
        self.done += done
        if self.clock() - self.last >= self.every:
            self.last = self.clock()
            self.say(self.line())

    def read(self, count: int) -> None:
        """Bytes just read."""
        self.bytes += count

    def line(self) -> str:
        """The line to print."""
        seconds = self.clock() - self.begun
        rate = (self.done - self.before) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        return (
            f"{self.done} of {self.total} modules, {60 * rate:.3g} per minute, "
            f"about {left / 60:.1f} minutes left, {report.format_bytes(self.bytes)} read"
        )


class Bar:
    """A bar for each stage of a job: the analysis, then one pass over the modules after the other."""

    def __init__(self, bars: Any) -> None:
        self.bars, self.stage, self.bytes = bars, 0, 0
        self.task = bars.add_task("analyzing", total=None)

    def start(self, total: int, done: int) -> None:
        """A stage begins: modules in all and done before."""
        self.stage += 1
        self.bars.remove_task(self.task)
        self.task = self.bars.add_task(f"pass {self.stage}, modules", total=total, completed=done)

    def step(self, done: int) -> None:
        """Modules just done."""
        self.bars.update(self.task, advance=done)

    def read(self, count: int) -> None:
        """Bytes just read."""
        self.bytes += count
        self.bars.update(
            self.task, description=f"pass {self.stage}, modules, {report.format_bytes(self.bytes)} read"
        )


@contextmanager
def to_stderr(enabled: bool = True) -> Iterator[Progress]:
    """The `Progress` that prints: a bar on a terminal, a line from time to time elsewhere."""
    if not enabled:
        yield Progress()
    elif sys.stderr.isatty():
        with report.bars() as bars:
            bar = Bar(bars)
            yield Progress(bar.start, bar.step, bar.read)
    else:
        lines = Lines(lambda text: print(f"hydraopt: {text}", file=sys.stderr, flush=True))
        yield Progress(lines.start, lines.step, lines.read)
