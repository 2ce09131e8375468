"""Every Transport that needs nothing but this process; Ray's is in tests/integration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.local_transport import LocalTransport, LocalWire
from ktrain.testing.transport_conformance import TransportConformance, WirePair


class TestLocalTransport(TransportConformance):
    LARGE_NBYTES = 34_000_001  # two pieces

    @pytest.fixture
    def wires(self, tmp_path: Path) -> Iterator[WirePair]:
        wire = LocalWire()
        volumes = [NodeVolume(tmp_path / "v", node=f"node-{i}", run="run1") for i in range(2)]
        source, receiver = (LocalTransport(wire, volume, slots=2) for volume in volumes)
        yield WirePair(receiver, volumes[1], source, volumes[0], run="run1", slots=2)
        for end in (source, receiver, *volumes):
            end.close()
