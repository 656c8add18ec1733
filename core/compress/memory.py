"""What the C library does with memory that was freed."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  #: of malloc.h
_MAPPED_BYTES = 2 * 1024**2


def return_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps it in holes that the next block's tensors don't fit: up to half as much again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def map_large_tensors() -> None:
    """Let glibc map every tensor of two megabytes or more by itself, from now on in this process: its memory goes back whole when it is freed.

    Left alone, glibc raises that bound whenever a mapped tensor is freed, and hidden states that are freed then leave holes that nothing fits.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
