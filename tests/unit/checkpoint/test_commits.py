from __future__ import annotations

from typing import Any

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.commits import Commits
from ktrain.checkpoint.replication import Replication
from ktrain.checkpoint.roster import Attempt
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import identity

NODES = ("node-0", "node-1")


def _quiet(kind: str, **fields: Any) -> None:
    pass


def _commits() -> Commits:
    replication = Replication(Timeouts(patience_s=20), FakeClock())
    return Commits(Attempt.of(1, {"node-0": [0], "node-1": [1]}), replication, _quiet)


def test_needed_a_commit_among_peers_is_given_up_once_the_bucket_is_newer() -> None:
    commits = _commits()
    everywhere = [(rank, identity(10)) for rank in (0, 1)]
    commits.derive(dict.fromkeys(NODES, everywhere), {}, None)
    own = {node: [*everywhere, (rank, identity(20))] for rank, node in enumerate(NODES)}
    commits.derive(own, {}, None)
    assert commits.to_json() == {"memory": [20, 1], "peer": [10, 1]}
    commits.note_bucket(identity(10))
    assert {at.step for at in commits.needed()} == {10, 20}
    commits.note_bucket(identity(20))
    assert {at.step for at in commits.needed()} == {20}
    assert commits.all()["peer"] == identity(10), "it is committed all the same"


def test_needed_the_step_that_peers_take_next_but_not_one_that_the_bucket_alone_has() -> None:
    commits = _commits()
    for newest in (10, 20, 30):
        own = {node: [(rank, identity(step)) for step in range(10, newest + 1, 10)] for rank, node in enumerate(NODES)}
        commits.derive(own, {}, None)
        commits.replication.choose(commits.memory, commits.peer)
    commits.note_bucket(identity(20))
    assert {at.step for at in commits.needed()} == {10, 30}


def test_derive_a_step_that_peers_are_not_asked_for_is_not_committed_among_them() -> None:
    commits = _commits()
    commits.derive({node: [(rank, identity(10))] for rank, node in enumerate(NODES)}, {}, None)
    commits.replication.choose(commits.memory, commits.peer)
    everywhere = [(rank, identity(step)) for rank in (0, 1) for step in (10, 20)]
    commits.derive(dict.fromkeys(NODES, [held for held in everywhere if held[1].step == 20]), {}, None)
    assert commits.peer is None
    commits.derive(dict.fromkeys(NODES, everywhere), {}, None)
    assert commits.peer == identity(10)


def test_derive_a_step_whose_own_copy_is_gone_is_not_committed_among_peers() -> None:
    commits = _commits()
    commits.derive({"node-0": [(1, identity(10))], "node-1": [(0, identity(10)), (1, identity(10))]}, {}, None)
    assert commits.all() == {}
