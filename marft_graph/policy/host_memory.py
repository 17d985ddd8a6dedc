"""What the C library keeps of memory that tensors on a CPU no longer use."""

from __future__ import annotations

import ctypes
import functools

_M_MMAP_THRESHOLD = -3
"""Of glibc's `mallopt`."""
_LARGE = 4 * 2**20


@functools.cache
def give_back_large_blocks() -> bool:
    """Let blocks of 4 MiB and more go back to the system when they are freed; whether that is so.

    By itself glibc raises that size to 32 MiB as it meets such blocks. The activations of a long
    prompt are just below it: freed between others, they stayed with the process, which grew to
    twice what its tensors held. It is asked once for a process, and only where a base is large or a
    prompt long: small bases have blocks that are used again at once.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (OSError, AttributeError, TypeError):  # another C library
        return False
