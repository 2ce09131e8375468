from __future__ import annotations

from typing import Any

from ktrain.checkpoint.commits import Commits
from ktrain.checkpoint.roster import Attempt
from tests.unit.checkpoint.builders import identity

NODES = ("node-0", "node-1")


def _quiet(kind: str, **fields: Any) -> None:
    pass


def test_needed_a_commit_among_peers_is_given_up_once_the_bucket_is_newer() -> None:
    commits = Commits(Attempt.of(1, {"node-0": [0], "node-1": [1]}), _quiet)
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
