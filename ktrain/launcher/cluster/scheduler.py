"""The scheduler: puts pods on nodes that have room, gangs whole or not at all, and says why one waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ktrain.errors import ConflictError, NotFoundError
from ktrain.launcher.cluster import fitting, gangs
from ktrain.launcher.cluster.conditions import find_condition, has_condition, set_condition, set_meta_condition
from ktrain.launcher.cluster.events import WARNING, Recorder
from ktrain.launcher.cluster.fitting import Room
from ktrain.launcher.cluster.gangs import Gang, GangName, Mechanism
from ktrain.launcher.cluster.job_pods import is_deleting, is_terminal
from ktrain.launcher.cluster.resources import NODE, POD, copied
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

Placement = list[tuple[Object, Room]]


class Scheduler:
    """Places pods. Call from one thread; `reconcile` never waits."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recorder = Recorder(store, "default-scheduler")

    def reconcile(self) -> float | None:
        """Binds what fits now; nothing comes due by itself."""
        pods = self._store.list(POD).items
        waiting = [pod for pod in pods if _waits(pod)]
        if waiting:
            rooms = self._rooms(pods)
            for name, members in _by_gang(waiting).items():
                if name is None:
                    for pod in members:
                        self._place_one(pod, rooms)
                else:
                    self._place_gang(name, members, pods, rooms)
        return None

    def _rooms(self, pods: Sequence[Object]) -> list[Room]:
        there = [pod for pod in pods if pod["spec"].get("nodeName") and not is_terminal(pod)]
        return [
            Room.of(node, [pod for pod in there if pod["spec"]["nodeName"] == node["metadata"]["name"]])
            for node in self._store.list(NODE).items
            if has_condition(node, "Ready")
        ]

    def _place_one(self, pod: Object, rooms: Sequence[Room]) -> None:
        room = _best(pod, rooms)
        if room is None:
            self._refuse(pod, _why_not(pod, rooms))
        else:
            self._bind([(pod, room)])

    def _place_gang(self, name: GangName, members: list[Object], pods: Sequence[Object], rooms: list[Room]) -> None:
        gang = gangs.find(self._store, name)
        if gang is None:
            return  # its pods wait without a word, as they do in a real cluster
        mates = [pod for pod in pods if gangs.name_of(pod) == name and not is_terminal(pod) and not is_deleting(pod)]
        if len(mates) < gang.least:
            self._wait_for_members(gang, members, len(mates))
            return
        need = max(gang.least - (len(mates) - len(members)), 0)
        for domain in _domains(members, rooms):
            placement = _place(members, domain)
            if placement and len(placement) >= need:
                by_name = {room.name: room for room in rooms}
                self._bind([(pod, by_name[room.name]) for pod, room in placement])
                self._say_placed(gang, mates)
                return
        for pod in members:
            self._refuse(pod, _why_not(pod, rooms) or "pod group is unschedulable")
        if need:
            self._say_group(gang, "PodGroupScheduled", "False", "Unschedulable", "pod group is unschedulable")

    def _bind(self, placement: Placement) -> None:
        for pod, room in placement:
            room.take(pod)
            try:
                self._store.bind(pod["metadata"]["namespace"], pod["metadata"]["name"], room.name)
            except (NotFoundError, ConflictError):
                continue  # gone, or bound by somebody else

    def _refuse(self, pod: Object, message: str) -> None:
        metadata = pod["metadata"]
        old = find_condition(pod, "PodScheduled")
        if (old.get("reason"), old.get("message")) == ("Unschedulable", message):
            return

        def change(obj: Object) -> None:
            conditions = obj.setdefault("status", {}).setdefault("conditions", [])
            set_condition(conditions, self._store.now(), "PodScheduled", "False", "Unschedulable", message)

        try:
            told = self._store.mutate(POD, metadata["namespace"], metadata["name"], change, status=True)
        except NotFoundError:
            return
        self._recorder.say(told, WARNING, "FailedScheduling", message)

    # Groups

    def _wait_for_members(self, gang: Gang, members: list[Object], num_mates: int) -> None:
        """Native gangs wait in silence; Volcano says what is missing."""
        if gang.name.mechanism is not Mechanism.VOLCANO:
            return
        waiting = f"pod group is not ready, {num_mates} Pending, {gang.least} minAvailable"
        message = f"{waiting}; Pending: {len(members)} Unschedulable"
        for pod in members:
            self._refuse(pod, message)
        words = f"{gang.least}/{num_mates} tasks in gang unschedulable: {message}"
        self._say_group(gang, "Unschedulable", "True", "NotEnoughResources", words, phase="Inqueue")

    def _say_placed(self, gang: Gang, mates: Iterable[Object]) -> None:
        if gang.name.mechanism is Mechanism.VOLCANO:
            self._say_group(gang, "Scheduled", "True", "tasks in gang are ready to be scheduled", phase="Running")
        elif gang.name.mechanism is Mechanism.NATIVE:
            self._say_group(gang, "PodGroupScheduled", "True", "Scheduled")

    def _say_group(
        self, gang: Gang, kind: str, status: str, reason: str, message: str = "", *, phase: str | None = None
    ) -> None:
        if gang.group is None or gang.resource is None:
            return
        old = gang.group.get("status") or {}
        new = {**copied(old), **({"phase": phase} if phase else {})}
        set_meta_condition(new.setdefault("conditions", []), self._store.now(), kind, status, reason, message)
        if new != old:
            own = "status" in gang.resource.subresources
            self._store.update(gang.resource, {**gang.group, "status": new}, status=own)


