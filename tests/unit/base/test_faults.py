from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base import faults
from ktrain.base.faults import ACTIONS, POINTS, Fault, FaultPoints
from ktrain.errors import ConfigError, InternalError
from ktrain.testing.fault_plan import FaultPlan

numbers = st.none() | st.integers(0, 10**6)
entries = st.builds(Fault, st.sampled_from(ACTIONS), st.sampled_from(POINTS), numbers, numbers, st.integers(1, 99))


@given(st.lists(entries, max_size=5))
def test_plan_written_as_text_reads_back_the_same(plan: list[Fault]) -> None:
    assert faults.parse(";".join(fault.to_text() for fault in plan)) == plan


@pytest.mark.parametrize(
    "text",
    [
        "die@step",
        "kill@nowhere",
        "kill",
        "kill@step,step",
        "kill@step,step=-1",
        "kill@step,step=\u00b2",
        "kill@step,x=1",
    ],
)
def test_plan_malformed_is_refused_naming_the_entry(text: str) -> None:
    with pytest.raises(ConfigError, match="KTRAIN_FAULTS: entry"):
        faults.parse(f"raise@step;{text}")


def test_points_matching_fault_fires_once() -> None:
    points = FaultPoints(faults.parse("raise@step,step=3,rank=1"), epoch=1)
    points.reached("step", step=3, rank=0)
    points.reached("step", step=2, rank=1)
    points.reached("save.begin", step=3, rank=1)
    with pytest.raises(InternalError, match="raise@step,step=3,rank=1,epoch=1"):
        points.reached("step", step=3, rank=1)
    points.reached("step", step=3, rank=1)


def test_points_of_another_epoch_stay_quiet() -> None:
    FaultPoints(faults.parse("raise@step"), epoch=2).reached("step", step=1, rank=0)


def test_fault_plan_builder_gives_what_the_parser_reads() -> None:
    plan = FaultPlan().fail_at("save.staged", rank=1, step=20).fail_at("step", action="stop", epoch=3)
    assert plan.text() == "kill@save.staged,step=20,rank=1,epoch=1;stop@step,epoch=3"
    assert faults.parse(plan.text()) == list(plan.faults)
    assert plan.environment() == {"KTRAIN_FAULTS": plan.text()}


def test_fault_plan_builder_refuses_an_unknown_point() -> None:
    with pytest.raises(ConfigError, match="unknown point"):
        FaultPlan().fail_at("lunch")
