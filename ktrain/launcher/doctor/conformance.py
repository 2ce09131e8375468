"""The requirements of the Kubernetes AI Conformance programme, held against what a cluster shows.

Which requirements there are, their levels and what proves them are data: `conformance.toml`, whose head names the
source. This says what was seen of a cluster, and is no certificate: the programme asks for more than can be read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ktrain.errors import DeadlineError, NotFoundError, UnavailableError
from ktrain.launcher.backends.kubernetes.client import Object
from ktrain.launcher.doctor.finding import Finding, Outcome, Shows, Standing
from ktrain.launcher.doctor.looks import Looks, condition, name_of

SOURCE = "github.com/cncf/k8s-ai-conformance, docs/AIConformance-1.33 to -1.37"
_MANY = 3  # names that are shown


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement in one version of the programme."""

    id: str
    level: str  # MUST or SHOULD
    proofs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look found: nothing, something, or that it may not be looked at."""

    text: str
    found: bool | None
    shows: str = ""
    absent: str = ""
    is_told: bool = False  # its text stands by itself, also where nothing was found


@cache
def _data() -> Mapping[str, Any]:
    return tomllib.loads((resources.files("ktrain.launcher.doctor") / "conformance.toml").read_text("utf-8"))


def requirements(version: tuple[int, int] | None) -> tuple[str | None, tuple[Requirement, ...]]:
    """The list for a cluster of that version, by the name of the list.

    That of the newest version for a newer cluster or one that does not tell; none for one before the programme began.
    """
    known = [tuple(int(part) for part in name.split(".")) for name in _data()["versions"]]
    fitting = [name for name, at in zip(_data()["versions"], known, strict=True) if version is None or at <= version]
    if not fitting:
        return None, ()
    name = fitting[-1]
    found = []
    for key, value in _data().items():
        for level in ("must", "should"):
            if key != "versions" and name in value.get(level, ()):
                found.append(Requirement(key, level.upper(), tuple(value["proofs"])))
    return name, tuple(sorted(found, key=lambda item: (item.level, item.id)))


def stand(looks: Looks, tests: Iterable[Finding] = ()) -> tuple[str | None, tuple[Standing, ...]]:
    """The name of the list and how the cluster stands to each requirement of it.

    `tests` are the findings of the active tests, by which alone behaviour is shown.
    """
    name, listed = requirements(looks.facts().version)
    done = {item.check: item for item in tests}
    return name, tuple(_stand(looks, item, done) for item in listed)


def _stand(looks: Looks, requirement: Requirement, tests: Mapping[str, Finding]) -> Standing:
    seen = [_look(looks, proof, tests) for proof in requirement.proofs]
    status = Shows.NOT_SHOWN
    if any(item.found is False and item.absent == Shows.NOT_MET for item in seen):
        status = Shows.NOT_MET
    elif any(item.found and item.shows == Shows.MET for item in seen):
        status = Shows.MET
    elif any(item.found is None for item in seen):
        status = Shows.UNKNOWN
    return Standing(requirement.id, requirement.level, status, _evidence(seen))


def _evidence(seen: list[_Seen]) -> tuple[str, ...]:
    """What was found or may not be read; where that is nothing, what was looked for."""
    told = tuple(item.text for item in seen if item.found is not False or item.is_told)
    absent = "; ".join(item.text for item in seen if item.found is False and not item.is_told)
    return (*told, f"not there: {absent}") if absent else told


def _look(looks: Looks, proof: Mapping[str, Any], tests: Mapping[str, Finding]) -> _Seen:
    shows, absent = proof.get("shows", ""), proof.get("absent", "")
    what = _subject(proof)
    if proof["look"] == "tests":
        return _tested(tests.get(proof["test"]), proof["test"])
    try:
        found = _LOOKS[proof["look"]](looks, proof)
    except NotFoundError:
        return _Seen(what, False, shows, absent)
    except (UnavailableError, DeadlineError) as error:
        return _Seen(f"{what}: could not be read: {error}", None, shows, absent)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return _Seen(f"{what}: the answer has another form than expected ({error!r})", None, shows, absent)
    return _Seen(found or what, found is not None, shows, absent)


def _tested(finding: Finding | None, test: str) -> _Seen:
    if finding is None:
        return _Seen("only a test shows how it behaves: ktrain doctor --active", False, is_told=True)
    if finding.outcome is Outcome.FAILED:
        return _Seen(f"{test}: {finding.evidence}", False, absent=Shows.NOT_MET, is_told=True)
    passed = finding.outcome is Outcome.OK
    return _Seen(f"{test}: {finding.evidence}", passed, shows=Shows.MET, is_told=True)


def _subject(proof: Mapping[str, Any]) -> str:
    match proof["look"]:
        case "objects":
            kind = f"{proof['plural']}.{proof['group']}" if proof["group"] else str(proof["plural"])
            which = f"{kind} {proof.get('name') or proof.get('labels') or ''}".rstrip()
            return f"working {which}" if "status" in proof or "condition" in proof else which
        case "labels":
            return f"node label {proof['prefix']}"
        case "allocates":
            return f"nodes with {', '.join(proof['prefixes'])}"
        case "devices":
            which = ", ".join(proof.get("drivers", ())) or proof.get("attribute", "")
            return f"device slices{f' ({which})' if which else ''}"
    return str(proof.get("group", proof.get("test")))


# Each gives its evidence, None where it saw nothing.


def _serves(looks: Looks, proof: Mapping[str, Any]) -> str | None:
    facts = looks.facts()
    if facts.served is None:
        raise UnavailableError("what is served may not be read")
    group = proof["group"]
    versions = facts.versions_of(group, *proof["plurals"]) or ()
    if not versions:
        return None
    return f"{group}/{','.join(versions)} serves {', '.join(proof['plurals']) or 'metrics'}"


def _objects(looks: Looks, proof: Mapping[str, Any]) -> str | None:
    inside = proof.get("inside")
    items = looks.list(proof["group"], proof["plural"], inside=inside, labels=proof.get("labels", ""))
    wanted = [item for item in items if _holds(item, proof)]
    if not wanted:
        return None
    said = f" {proof['condition']}" if "condition" in proof else ""
    return f"{_subject(proof)}: {len(wanted)}{said} ({_some(sorted(map(name_of, wanted)))})"


def _holds(item: Object, proof: Mapping[str, Any]) -> bool:
    if "name" in proof and name_of(item) != proof["name"]:
        return False
    if "condition" in proof and condition(item, proof["condition"]) != "True":
        return False
    return "status" not in proof or bool((item.get("status") or {}).get(proof["status"]))


def _labels(looks: Looks, proof: Mapping[str, Any]) -> str | None:
    found: dict[str, int] = {}
    for node in looks.list("", "nodes"):
        for key, value in (node["metadata"].get("labels") or {}).items():
            if key.startswith(proof["prefix"]) and value != proof.get("unless"):
                found[f"{key}={value}"] = found.get(f"{key}={value}", 0) + 1
    return f"node labels {_some([f'{text} on {n}' for text, n in sorted(found.items())])}" if found else None


def _allocates(looks: Looks, proof: Mapping[str, Any]) -> str | None:
    found: dict[str, int] = {}
    for node in looks.list("", "nodes"):
        for name, amount in ((node.get("status") or {}).get("allocatable") or {}).items():
            if name.startswith(tuple(proof["prefixes"])) and str(amount) != "0":
                found[name] = found.get(name, 0) + 1
    return f"nodes have {_some([f'{name} ({n})' for name, n in sorted(found.items())])}" if found else None


def _devices(looks: Looks, proof: Mapping[str, Any]) -> str | None:
    found: dict[str, int] = {}
    for item in looks.list("resource.k8s.io", "resourceslices"):
        driver = str(item["spec"]["driver"])
        devices = item["spec"].get("devices") or ()
        if "drivers" in proof and driver not in proof["drivers"]:
            continue
        if "attribute" in proof:
            devices = [each for each in devices if _has_attribute(each, proof["attribute"])]
        if devices:
            found[driver] = found.get(driver, 0) + len(devices)
    said = f" with {proof['attribute']}" if "attribute" in proof else ""
    return f"device slices{said}: {_some([f'{n} of {name}' for name, n in sorted(found.items())])}" if found else None


def _has_attribute(device: Mapping[str, Any], name: str) -> bool:
    attributes = {**(device.get("attributes") or {}), **((device.get("basic") or {}).get("attributes") or {})}
    return any(key.rpartition("/")[2] == name for key in attributes)


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _MANY} more" if len(texts) > _MANY else ""
    return f"{', '.join(texts[:_MANY])}{more}"


_LOOKS = {"serves": _serves, "objects": _objects, "labels": _labels, "allocates": _allocates, "devices": _devices}
