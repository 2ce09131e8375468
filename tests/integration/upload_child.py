"""An agent's uploads in a process of their own, so that a test can kill it in the middle of one.

Holds step 10 of rank 0 in a volume and uploads it to the run at a URL: arguments are the volume's root and the URL.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy

from ktrain import native
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.upload import Uploader
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.snapshot.arena import NodeVolume
from tests.unit.checkpoint.builders import RUN

WRITE_ID = "0a1b"
"""Of the drain that one agent begins and another ends."""
_AT = Identity(RUN, 10, 1, 1)
_NUM_FLOATS = 50 << 18  # 50 MiB: four parts


def open_volume(root: Path) -> NodeVolume:
    """The node's volume; step 10 of rank 0 is in it from the first time on."""
    volume = NodeVolume(root, node="node-0", run=RUN)
    if not volume.scan():
        shard = Shard("model.weight", "float32", (_NUM_FLOATS,), Box((0,), (_NUM_FLOATS,)), Role.SHARDED)
        layout = lay_out([shard])
        payload = layout.header + numpy.arange(_NUM_FLOATS, dtype=numpy.float32).tobytes()
        chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
        writer = volume.acquire(0, len(payload), protect=(), limit=2)
        assert writer is not None
        writer.memory[:] = payload
        writer.seal(Manifest(_AT, 0, "0" * 16, len(payload), CHUNK_NBYTES, chunks, layout.entries, {}, {}))
    return volume


def slot_bytes(volume: NodeVolume) -> bytes:
    """The payload in the slot."""
    with volume.open(0, _AT) as slot:
        return bytes(slot.memory)


def upload(volume: NodeVolume, url: str, *, again: bool) -> list[dict[str, Any]]:
    """What an agent reports of its upload."""
    said: list[dict[str, Any]] = []
    uploader = Uploader(
        url,
        "node-0",
        emit=lambda kind, **fields: None,
        report=said.append,
        timeouts=Timeouts(),
        clock=SYSTEM_CLOCK,
    )
    drain = {"write_id": WRITE_ID, "identity": _AT.to_json(), "ranks": [0], "again": [0] if again else []}
    uploader.work(drain, volume, FaultPoints([], epoch=1))
    uploader.close()
    return said


if __name__ == "__main__":
    upload(open_volume(Path(sys.argv[1])), sys.argv[2], again=False)
