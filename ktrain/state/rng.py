"""Every random generator of a rank, as a part of the TrainState."""

from __future__ import annotations

import array
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ktrain import device
from ktrain.state.topology import Topology

RNG_PART = "rng"


class Generators:
    """torch's default generators (host and devices), Python's `random`, numpy's global one if it is loaded.

    Reading them changes none of them.
    """

    def __init__(self, devices: range | None) -> None:
        self._devices = devices  # None: all that the process sees

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "cpu": torch.get_rng_state(),
            # By position, not by device number: after a move to another node the numbers differ.
            "devices": device.generators(self._devices),
            "python": (version, _tensor_of(words), gauss),
        }
        if "numpy.random" in sys.modules:
            import numpy

            name, key, position, has_gauss, cached = numpy.random.get_state(legacy=True)
            words = torch.from_numpy(numpy.asarray(key, dtype=numpy.int64))
            state["numpy"] = (str(name), words, int(position), int(has_gauss), float(cached))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        device.set_generators(state["devices"], self._devices)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        if "numpy" in state:
            import numpy

            name, key, position, has_gauss, cached = state["numpy"]
            numpy.random.set_state((name, key.numpy().astype(numpy.uint32), position, has_gauss, cached))

    def reseed(self, seed: int) -> None:
        """Seeds all generators anew; `seed` is any unsigned 64-bit integer."""
        torch.manual_seed(seed % 2**63)  # the devices' too
        random.seed(seed)
        if "numpy.random" in sys.modules:
            import numpy

            numpy.random.seed(seed % 2**32)


def _tensor_of(words: Sequence[int]) -> torch.Tensor:
    """The words as int64: a third of the time that torch takes for as many Python integers."""
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)


def rng_part(topology: Topology) -> Generators:
    """The generators of this rank: of its own device, or of all devices where the node has but one rank."""
    if topology.local_world_size == 1 or device.count() <= 1:
        return Generators(None)
    return Generators(range(topology.local_rank, topology.local_rank + 1))