def _waits(pod: Object) -> bool:
    spec = pod["spec"]
    return not (spec.get("nodeName") or spec.get("schedulingGates") or is_deleting(pod) or is_terminal(pod))


def _by_gang(pods: Iterable[Object]) -> dict[GangName | None, list[Object]]:
    found: dict[GangName | None, list[Object]] = {}
    for pod in pods:
        found.setdefault(gangs.name_of(pod), []).append(pod)
    return found


def _best(pod: Object, rooms: Sequence[Room]) -> Room | None:
    """The node with the fewest pods of those that have room, the first by name among equals."""
    fitting_rooms = [room for room in rooms if not fitting.obstacles(pod, room, rooms)]
    return min(fitting_rooms, key=lambda room: (len(room.pods), room.name), default=None)


def _domains(members: Sequence[Object], rooms: Sequence[Room]) -> list[list[Room]]:
    """Where a gang may be tried: everywhere, or in one domain after the other where its pods must be near."""
    keys = {term["topologyKey"] for pod in members for term in fitting.affinity_terms(pod, "podAffinity")}
    found = [list(rooms)]
    for key in sorted(keys):
        found = [
            [room for room in group if room.labels.get(key) == value]
            for group in found
            for value in sorted({room.labels[key] for room in group if key in room.labels})
        ]
    return found


def _place(members: Sequence[Object], rooms: Sequence[Room]) -> Placement:
    """Puts as many members as there is room for on copies of the nodes, the largest first."""
    trial = [room.copy() for room in rooms]
    placement: Placement = []
    for pod in sorted(members, key=lambda item: -sum(fitting.request(item).values())):
        room = _best(pod, trial)
        if room is not None:
            room.take(pod)
            placement.append((pod, room))
    return placement


def _why_not(pod: Object, rooms: Sequence[Room]) -> str:
    """The scheduler's sentence for a pod that fits nowhere; nothing for one that fits alone."""
    found = [fitting.obstacles(pod, room, rooms) for room in rooms]
    if any(not words for words in found):
        return ""
    counted = Counter(word for words in found for word in words)
    reasons = ", ".join(sorted(f"{number} {word}" for word, number in counted.items()))
    helpless = sum(not any(word.startswith(("Insufficient", "Too many")) for word in words) for words in found)
    parts = [(helpless, "Preemption is not helpful for scheduling"), (len(rooms) - helpless, _NO_VICTIM)]
    preemption = ", ".join(f"{number} {word}" for number, word in parts if number)
    total = f"0/{len(rooms)} nodes are available"
    if not rooms:
        return "no nodes available to schedule pods"
    return f"{total}: {reasons}. no new claims to deallocate, preemption: {total}: {preemption}."


_NO_VICTIM = "No preemption victims found for incoming pod"
