from __future__ import annotations

from typing import Any

from ktrain.checkpoint.roster import Roster
from ktrain.format.manifest import Identity
from tests.unit.checkpoint.builders import identity


def beat(instance: str, held: list[tuple[int, Identity]], *, has_looked: bool) -> dict[str, Any]:
    listed = [[rank, at.to_json()] for rank, at in held]
    about = {"member": "node-0", "node": "node-0", "host": "here", "instance": instance, "wire": None, "freed": False}
    said = {"filled": [], "manifests": [], "events": [], "events_from": 0, "events_logged": 0}
    return {**about, **said, "has_looked": has_looked, "held": listed, "on_disk": listed}


def test_take_keeper_that_has_not_looked_yet_holds_what_the_one_before_it_held() -> None:
    roster, there = Roster(), [(0, identity(10))]
    roster.take(beat("a", there, has_looked=True), 1.0, room=9)
    for _ in range(2):  # the answer to the first one may be lost
        roster.take(beat("b", [], has_looked=False), 2.0, room=9)
        assert roster.inventories() == roster.disks() == {"node-0": there}
    roster.take(beat("b", [], has_looked=True), 3.0, room=9)
    assert roster.inventories() == {"node-0": []}


def test_all_freed_waits_for_nobody_who_is_silent_for_longer_than_that_takes() -> None:
    roster = Roster()
    roster.take({**beat("a", [], has_looked=True), "freed": True}, 9.0, room=9)
    assert roster.all_freed(9.0, free_s=5.0)
    roster.take({**beat("b", [], has_looked=True), "member": "node-1", "node": "node-1"}, 3.0, room=9)

    assert not roster.all_freed(8.0, free_s=5.0)
    assert roster.all_freed(8.1, free_s=5.0)


def test_take_first_keeper_of_a_node_that_was_forgotten_holds_nothing() -> None:
    roster = Roster()
    roster.take(beat("a", [(0, identity(10))], has_looked=True), 1.0, room=9)
    roster.forget("node-0")
    roster.take(beat("b", [], has_looked=False), 2.0, room=9)
    assert roster.inventories() == {"node-0": []}
