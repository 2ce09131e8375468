"""What a pod asks a node for."""

from __future__ import annotations

from typing import Any

from ktrain.launcher.cluster import amounts


def test_of_pod_init_and_sidecars_count_as_a_kubelet_counts() -> None:
    def container(cpu: str, **more: str) -> dict[str, object]:
        return {"name": "c", "resources": {"requests": {"cpu": cpu}}, **more}

    spec: dict[str, Any] = {
        "initContainers": [container("5"), container("1", restartPolicy="Always"), container("3")],
        "containers": [container("2"), {"name": "d", "resources": {"limits": {"cpu": "500m", "x/gpu": "1"}}}],
    }
    assert amounts.of_pod(spec) == {"cpu": 5, "x/gpu": 1}
    spec["initContainers"][2] = container("9")
    assert amounts.of_pod(spec)["cpu"] == 10
    assert amounts.of_pod({**spec, "resources": {"requests": {"cpu": "7"}}})["cpu"] == 7


def test_lacking_names_what_is_short() -> None:
    wanted = amounts.amounts({"cpu": "2", "memory": "1Gi", "x/gpu": "1"})
    assert amounts.lacking(wanted, amounts.amounts({"cpu": "4", "memory": "1Mi"})) == ["memory", "x/gpu"]
