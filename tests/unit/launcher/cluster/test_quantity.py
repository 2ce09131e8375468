"""Kubernetes quantities, and what a pod asks a node for."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.cluster import quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("500m", Fraction(1, 2)), ("4Gi", 4 << 30), ("1.5k", 1500), ("1e3", 1000), (3, 3), ("5E", 5 * 10**18)],
)
def test_parse_quantity_gives_exact_number(text: str | int, number: Fraction) -> None:
    assert quantity.parse(text) == number


@pytest.mark.parametrize("text", ["", "x", "1Q", "Gi", "1 Gi"])
def test_parse_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="quantity"):
        quantity.parse(text)


def test_of_pod_init_and_sidecars_count_as_a_kubelet_counts() -> None:
    def container(cpu: str, **more: str) -> dict[str, object]:
        return {"name": "c", "resources": {"requests": {"cpu": cpu}}, **more}

    spec: dict[str, Any] = {
        "initContainers": [container("5"), container("1", restartPolicy="Always"), container("3")],
        "containers": [container("2"), {"name": "d", "resources": {"limits": {"cpu": "500m", "x/gpu": "1"}}}],
    }
    assert quantity.of_pod(spec) == {"cpu": 5, "x/gpu": 1}
    spec["initContainers"][2] = container("9")
    assert quantity.of_pod(spec)["cpu"] == 10
    assert quantity.of_pod({**spec, "resources": {"requests": {"cpu": "7"}}})["cpu"] == 7


def test_lacking_names_what_is_short() -> None:
    wanted = quantity.amounts({"cpu": "2", "memory": "1Gi", "x/gpu": "1"})
    assert quantity.lacking(wanted, quantity.amounts({"cpu": "4", "memory": "1Mi"})) == ["memory", "x/gpu"]
