"""The reference of jobs on Kubernetes names the fields that there are, no more and no less."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ktrain.launcher import budget, catalogue
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.quantity import MIB
from ktrain.launcher.spec import GangKind, JobSpec, Limits, Memory, Placement, Resources, Saving
from tests.unit.docs.test_reference import first_names, rows, section

PAGE = "kubernetes.md"


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("## The job file", JobSpec),
        ("### `memory`", Memory),
        ("### `placement`", Placement),
        ("### `resources`", Resources),
        ("### `limits`", Limits),
        ("### `saving`", Saving),
        ("## The facts of a cluster", ClusterFacts),
    ],
)
def test_kubernetes_page_fields_are_those_of_the_code(heading: str, kind: type) -> None:
    assert sorted(first_names(section(PAGE, heading))) == sorted(item.name for item in fields(kind) if item.init)


def test_kubernetes_page_defaults_are_those_of_the_code() -> None:
    for heading, kind in (("### `limits`", Limits), ("### `memory`", Memory), ("### `saving`", Saving)):
        said = {row[0].strip("`"): row[1].strip("`") for row in rows(section(PAGE, heading))}
        for item in fields(kind):
            if isinstance(item.default, int | float) and item.default < MIB:
                assert said[item.name] == f"{item.default:g}".replace("1e+06", "1000000"), item.name


def test_kubernetes_page_mechanisms_and_values_are_those_of_the_code() -> None:
    text = section(PAGE, "### `placement`") + section(PAGE, "## The job file")

    assert set(first_names(section(PAGE, "## Gang mechanisms"))) == set(GangKind) - {GangKind.AUTO}
    assert all(f"`{kind.value}`" in text for kind in GangKind)
    assert all(f"`{name}`" in text for name in catalogue.providers())
    assert all(f"`{name}:" in text for name in catalogue.fabrics())


def test_kubernetes_page_limits_of_memory_are_those_of_the_budget() -> None:
    text = section(PAGE, "## What is rendered")

    assert budget._AGENT_OWN == 1536 * MIB and "1.5 GiB" in text
    assert budget._IN_FLIGHT == 384 * MIB and "384 MiB" in text
    assert budget._SLOTS_PER_REPLICA == 2 and "2 x copies" in text and budget._DRAIN_SLOTS == 1 and "+ 1)" in text
