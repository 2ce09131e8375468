"""The actor that serves a node's volume to the run's Ray cluster, in a worker process of that node's raylet.

Only bytes cross: plain values in, uint8 views out, which Ray copies into its store without pickling them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ktrain.replicate.source import VolumeSource
from ktrain.snapshot.arena import NodeVolume


class RaySource:
    """One per node; pullers hold no objects of it, they own what they asked for."""

    def __init__(self, root: str, run: str, node: str) -> None:
        self._source = VolumeSource(NodeVolume(Path(root), run=run, node=node))

    def ready(self) -> bool:
        return True

    def open(self, rank: int, identity: dict[str, Any]) -> tuple[str, bytes]:
        return self._source.open(rank, identity)

    def lease(self, rank: int, identity: dict[str, Any]) -> str:
        return self._source.lease(rank, identity)

    def read(self, handle: str, ranges: list[tuple[int, int]]) -> npt.NDArray[np.uint8]:
        found = [np.frombuffer(self._source.read(handle, begin, end), dtype=np.uint8) for begin, end in ranges]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def release(self, handle: str) -> None:
        self._source.release(handle)
