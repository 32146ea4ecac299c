"""Commands run as processes of their own, with their time and peak memory."""

import os
import signal
import subprocess
import tempfile
import time
from typing import Any


def run(command: list[str], environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Seconds, processor seconds and peak bytes of a command; only what it did where it did not succeed."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(int(limit))
        _, status, used = os.wait4(process.pid, 0)
        signal.alarm(0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        tail = log.read().decode(errors="replace")[-300:]
    row: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_memory_bytes": 1024 * used.ru_maxrss,
    }
    if process.returncode:
        row |= {"failed": "not done in time" if seconds >= limit else f"{process.returncode}: {tail}"}
    return row
