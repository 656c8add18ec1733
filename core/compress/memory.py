"""Settings of the C library's allocator, so that freed memory returns to the system."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  #: the constant's value in malloc.h
_MAPPED_BYTES = 2 * 1024**2


def return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed chunks, and the next block's tensors do not fit into them. The process then takes up to half as much memory again.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def map_large_tensors() -> None:
    """From now on, let glibc allocate each tensor of 2 MiB or more with mmap: its memory returns to the system when the tensor is freed.

    By default, glibc raises this threshold whenever a mapped tensor is freed. Freed hidden states then leave gaps that no tensor fits.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
