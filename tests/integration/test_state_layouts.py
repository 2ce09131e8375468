"""Four gloo ranks in every layout of torch: exact resume, clean names, even shares, and each layout from each other.

One start of the ranks (`layout_worker.py`) goes through all of them; the tests here judge what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ktrain.state.train_state import TrainState
from tests.integration.layout_worker import ALIKE, LAYOUTS, SHARING, WORLD, Net, read
from tests.unit.state.worlds import restore

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
PAGE = 4096

pytestmark = [pytest.mark.timeout(360), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank reports: by case (`layout-ranks per node`), and `crossed`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.integration.layout_worker", str(folder)],
            env={**environment, "RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def per_node_of(layout: str) -> tuple[int, ...]:
    return (2, 4) if layout in SHARING else (2,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_resumes_with_the_losses_of_the_untouched_run(layout: str, found: Any) -> None:
    for per_node in per_node_of(layout):
        for rank in found:
            case = rank[f"{layout}-{per_node}"]
            assert case["resumed"] == case["plain"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_restored_gives_the_same_snapshot(layout: str, found: Any) -> None:
    for per_node in per_node_of(layout):
        assert [rank[f"{layout}-{per_node}"]["same_snapshot"] for rank in found] == [True] * WORLD


@pytest.mark.parametrize("layout", ALIKE[1:])
def test_layout_does_not_change_the_names(layout: str, found: Any) -> None:
    def names(of: str) -> set[str]:
        return {name for rank in found for name in rank[f"{of}-2"]["names"]}

    assert names(layout) == names(ALIKE[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_node_restores_from_itself(layout: str, found: Any) -> None:
    for index, rank in enumerate(found):
        node = index // 2 * 2
        assert set(rank[f"{layout}-2"]["read_from"]) <= {node, node + 1}


@pytest.mark.parametrize("layout", ["ddp", "ddp-average", "tensor-4"])
def test_ranks_of_a_node_share_copies_evenly(layout: str, found: Any) -> None:
    for per_node in (2, 4):
        sizes = [rank[f"{layout}-{per_node}"]["nbytes"] for rank in found]
        assert max(sizes) - min(sizes) <= PAGE
    # One copy on a node of four; what each tensor-parallel rank holds for itself is no copy.
    whole = [sum(rank[f"{layout}-{per_node}"]["nbytes"] for rank in found) for per_node in (2, 4)]
    assert whole[1] < 0.6 * whole[0]


def test_hybrid_shards_are_stored_once_a_node(found: Any) -> None:
    two_nodes, one_node = (
        sum(rank[f"hsdp-2x2-{per_node}"]["nbytes"] for rank in found) - _steps_nbytes(found, per_node)
        for per_node in (2, 4)
    )
    assert two_nodes == 2 * one_node


def _steps_nbytes(found: Any, per_node: int) -> int:
    """The optimizer's step counters are each rank's own."""
    return sum(4 for rank in found for name in rank[f"hsdp-2x2-{per_node}"]["names"] if name.endswith("/step"))


def test_stages_hold_their_own_layers(found: Any) -> None:
    names = [{name for name in rank["stages-2-data-2-2"]["names"] if name.startswith("model/")} for rank in found]
    assert names[0] == names[1] and names[2] == names[3]
    assert names[0] | names[2] == {f"model/{name}" for name in Net().state_dict()}
    assert not names[0] & names[2]


def test_stages_are_joined_in_one_process(folder: Path, found: Any) -> None:
    assert found
    net, optimizer = restored_alone(folder, "stages-2-data-2-2")
    parts = [torch.load(folder / f"stages-2-data-2-2-{rank}.values", weights_only=True) for rank in (0, 2)]
    assert_same(net, optimizer, parts[0] | parts[1])


def test_adapter_is_stored_without_its_base_and_says_so(found: Any) -> None:
    names = {name for rank in found for name in rank["adapter-2"]["names"]}
    assert {name for name in names if name.startswith("model/")} == {
        "model/up.weight", "model/up.bias", "model/head.weight"
    }  # fmt: skip
    for rank in found:
        (notice,) = rank["adapter-2"]["notices"]
        assert "5 frozen parameters" in notice


@pytest.mark.parametrize("pair", [f"{origin}:{target}" for origin in ALIKE for target in ALIKE if origin != target])
def test_layout_restores_from_each_other(pair: str, found: Any) -> None:
    assert [rank["crossed"][pair] for rank in found] == [True] * WORLD


@pytest.mark.parametrize("origin", ALIKE)
def test_layout_restores_in_one_process(origin: str, folder: Path, found: Any) -> None:
    assert found
    net, optimizer = restored_alone(folder, f"{origin}-2")
    assert_same(net, optimizer, torch.load(folder / f"{origin}-2-0.values", weights_only=True))


def restored_alone(folder: Path, saved: str) -> tuple[Net, torch.optim.Optimizer]:
    """The whole model in one process, with what the ranks of a layout saved."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    restore(TrainState({"model": net, "optimizer": optimizer}), read(folder, saved))
    return net, optimizer


def assert_same(net: Net, optimizer: torch.optim.Optimizer, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, expected[f"model/{name}"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], expected[f"{name}/{key}"])
