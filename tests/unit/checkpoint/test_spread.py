"""Whether each byte of the bucket is read once: rates from events, who fills what, and what is faster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base.events import Event
from ktrain.base.settings import Spread, restore_spread
from ktrain.checkpoint.spread import WORTH, Rates, Wants, choose, measured
from ktrain.errors import ConfigError

MB = 1_000_000
RATES = Rates(100 * MB, 1000 * MB)
AUTO, ALWAYS, NEVER = Spread.AUTO, Spread.ALWAYS, Spread.NEVER


def ddp(num_nodes: int, nbytes: int = 400 * MB, per_node: int = 1) -> tuple[Wants, dict[int, int]]:
    """Every rank wants all of what was saved by as many ranks."""
    sizes = dict.fromkeys(range(num_nodes * per_node), nbytes)
    return {f"node-{index}": [dict(sizes)] * per_node for index in range(num_nodes)}, sizes


def drained(node: str, step: int, nbytes: int, seconds: float) -> Event:
    return Event("drained", {"node": node, "step": step, "tier": "bucket", "nbytes": nbytes, "seconds": seconds})


def test_choose_of_a_replicated_state_gives_each_node_an_equal_share() -> None:
    wants, sizes = ddp(4)
    choice = choose(wants, sizes, RATES, AUTO)
    assert sorted(choice.fills) == sorted(sizes)
    assert sorted(choice.fills.values()) == sorted(wants)
    # 400 MB from the bucket at 100 MB/s, then 1200 MB at 1000 MB/s; against 1600 MB from the bucket
    assert choice.once_s == pytest.approx(5.2)
    assert "5.2 s, against 16 s" in choice.reason and "100 MB/s from the bucket" in choice.reason


def test_choose_with_a_slow_wire_reads_everywhere_and_says_both_estimates() -> None:
    wants, sizes = ddp(2)
    choice = choose(wants, sizes, Rates(100 * MB, 110 * MB), AUTO)
    assert choice.fills == {}
    assert choice.reason.startswith("every rank reads for itself") and "7.64 s, against 8 s" in choice.reason


def test_choose_less_than_a_fifth_faster_reads_everywhere() -> None:
    wants, sizes = ddp(2, nbytes=100 * MB)
    at_worth = 100 / (WORTH * 2 - 1)  # once is exactly 0.8 of everywhere
    assert choose(wants, sizes, Rates(100 * MB, at_worth * 0.99 * MB), AUTO).fills == {}
    assert choose(wants, sizes, Rates(100 * MB, at_worth * 1.01 * MB), AUTO).fills != {}


@pytest.mark.parametrize(
    ("rates", "missing"), [(Rates(), "drain"), (Rates(100 * MB), "replication"), (Rates(None, 1.0), "drain")]
)
def test_choose_without_a_rate_reads_everywhere_and_names_it(rates: Rates, missing: str) -> None:
    wants, sizes = ddp(2)
    assert choose(wants, sizes, rates, AUTO).fills == {}
    assert f"no {missing} was measured" in choose(wants, sizes, rates, AUTO).reason
    assert choose(wants, sizes, rates, ALWAYS).fills != {}
    assert f"no {missing} was measured" in choose(wants, sizes, rates, ALWAYS).reason


def test_choose_on_one_node_needs_no_wire() -> None:
    wants, sizes = ddp(1, per_node=4)
    choice = choose(wants, sizes, Rates(100 * MB), AUTO)
    assert set(choice.fills.values()) == {"node-0"}
    assert choice.once_s == pytest.approx(16.0)


def test_choose_never_and_nothing_shared_fill_nothing() -> None:
    wants, sizes = ddp(3)
    assert choose(wants, sizes, RATES, NEVER).fills == {}
    disjoint: Wants = {f"node-{rank}": [{rank: 400 * MB}] for rank in range(3)}
    choice = choose(disjoint, sizes, RATES, ALWAYS)
    assert choice.fills == {} and "no two of them" in choice.reason


def test_choose_leaves_alone_what_is_near_in_another_tier() -> None:
    wants, sizes = ddp(3)
    choice = choose(wants, {1: sizes[1]}, RATES, ALWAYS)
    assert set(choice.fills) == {1}


def test_choose_counts_what_a_node_alone_wants_as_its_load() -> None:
    sizes = {0: 100, 1: 100, 2: 1000}
    wants: Wants = {"a": [{0: 100, 1: 100, 2: 1000}], "b": [{0: 100, 1: 100}]}
    assert set(choose(wants, sizes, RATES, ALWAYS).fills.values()) == {"b"}


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]),
        st.lists(st.dictionaries(st.integers(0, 7), st.integers(0, 1000), max_size=8), min_size=1, max_size=3),
        min_size=1,
    )
)
def test_choose_gives_each_shared_payload_to_one_node_that_wants_it(wants: Wants) -> None:
    sizes = dict.fromkeys(range(8), 1000)
    choice = choose(wants, sizes, RATES, ALWAYS)
    readers = [saved for ranks in wants.values() for rank in ranks for saved, nbytes in rank.items() if nbytes]
    assert set(choice.fills) == {saved for saved in readers if readers.count(saved) > 1}
    for saved, node in choice.fills.items():
        assert any(rank.get(saved) for rank in wants[node])
    again = choose(dict(sorted(wants.items(), reverse=True)), sizes, RATES, ALWAYS)
    assert again.fills == choice.fills  # the order of what is told decides nothing


def test_measured_takes_a_nodes_ranks_together_and_the_median() -> None:
    events = [
        drained("node-0", 10, 200, 2.0),
        drained("node-0", 10, 100, 3.0),  # beside the other: 300 bytes in 3 s
        drained("node-1", 10, 300, 1.0),
        drained("node-0", 20, 400, 2.0),
        Event("drained", {"step": 20, "tier": "disk", "node": "node-0", "nbytes": 9, "seconds": 1e-9}),
        Event("drained", {"step": 20, "tier": "bucket", "nbytes": 9, "seconds": 1e-9}),  # of an older version
        Event("replicated", {"nbytes": 500, "seconds": 0.5}),
        Event("replicated", {"nbytes": 0, "seconds": 0.1}),  # it was there already
    ]
    assert measured([events]) == Rates(200.0, 1000.0)
    assert measured([]) == Rates()


def test_measured_from_replicas_of_own_bytes_alone_takes_the_best_of_what_the_wire_did_at_least() -> None:
    little = [
        Event("replicated", {"nbytes": 50, "own_bytes": 950, "seconds": 0.01, "wire_seconds": wire_s})
        for wire_s in (0.5, 0.1, 0.0)
    ]
    assert measured([little]) == Rates(None, 500.0)
    whole = Event("replicated", {"nbytes": 500, "own_bytes": 0, "seconds": 2.0, "wire_seconds": 1.0})
    assert measured([[*little, whole]]) == Rates(None, 250.0), "what crossed the wire whole tells more"


def test_restore_spread_of_an_unknown_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAIN_RESTORE_SPREAD", "sometimes")
    with pytest.raises(ConfigError, match="auto, always, never, found 'sometimes'"):
        restore_spread()
    monkeypatch.delenv("KTRAIN_RESTORE_SPREAD")
    assert restore_spread() is AUTO
