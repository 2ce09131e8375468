"""FakeCluster answers what a recorded API server answered: each transcript is sent again and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.testing.fake_clock import SteppedClock
from ktrain.testing.fake_cluster import FakeCluster, Pace
from tests.conformance.kubernetes.cases import CASES, Case, Stage
from tests.conformance.kubernetes.replay import (
    Answer,
    Bindings,
    Client,
    Follower,
    bookmarked,
    compare_answer,
    compare_events,
    counted,
    load,
    request_of,
    served_alike,
    watch_of,
)

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "kubernetes"
TRANSCRIPTS, CRDS = SHARED / "transcripts", SHARED / "crds"
NO_NAMESPACES = {"nosuch", "x"}  # named by requests that are to find nothing
BOOKMARK_S = 2.0
LONGEST_S = 60.0  # longer than any watch was recorded

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
    ends_by_itself = any(step.get("closed_by") == "server" for step in steps)
    clock = SteppedClock() if ends_by_itself else SYSTEM_CLOCK
    with FakeCluster(case.offer, crds=CRDS, pace=Pace(bookmark_s=BOOKMARK_S, clock=clock)) as cluster:
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
            if i not in case.without:
                follower.wait(partial(_came, steps[i]))
        if isinstance(clock, SteppedClock):
            _pass_time(clock, [(steps[i], follower) for i, follower in watches.items()])
        for i, follower in watches.items():
            _judge(outcome, case, i, _watched(steps[i], follower.end(), bindings))
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


def _came(step: dict[str, Any], events: list[Any]) -> bool:
    """Whether as many events have come as were recorded."""
    return counted(events) >= counted(step["events"])


def _pass_time(clock: SteppedClock, watches: list[tuple[dict[str, Any], Follower]]) -> None:
    """Lets the time of the server pass until bookmarks are due, and then until its watches end."""
    clock.advance(BOOKMARK_S)
    for step, follower in watches:
        follower.wait(partial(bookmarked, step["events"]))
    clock.advance(LONGEST_S)
    for _, follower in watches:
        follower.wait(lambda events: False)


def _watched(step: dict[str, Any], found: list[Any], bindings: Bindings) -> list[str]:
    num = None if step["closed_by"] == "server" else counted(step["events"])
    return compare_events(step["events"], found, bindings, num=num)


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


def test_page_says_how_much_is_compared() -> None:
    num_steps = sum(len(load(path)["steps"]) for path in TRANSCRIPTS.glob("*.json"))
    num_compared = num_steps - sum(len(case.without) for case in CASES.values())
    page = " ".join((ROOT / "docs" / "reference" / "fake-cluster.md").read_text("utf-8").split())
    assert f"{len(CASES)} recorded transcripts" in page
    assert f"whole answers: {num_compared} of their {num_steps} steps" in page


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
