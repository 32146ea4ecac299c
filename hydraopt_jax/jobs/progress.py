"""Progress of a job on standard error: a line every two seconds on a terminal, once a minute elsewhere."""

import sys
import time
from collections.abc import Callable

from hydraopt_jax import report
from hydraopt_jax.rate_control.work import Progress

EVERY = 60.0


class Lines:
    """Counts what a job does and says so, at most once in `every` seconds."""

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
        """What is to be said."""
        seconds = self.clock() - self.begun
        rate = (self.done - self.before) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        return (
            f"{self.done} of {self.total} modules, {60 * rate:.3g} a minute, "
            f"about {left / 60:.1f} minutes left, {report.format_bytes(self.bytes)} read"
        )


def to_stderr(every: float | None = None) -> Progress:
    """A progress that prints lines: often on a terminal, once a minute elsewhere."""
    terminal = sys.stderr.isatty()
    lines = Lines(
        lambda text: print(f"hydraopt: {text}", file=sys.stderr, flush=True),
        every if every is not None else 2.0 if terminal else EVERY,
    )
    return Progress(lines.start, lines.step, lines.read)
