"""Stages of a pipeline: parts whose names differ between the ranks, joined for a rank that has other names now.

Each rank's JSON of a part speaks of the tensors that this rank had. A rank that has another cut of the layers takes
what is said of each of its names from whichever rank said it; where several did, from the one that stands for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ktrain.format import objects
from ktrain.state.saved import Wishes

_MAX_NAMED = 3


def join_module(part: str, live: Collection[str], wishes: Wishes) -> Mapping[str, Any]:
    """The JSON of a module part for a module that has the `live` names."""
    own = wishes.saved.objects(part) or {}
    stored = set(own.get("keys", ()))
    if stored == set(live):
        return own
    every = [own, *wishes.saved.all_objects(part)]
    if all(about.get("keys") == own.get("keys") for about in every):
        lacking = [f"{part}/{name}" for name in sorted(stored - set(live))]
        _leave_out(lacking, "stored, but the module has no such tensor", wishes)
    joined: dict[str, Any] = {**own, "keys": sorted(live)}
    for member in ("aliases", "extra"):
        known = _first_said(about.get(member, {}) for about in every)
        joined[member] = {name: known[name] for name in live if name in known}
    frozen = {name for about in every for name in about.get("frozen", ())}
    if frozen:
        joined["frozen"] = sorted(frozen & set(live))
    return joined


def join_optimizer(part: str, live: Sequence[Collection[str]], wishes: Wishes) -> Mapping[str, Any] | None:
    """The JSON of an optimizer part for groups that have the `live` names; None where it does not fit."""
    own = wishes.saved.objects(part) or {}
    groups = own.get("groups", [])
    if len(groups) != len(live):
        wishes.problems.append(f"{part}: expected {len(live)} parameter groups, found {len(groups)}")
        return None
    every = [own, *wishes.saved.all_objects(part)]
    stateful = _stateful(own)
    if [_params(group) for group in groups] == [set(names) for names in live] and (
        # Some optimizers divide the work by parameter: then each rank has the state of its share.
        wishes.saved.is_same_world or all(_stateful(about) == stateful for about in every)
    ):
        return own
    num_problems = len(wishes.problems)
    joined = [_join_group(part, at, set(names), every, wishes) for at, names in enumerate(live)]
    if len(wishes.problems) > num_problems:
        return None
    wanted = set().union(*live)
    keys = _first_said({name: about["keys"][at] for name, at in about.get("state", {}).items()} for about in every)
    values = _first_said(about.get("values", {}) for about in every)
    lists = [list(each) for each in sorted({tuple(keys[name]) for name in wanted if name in keys})]
    return {
        **own,
        "groups": joined,
        "keys": lists,
        "state": {name: lists.index(keys[name]) for name in sorted(wanted) if name in keys},
        "values": {name: values[name] for name in wanted if name in values},
    }


def _join_group(
    part: str, at: int, live: set[str], every: Sequence[Mapping[str, Any]], wishes: Wishes
) -> dict[str, Any]:
    """One group, with the options that its names were stored with."""
    groups = [about["groups"][at] for about in every if at < len(about.get("groups", []))]
    names = [_params(group) for group in groups]
    unknown = sorted(live - set().union(*names))
    wishes.problems.extend(f"{part}: group {at}: parameter {name}: not stored" for name in unknown)
    if all(found == names[0] for found in names):
        lacking = [f"{part}: group {at}: parameter {name}" for name in sorted(names[0] - live)]
        _leave_out(lacking, "stored, but not in the optimizer", wishes)
    options = [{**group, "params": sorted(live)} for group, found in zip(groups, names, strict=True) if found & live]
    if any(other != options[0] for other in options):
        wishes.problems.append(f"{part}: group {at}: its parameters were stored with different options")
    return options[0] if options else {**groups[0], "params": sorted(live)}


def _leave_out(names: Sequence[str], reason: str, wishes: Wishes) -> None:
    """Names that every rank stored and this one lacks: an error, unless another world may have cut the layers anew."""
    if wishes.saved.is_same_world:
        wishes.problems.extend(f"{name}: {reason}" for name in names)
    elif names:
        listed = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
        wishes.notices.append(f"stored, but not on this rank, so other stages are taken to have them: {listed}")


def _stateful(about: Mapping[str, Any]) -> set[str]:
    return set(about.get("state", {}))


def _params(group: Any) -> set[str]:
    return set(objects.decode(group, tensor=str)["params"])


def _first_said(every: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for said in every:
        for name, value in said.items():
            found.setdefault(name, value)
    return found
