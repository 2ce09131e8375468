"""Which tensors a source fills by itself, and what becomes of those that it cannot."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ktrain import native
from ktrain.base.clock import Deadline
from ktrain.format.manifest import Manifest
from ktrain.format.payload import Entry
from ktrain.format.shard import Box, Role, Shard
from ktrain.state.apply import apply, plan_restore
from ktrain.state.landing import Landing, land
from ktrain.state.saved import Piece, Target, row_strides
from ktrain.state.train_state import TrainState
from ktrain.testing.memory_source import MemorySource
from tests.unit.state.worlds import ALONE, snapshot


def restore(state: TrainState, taken: tuple[Manifest, bytes]) -> Landing:
    """Plans, lands, applies; only what the landing asks to view can be viewed."""
    source = MemorySource({0: taken})
    needs = plan_restore(state, source.manifests, ALONE)
    landing = land(needs.targets)
    source.fetch(landing.views, into=landing.runs, deadline=Deadline.after(30))
    apply(state, needs, source, landing)
    return landing


def test_landing_of_a_module_fills_live_tensors_in_place_and_views_none() -> None:
    saved, fresh = nn.Linear(5, 3), nn.Linear(5, 3)
    addresses = [value.data_ptr() for value in fresh.parameters()]
    landing = restore(TrainState({"m": fresh}), snapshot(TrainState({"m": saved})))
    assert not landing.views and set(landing.memory) == {"m/weight", "m/bias"}
    assert landing.nbytes == 4 * (15 + 3)
    assert [value.data_ptr() for value in fresh.parameters()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), fresh.parameters(), strict=True))


def test_landing_tells_autograd_that_tensors_have_changed() -> None:
    model = nn.Linear(2, 2)
    taken = snapshot(TrainState({"m": model}))
    loss = model(torch.ones(1, 2).requires_grad_()).square().sum()
    restore(TrainState({"m": model}), taken)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_landing_of_a_fresh_optimizer_gives_its_state_the_memory_that_was_filled() -> None:
    def make(steps: int) -> dict[str, Any]:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(steps):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        return {"m": model, "o": optimizer}

    saved, fresh = make(3), make(0)
    landing = restore(TrainState(fresh), snapshot(TrainState(saved)))
    assert not landing.views
    for name in ("weight", "bias"):
        found = fresh["o"].state[getattr(fresh["m"], name)]
        for key, value in saved["o"].state[getattr(saved["m"], name)].items():
            assert torch.equal(found[key], value)
            assert found[key].data_ptr() == landing.memory[f"o/m.{name}/{key}"].data_ptr()


def strided(value: torch.Tensor) -> torch.Tensor:
    return value.t().contiguous().t()


def test_landing_leaves_strided_tensors_to_views() -> None:
    model = nn.Module()
    model.register_buffer("plain", torch.randn(3, 2))
    model.register_buffer("turned", strided(torch.randn(3, 2)))
    taken = snapshot(TrainState({"m": model}))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.turned.zero_()
    landing = restore(TrainState({"m": model}), taken)
    assert set(landing.memory) == {"m/plain"} and set(landing.views) == {0}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_landing_of_tied_weights_fills_them_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    taken = snapshot(TrainState({"m": model}))
    expected = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["a"].weight.zero_()
    landing = restore(TrainState({"m": model}), taken)
    assert not landing.views
    assert torch.equal(model["b"].weight, expected)


def test_landing_of_tensors_that_share_memory_with_other_values_leaves_them_to_torch_in_order() -> None:
    untied = nn.Module()
    untied.register_buffer("first", torch.full((4,), 1.0))
    untied.register_buffer("second", torch.full((2,), 2.0))
    tied = nn.Module()
    tied.register_buffer("first", torch.zeros(4))
    tied.register_buffer("second", tied.first[1:3])
    landing = restore(TrainState({"m": tied}), snapshot(TrainState({"m": untied})))
    assert not landing.memory
    assert tied.first.tolist() == [1.0, 2.0, 2.0, 1.0]


def test_landing_in_a_tensor_that_was_replaced_since_the_plan_copies_the_value() -> None:
    fresh = nn.Linear(2, 2)
    taken = snapshot(TrainState({"m": nn.Linear(2, 2)}))
    state = TrainState({"m": fresh})
    source = MemorySource({0: taken})
    needs = plan_restore(state, source.manifests, ALONE)
    landing = land(needs.targets)
    source.fetch(landing.views, into=landing.runs, deadline=Deadline.after(30))
    fresh.weight = nn.Parameter(torch.zeros(2, 2))
    apply(state, needs, source, landing)
    assert snapshot(state)[1] == taken[1]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    """A stored box, a piece of it, and the target around the piece."""
    num_dims = draw(st.integers(0, 4))
    outer, inner, target = [], [], []
    for _ in range(num_dims):
        length = draw(st.integers(1, 5))
        begin = draw(st.integers(0, length - 1))
        size = draw(st.integers(1, length - begin))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        outer.append(length)
        inner.append((begin, size))
        target.append((begin - min(before, begin), size + min(before, begin) + after))
    return tuple(outer), _box(inner), _box(target)


def _box(rows: list[tuple[int, int]]) -> Box:
    return Box(tuple(offset for offset, _ in rows), tuple(length for _, length in rows))


@given(case=boxes(), data=st.data())
def test_landing_of_any_piece_of_any_box_copies_exactly_its_items(
    case: tuple[tuple[int, ...], Box, Box], data: st.DataObject
) -> None:
    outer, inner, box = case
    stored = torch.arange(1, torch.Size(outer).numel() + 1, dtype=torch.int32).reshape(outer)
    payload = stored.numpy().tobytes()
    entry = Entry("t", Shard("t", "int32", outer, Box.whole(outer), Role.SHARDED), 0, len(payload))
    strides = row_strides(outer)
    first = sum(offset * stride for offset, stride in zip(inner.offsets, strides, strict=True))
    last = first + sum((length - 1) * stride for length, stride in zip(inner.lengths, strides, strict=True))
    piece = Piece(0, entry, inner, 4 * first, 4 * (last + 1))
    local = torch.zeros(box.lengths, dtype=torch.int32)
    targets: Mapping[str, Target] = {"t": Target("int32", outer, box, (piece,), local, True)}
    landing = land(targets)
    scatter(payload, landing)
    expected = torch.zeros_like(local)
    where = tuple(slice(a - b, a - b + n) for a, b, n in zip(inner.offsets, box.offsets, inner.lengths, strict=True))
    source = tuple(slice(a, a + n) for a, n in zip(inner.offsets, inner.lengths, strict=True))
    expected[where] = stored[source]
    assert torch.equal(local, expected)


def scatter(payload: bytes, landing: Landing) -> None:
    expected = array("Q", native.digest_chunks(payload, chunk_nbytes=64))
    assert native.prove_scatter(payload, landing.runs[0], begin=0, chunk_nbytes=64, expected=expected) == []


def test_landing_leaves_what_lies_or_will_be_made_on_a_device_to_views() -> None:
    outer = Box.whole((2, 3))
    entry = Entry("t", Shard("t", "float32", (2, 3), outer, Role.SHARDED), 4096, 4120)
    piece = Piece(0, entry, outer, 4096, 4120)
    elsewhere = torch.empty(2, 3, device="meta")
    targets = {
        "live": Target("float32", (2, 3), outer, (piece,), elsewhere, True),
        "created": Target("float32", (2, 3), outer, (piece,), None, False),
    }
    landing = land(targets)
    assert not landing.memory and not landing.runs
    assert landing.views == {0: [(4096, 4120)]}
    assert landing.nbytes == 48


def test_landing_of_a_box_of_too_many_rows_is_left_to_torch() -> None:
    outer, inner = Box.whole((70, 70, 2, 2)), Box((0, 0, 0, 0), (70, 70, 2, 1))
    entry = Entry("t", Shard("t", "uint8", outer.lengths, outer, Role.SHARDED), 0, 19600)
    local = torch.zeros(inner.lengths, dtype=torch.uint8)
    target = Target("uint8", outer.lengths, inner, (Piece(0, entry, inner, 0, 19599),), local, True)
    landing = land({"t": target})
    assert not landing.memory and not landing.runs
    assert landing.views == {0: [(0, 19599)]}
