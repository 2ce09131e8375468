from __future__ import annotations

import os
from pathlib import Path

import pytest

from ktrain.snapshot import numa

TWO_NODES = {0: frozenset({0, 1, 4, 5}), 1: frozenset({2, 3, 6, 7})}
ALL = frozenset(range(8))
ANY: frozenset[int] = frozenset()


def machine(folder: Path, lists: dict[str, str]) -> Path:
    for name, text in lists.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(text)
    return folder


def test_read_nodes_gives_the_processors_of_each(tmp_path: Path) -> None:
    root = machine(tmp_path, {"node0": "0-1,4-5\n", "node1": "2-3,6-7\n", "node2": "\n"})
    (root / "has_cpu").write_text("0-1\n")
    assert numa.read_nodes(root) == {**TWO_NODES, 2: ANY}


@pytest.mark.parametrize("lists", [{}, {"node0": "zero\n"}])
def test_read_nodes_where_the_system_does_not_tell_gives_nothing(tmp_path: Path, lists: dict[str, str]) -> None:
    assert numa.read_nodes(machine(tmp_path, lists)) == {}


def test_read_nodes_without_a_folder_gives_nothing(tmp_path: Path) -> None:
    assert numa.read_nodes(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("nodes", "allowed", "device_node", "chosen"),
    [
        (TWO_NODES, ALL, 1, {2, 3, 6, 7}),
        (TWO_NODES, frozenset({0, 2, 3}), 1, {2, 3}),
        (TWO_NODES, ALL, None, ANY),  # no device: its threads go anywhere
        (TWO_NODES, frozenset({0, 1}), 1, ANY),  # bound to one node by somebody else, who is obeyed
        (TWO_NODES, ALL, 5, ANY),  # a node that the system does not list
        ({0: ALL}, ALL, 0, ANY),
        ({0: ALL, 1: ANY}, ALL, 1, ANY),  # memory without processors
        ({}, ALL, 0, ANY),
    ],
)
def test_choose_processors_follows_the_device_within_what_is_allowed(
    nodes: dict[int, frozenset[int]], allowed: frozenset[int], device_node: int | None, chosen: frozenset[int]
) -> None:
    assert numa.choose_processors(nodes, allowed, device_node) == chosen


def test_running_on_binds_this_thread_and_gives_it_back() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    with pytest.raises(ZeroDivisionError), numa.running_on(one):
        assert os.sched_getaffinity(0) == one
        _ = 1 // 0
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("processors", [ANY, frozenset({100_000})])
def test_running_on_what_cannot_be_changes_nothing(processors: frozenset[int]) -> None:
    before = os.sched_getaffinity(0)
    with numa.running_on(processors):
        assert os.sched_getaffinity(0) == before
