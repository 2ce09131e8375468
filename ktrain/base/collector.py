"""Python's cyclic garbage collector, held off where many small objects are made that are no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Holds the collector off, and leaves it as it was.

    Making many thousand small objects would have it walk through the whole process's heap, 0.1 s and more.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
