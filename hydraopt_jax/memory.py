"""Memory that the process has freed and still holds."""

import contextlib
import ctypes


def give_back() -> None:
    """Return freed memory to the system, where the C library can.

    Large buffers come and go in threads of XLA and of the compressor; of what each of them has freed glibc
    keeps hundreds of megabytes.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
