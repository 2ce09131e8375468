"""A rank's side of a restore, told by a head that says its words in turn: what is written, and what is reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.control import Caller
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.packed import pack
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.restore import Restorer
from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.manifest import Manifest
from ktrain.state.train_state import TrainState
from ktrain.tier.files import FileTier
from tests.unit.checkpoint.shelves import NODE, Shelves, bucket_name
from tests.unit.state.worlds import ALONE, snapshot

Taken = tuple[Manifest, bytes]


class Head:
    """Stands in for the pulse: says one word after the other, keeps what the rank reports."""

    def __init__(self, *words: dict[str, Any]) -> None:
        self._words = list(words)
        self.reports: list[dict[str, Any]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def wait_answer(self, deadline: Deadline, what: str) -> dict[str, Any]:
        return {"restore": self._words.pop(0)}

    def note_restore(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def emit(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    @property
    def statuses(self) -> list[tuple[int, str]]:
        return [(report["round"], report["status"]) for report in self.reports]


class Nobody:
    """A keeper that is never asked: there is no peer."""

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        raise AssertionError(f"call of {name}")


def loading(number: int, taken: Taken, *tiers: str) -> dict[str, Any]:
    manifest = taken[0]
    place = {contract.TIER_MEMORY: NODE, contract.TIER_BUCKET: "0a1b"}
    copies = [
        {"tier": tier, "place": place[tier], "rank": 0, "identity": manifest.identity.to_json()} for tier in tiers
    ]
    return {
        "state": "loading",
        "round": number,
        "identity": manifest.identity.to_json(),
        "manifests": pack({0: manifest.to_bytes().decode()}),
        "sources": {"0": copies},
    }


def go(number: int) -> dict[str, Any]:
    return {"state": "go", "round": number}


def failed(number: int) -> dict[str, Any]:
    return {"state": "failed", "round": number, "error": {"kind": "corruption", "message": "no good copy is left"}}


def model(value: float, width: int = 300) -> nn.Linear:
    made = nn.Linear(width, width)
    with torch.no_grad():
        made.weight.fill_(value)
        made.bias.fill_(value)
    return made


class Scene:
    """A node with a volume, a run in a directory, and a rank that restores into `model`."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.shelves = Shelves(folder, "0123", FileTier(self.run, kind=contract.TIER_BUCKET))
        self.model = model(-1.0)

    def save(self, step: int, value: float) -> Taken:
        return snapshot(TrainState({"model": model(value)}), step=step)

    def put(self, tier: str, taken: Taken, *, spoilt: bool = False) -> None:
        manifest, payload = taken
        if spoilt:
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        self.shelves.put(tier, {0: (manifest, payload)})

    def restore(self, head: Head) -> int:
        restorer = Restorer(
            TrainState({"model": self.model}),
            ALONE,
            self.shelves.volume,
            cast(Pulse, head),
            cast(Caller, Nobody()),
            str(self.run),
        )
        return restorer.restore(FaultPoints([], epoch=1))

    @property
    def values(self) -> set[float]:
        return {float(value) for tensor in self.model.parameters() for value in tensor.detach().unique()}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.shelves.close()


def test_restorer_reports_ready_then_applied_with_what_it_read(scene: Scene) -> None:
    taken = scene.save(20, 2.0)
    scene.put(contract.TIER_MEMORY, taken)
    head = Head(loading(1, taken, contract.TIER_MEMORY), go(1))
    assert scene.restore(head) == 20
    assert head.statuses == [(0, "waiting"), (1, "ready"), (1, "applied")]
    assert scene.values == {2.0}
    report = head.reports[-1]
    assert report["tier"] == contract.TIER_MEMORY
    assert report["wanted_nbytes"] == 4 * (300 * 300 + 300) <= report["nbytes"] == taken[0].nbytes


def test_restorer_whose_memory_is_bad_in_the_middle_takes_the_bucket_in_the_same_round(scene: Scene) -> None:
    taken = scene.save(20, 2.0)
    scene.put(contract.TIER_MEMORY, taken, spoilt=True)
    scene.put(contract.TIER_BUCKET, taken)
    head = Head(loading(1, taken, contract.TIER_MEMORY, contract.TIER_BUCKET), go(1))
    assert scene.restore(head) == 20
    assert scene.values == {2.0}
    ((kind, fields),) = head.events
    assert kind == "bad_copy" and (fields["tier"], fields["end"]) == (contract.TIER_MEMORY, taken[0].nbytes)
    assert scene.shelves.volume.scan() == []  # the slot was taken out of the inventory


def test_restorer_told_an_older_step_overwrites_all_that_the_newer_one_left(scene: Scene) -> None:
    newer, older = scene.save(20, 2.0), scene.save(10, 1.0)
    scene.put(contract.TIER_BUCKET, newer, spoilt=True)
    scene.put(contract.TIER_BUCKET, older)
    head = Head(loading(1, newer, contract.TIER_BUCKET), loading(2, older, contract.TIER_BUCKET), go(2))
    assert scene.restore(head) == 10
    assert head.statuses == [(0, "waiting"), (1, "failed"), (2, "ready"), (2, "applied")]
    assert scene.values == {1.0}


def test_restorer_without_a_good_copy_says_that_the_state_is_of_two_origins(scene: Scene) -> None:
    taken = scene.save(20, 2.0)
    scene.put(contract.TIER_BUCKET, taken, spoilt=True)
    with pytest.raises(CorruptionError, match="no good copy is left\nProven values of a checkpoint may have"):
        scene.restore(Head(loading(1, taken, contract.TIER_BUCKET), failed(2)))
    assert scene.values == {-1.0, 2.0}  # only whole proven chunks were written


def test_restorer_that_is_refused_before_it_read_says_that_nothing_was_changed(scene: Scene) -> None:
    with pytest.raises(CorruptionError, match="no good copy is left\nNothing was changed"):
        scene.restore(Head(failed(1)))
    assert scene.values == {-1.0}


def test_restorer_with_a_misfit_says_whether_an_earlier_step_was_written(scene: Scene) -> None:
    fits = scene.save(20, 2.0)
    other = snapshot(TrainState({"model": model(1.0, width=7)}), step=10)
    scene.put(contract.TIER_BUCKET, fits, spoilt=True)
    with pytest.raises(ConfigError, match="Nothing was changed"):
        scene.restore(Head(loading(1, other, contract.TIER_BUCKET)))
    assert scene.values == {-1.0}
    with pytest.raises(ConfigError, match="does not fit the state(.|\n)*Proven values of a checkpoint may"):
        scene.restore(Head(loading(1, fits, contract.TIER_BUCKET), loading(2, other, contract.TIER_BUCKET)))


def test_restorer_with_a_lost_object_says_so_and_leaves_the_state(scene: Scene) -> None:
    taken = scene.save(20, 2.0)
    head = Head(loading(1, taken, contract.TIER_BUCKET), failed(2))
    with pytest.raises(CorruptionError):
        scene.restore(head)
    (failure,) = head.reports[1]["copies"]
    assert failure["corrupt"] and bucket_name(taken[0]) in failure["reason"]
    assert scene.values == {-1.0}
