"""The line of a run against a second definition, which follows the attempts one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from ktrain.base import contract
from ktrain.checkpoint import lineage
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.checkpoint.lineage import Candidate, Copy
from ktrain.format.manifest import Identity
from tests.unit.checkpoint.builders import identity


@dataclass
class History:
    """Attempts in order, each of which goes on from a snapshot of the line and perhaps commits."""

    attempts: list[AttemptRecord] = field(default_factory=list)
    made: list[Identity] = field(default_factory=list)
    line: dict[int, Identity] = field(default_factory=dict)  # step -> what a restore may choose

    def attempt(self, choice: int, steps: list[int], *, recorded: bool) -> None:
        epoch = len(self.attempts) + 1
        starts = [0, *sorted(self.line)]
        start = starts[choice % len(starts)]
        made = [identity(start + step, epoch) for step in sorted(set(steps))]
        if made:  # a commit beyond the start cuts what older attempts had made beyond it
            self.line = {step: at for step, at in self.line.items() if step <= start}
            self.line |= {at.step: at for at in made}
        self.made += made
        committed = {"step": made[0].step} if made and recorded else None
        self.attempts.append(AttemptRecord(epoch, {}, {"step": start}, committed))


histories = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), max_size=3)), max_size=6)


@given(histories)
def test_on_line_is_what_following_the_attempts_gives(story: list[tuple[int, list[int]]]) -> None:
    history = History()
    for choice, steps in story:
        history.attempt(choice, steps, recorded=True)
    chosen = {at for at in history.made if lineage.on_line(at, history.attempts)}
    assert chosen == set(history.line.values())


@given(histories)
def test_candidates_commit_that_is_not_recorded_yet_cuts_the_line_too(story: list[tuple[int, list[int]]]) -> None:
    history = History()
    for choice, steps in story:
        history.attempt(choice, steps, recorded=False)
    inventories = {"node-0": [(rank, at) for at in history.made for rank in (0, 1)]}
    found = lineage.candidates(inventories, {}, [], history.attempts)
    assert {candidate.identity for candidate in found} == set(history.line.values())


def test_candidates_incomplete_snapshots_do_not_count() -> None:
    whole, part = identity(10), identity(20)
    inventories = {"a": [(0, whole), (0, part)], "b": [(1, whole)]}
    found = lineage.candidates(inventories, {}, [], [])
    assert [candidate.identity for candidate in found] == [whole]
    assert found[0].copies[1] == (Copy(contract.TIER_MEMORY, "b", 1, whole),)


def test_candidates_ranks_of_two_identities_never_join() -> None:
    inventories = {"a": [(0, identity(10, 1)), (1, identity(10, 2))]}
    assert lineage.candidates(inventories, {}, [], []) == []


def candidate(step: int, **places: list[str]) -> Candidate:
    at = identity(step)
    copies = {
        rank: tuple(Copy(contract.TIER_MEMORY, node, rank, at) for node in nodes)
        for rank, nodes in enumerate(places.values())
    }
    return Candidate(at, copies)


def test_choose_takes_the_newest_that_still_has_every_rank() -> None:
    newest, older = candidate(20, a=["x", "y"], b=["x"]), candidate(10, a=["x"], b=["x"])
    assert lineage.choose([newest, older], set()) == newest
    lost = newest.copies[0][0].key()
    left = lineage.choose([newest, older], {lost})
    assert left is not None and left.identity.step == 20 and [copy.place for copy in left.copies[0]] == ["y"]
    assert lineage.choose([newest, older], {newest.copies[1][0].key()}) == older
    assert lineage.choose([newest], {newest.copies[1][0].key()}) is None


def test_sources_for_orders_own_memory_peers_bucket() -> None:
    at = identity(10)
    copies = (
        Copy(contract.TIER_BUCKET, "0a1b", 0, at),
        Copy(contract.TIER_MEMORY, "y", 0, at),
        Copy(contract.TIER_MEMORY, "x", 0, at),
    )
    seen = lineage.sources_for("x", Candidate(at, {0: copies}))[0]
    assert [(copy.tier, copy.place) for copy in seen] == [("memory", "x"), ("peer", "y"), ("bucket", "0a1b")]
    assert {copy.key() for copy in seen} == {copy.key() for copy in copies}  # a peer's memory is that node's memory


def test_copy_crosses_the_channel_unchanged() -> None:
    copy = Copy(contract.TIER_PEER, "node-1", 3, identity(10))
    assert Copy.from_json(copy.to_json()) == copy
