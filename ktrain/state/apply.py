"""Stored bytes to live state: plan, fetch (the caller's), apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktrain import native
from ktrain.abc.source import SnapshotSource
from ktrain.base.collector import without_collections
from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.manifest import IMPORTED, Identity, Manifest
from ktrain.state.landing import Landing
from ktrain.state.parts import Context
from ktrain.state.saved import Reader, Saved, Target, Wishes, ranges_of
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class RestoreNeeds:
    """What one rank reads of a checkpoint, and into what.

    `notices` say in words what will not be as it was (per-rank parts on another world size, frozen parameters that
    were not stored).
    """

    notices: tuple[str, ...]
    context: Context  # the parameters' names
    targets: Mapping[str, Target]
    objects: Mapping[str, Mapping[str, Any]]  # by part; a part that is derived anew is in `seeds` instead
    seeds: Mapping[str, int]

    @property
    def ranges(self) -> dict[int, list[tuple[int, int]]]:
        """Absolute byte ranges of the payloads by saved rank, sorted and merged."""
        return ranges_of(self.targets.values())


def plan_restore(
    state: TrainState,
    manifests: Mapping[int, Manifest],
    topology: Topology,
    copies: Mapping[int, Manifest] | None = None,
) -> RestoreNeeds:
    """What this rank needs of the checkpoint. Changes nothing.

    Args:
        manifests: all ranks' manifests of one checkpoint.
        copies: manifests of copies at hand, by the saved rank that they lie beside.

    Raises:
        ConfigError: state and checkpoint do not fit; lists what is missing, unexpected or of another form.
        CorruptionError: the checkpoint has not all of a tensor that this rank needs.
    """
    with without_collections():
        return _plan(state, Saved(manifests, topology, copies), topology)


def _plan(state: TrainState, saved: Saved, topology: Topology) -> RestoreNeeds:
    identity = saved.identity
    wishes = Wishes(saved)
    context = Context(topology)
    absent = _compare_parts(state, saved, wishes)
    objects: dict[str, Mapping[str, Any]] = {}
    seeds: dict[str, int] = {}
    for part in state.parts:
        about = saved.objects(part.name)
        if about is None:
            continue
        if part.is_per_rank and not saved.is_same_world:
            seeds[part.name] = _seed(identity, topology)
        elif _is_kind(part.name, about, part.kind, wishes):
            part.plan(context, wishes)
            objects[part.name] = wishes.objects.get(part.name, about)
    if wishes.problems:
        raise _misfit(identity, wishes.problems)
    if wishes.gaps:
        raise CorruptionError(f"the checkpoint of {identity} is not whole:{_listed(wishes.gaps)}\nTake another step.")
    wishes.notices.extend(
        f"part {name!r} belongs to a rank; it was stored by {saved.world_size} ranks and there are "
        f"{topology.world_size} now, so it is made anew"
        for name in seeds
    )
    wishes.notices.extend(
        f"part {name!r} is not among the imported ones; it stays as the program made it" for name in absent
    )
    return RestoreNeeds(tuple(wishes.notices), context, wishes.targets, objects, seeds)


def apply(state: TrainState, needs: RestoreNeeds, source: SnapshotSource, landing: Landing | None = None) -> None:
    """Loads the state, once the source has proven the bytes: `needs.ranges`, or those of the landing.

    Tensors that are live keep their storage. A failure on the way leaves the state half loaded: end the
    process, or apply another checkpoint.

    Args:
        landing: memory that the source has filled already; tensors that are created keep theirs.

    Raises:
        CorruptionError: the JSON of a part names tensors that are not there.
    """
    with without_collections():
        reader = Reader(needs.targets, source, None if landing is None else landing.memory)
        for part in state.parts:
            if part.name in needs.seeds:
                part.derive(needs.seeds[part.name])
            elif part.name in needs.objects:
                part.load(needs.objects[part.name], reader, needs.context)
        reader.close()


def _compare_parts(state: TrainState, saved: Saved, wishes: Wishes) -> list[str]:
    """The state's parts that an imported checkpoint does not have; in any other checkpoint that is a problem."""
    stored = saved.part_names()
    absent = sorted(set(state.names) - stored)
    for name in sorted(stored - {*state.names, IMPORTED}):
        wishes.problems.append(f"{name}: the checkpoint has this part, the state has not")
    if IMPORTED in stored:
        return absent
    for name in absent:
        wishes.problems.append(f"{name}: the state has this part, the checkpoint has not")
    return []


def _is_kind(name: str, about: Mapping[str, Any], expected: str, wishes: Wishes) -> bool:
    if about.get("kind") == expected:
        return True
    wishes.problems.append(f"{name}: expected a part of kind {expected!r}, found {about.get('kind')!r}")
    return False


def _misfit(identity: Identity, problems: list[str]) -> ConfigError:
    return ConfigError(
        f"the checkpoint of {identity} does not fit the state:{_listed(problems)}\n"
        "Make the state as it was when it was saved, or start a new run."
    )


def _listed(problems: list[str]) -> str:
    listed = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
    more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    return listed + more


def _seed(identity: Identity, topology: Topology) -> int:
    text = f"{identity.run}/{identity.step}/{identity.epoch}/{topology.world_size}/{topology.rank}"
    return native.crc64(text.encode())
