"""What tests of ktrain and of those who build on it share: clocks, faults, conformance suites, a fake cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktrain.testing.fake_cluster import FakeCluster

__all__ = ["FakeCluster"]


def __getattr__(name: str) -> object:
    """Loads the fake cluster when it is asked for: the other modules do without it."""
    if name == "FakeCluster":
        from ktrain.testing.fake_cluster import FakeCluster

        return FakeCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
