"""The baseline of replication as a process: plain Ray, chunks of one actor, nothing landed and nothing proven.

Reads a number of bytes per line, answers with the seconds; ends when its input ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_GET_S = 60.0


class Chunk:
    """Serves one warm chunk again and again, which is the best case of a sender."""

    def __init__(self, nbytes: int) -> None:
        self._chunk = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)

    def read(self, nbytes: int) -> np.ndarray:
        return self._chunk[:nbytes]


def _get(actor: Any, nbytes: int, chunk_nbytes: int, in_flight: int) -> float:
    begin = time.perf_counter()
    ahead: deque[Any] = deque()
    asked = landed = 0
    while landed < nbytes:
        while asked < nbytes and len(ahead) < in_flight:
            ahead.append(actor.read.remote(min(chunk_nbytes, nbytes - asked)))
            asked += chunk_nbytes
        landed += ray.get(ahead.popleft(), timeout=_GET_S).nbytes
    return time.perf_counter() - begin


def main(config: dict[str, Any]) -> None:
    ray.init(
        address=config["address"],
        namespace="raw",
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=config["driver_host"],
    )
    node = next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == config["source_host"])
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "max_concurrency": config["in_flight"] + 1, "scheduling_strategy": where}
    actor = ray.remote(Chunk).options(**options).remote(config["chunk_nbytes"])
    expected = np.random.default_rng(0).integers(0, 256, config["chunk_nbytes"], np.uint8)
    found = ray.get(actor.read.remote(config["chunk_nbytes"]), timeout=_GET_S)
    print(json.dumps({"proven": bool(np.array_equal(found, expected))}), flush=True)
    for line in sys.stdin:
        seconds = _get(actor, int(line), config["chunk_nbytes"], config["in_flight"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
