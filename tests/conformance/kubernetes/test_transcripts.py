"""FakeCluster answers what a recorded API server answered: each transcript is sent again and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktrain.testing.fake_cluster import FakeCluster, Pace
from tests.conformance.kubernetes.cases import CASES, Case, Stage
from tests.conformance.kubernetes.replay import (
    Answer,
    Bindings,
    Client,
    Follower,
    compare_answer,
    compare_events,
    counted,
    load,
    request_of,
    served_alike,
    watch_of,
)

SHARED = Path(__file__).parents[4] / "shared" / "kubernetes"
TRANSCRIPTS, CRDS = SHARED / "transcripts", SHARED / "crds"
NO_NAMESPACES = {"nosuch", "x"}  # named by requests that are to find nothing
ALL_EVENTS = 10**9

pytestmark = pytest.mark.skipif(
    not TRANSCRIPTS.is_dir(), reason=f"no transcripts of a real API server in {TRANSCRIPTS}"
)


@dataclass(slots=True)
class Outcome:
    """What came of a replay."""

    compared: list[int] = field(default_factory=list)
    wrong: dict[int, list[str]] = field(default_factory=dict)
    right_after_all: list[int] = field(default_factory=list)  # not to be compared, and yet the same
    parts_used: set[str] = field(default_factory=set)  # what of the case's `apart` was different indeed
    num_steps: int = 0


def replay(name: str, case: Case) -> Outcome:
    transcript = load(TRANSCRIPTS / f"{name}.json")
    steps = transcript["steps"]
    outcome = Outcome(num_steps=len(steps))
    with FakeCluster(case.offer, crds=CRDS, pace=Pace(bookmark_s=0.2)) as cluster:
        client, bindings = Client(cluster), Bindings()
        namespaces = sorted({space for step in steps for space in _namespaces(step)} - NO_NAMESPACES)
        for namespace in namespaces:
            client.send({"method": "POST", "path": "/api/v1/namespaces", "body": {"metadata": {"name": namespace}}})
        stage = Stage(cluster, client, bindings, steps, namespaces[0] if namespaces else "default")
        watches = {}
        for i, step in enumerate(steps):
            if i in case.before:
                case.before[i](stage)
            if "watch" in step:
                watches[i] = Follower(client, watch_of(step, bindings))
            else:
                answer = client.send(request_of(step, bindings, _unknown_version(step)))
                _judge(outcome, case, i, _differences(step, answer, bindings))
        for i, follower in watches.items():
            _judge(outcome, case, i, _watched(steps[i], follower, bindings, i in case.without))
    return outcome


def _namespaces(step: dict[str, Any]) -> Iterator[str]:
    path = (step.get("request") or step["watch"])["path"]
    yield from re.findall(r"/namespaces/([^/]+)/", path)


def _unknown_version(step: dict[str, Any]) -> str:
    """What is sent for a version that no answer has shown: one from the future or one from long ago."""
    return "999999999999" if "from the future" in step.get("note", "") else "1"


def _differences(step: dict[str, Any], answer: Answer, bindings: Bindings) -> list[str]:
    path = step["request"]["path"]
    if path in ("/api", "/apis") or re.fullmatch(r"/api/v1|/apis/[^/]+(/[^/]+)?", path):
        step = served_alike(step, answer)
    return compare_answer(step, answer, bindings)


def _watched(step: dict[str, Any], follower: Follower, bindings: Bindings, is_skipped: bool) -> list[str]:
    recorded = step["events"]
    if step["closed_by"] == "server":
        return compare_events(recorded, follower.end(ALL_EVENTS), bindings)
    count = 0 if is_skipped else counted(recorded)
    return compare_events(recorded, follower.end(count), bindings, num=counted(recorded))


def _judge(outcome: Outcome, case: Case, step: int, differences: list[str]) -> None:
    if step in case.without:
        if not differences:
            outcome.right_after_all.append(step)
        return
    outcome.compared.append(step)
    for line in differences:
        apart = next((pattern for pattern in case.apart if re.match(pattern, line)), None)
        if apart is None:
            outcome.wrong.setdefault(step, []).append(line)
        else:
            outcome.parts_used.add(apart)


def test_every_transcript_has_its_case() -> None:
    assert sorted(CASES) == sorted(path.stem for path in TRANSCRIPTS.glob("*.json"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_replay_of_transcript_is_answered_as_recorded(name: str) -> None:
    case = CASES[name]
    outcome = replay(name, case)
    wrong = [f"step {step}: {line}" for step, lines in outcome.wrong.items() for line in lines]
    assert not wrong, "\n".join(wrong)
    assert not outcome.right_after_all, f"these steps can be compared now: {outcome.right_after_all}"
    assert outcome.parts_used == set(case.apart), "parts that are no longer different are to be compared again"
    assert len(outcome.compared) + len(case.without) == outcome.num_steps
    print(_row(name, case, outcome))


def _row(name: str, case: Case, outcome: Outcome) -> str:
    reasons: dict[str, list[str]] = {}
    for step, reason in case.without.items():
        reasons.setdefault(reason, []).append(str(step))
    skipped = "; ".join(f"{', '.join(steps)}: {reason}" for reason, steps in reasons.items())
    parts = "; ".join(f"{place}: {reason}" for place, reason in case.apart.items())
    return f"{name} | {len(outcome.compared)} compared | not compared: {skipped or '-'} | parts not: {parts or '-'}"
