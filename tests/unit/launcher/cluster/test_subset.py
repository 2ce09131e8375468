"""What the pod runner refuses."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.subset import check_pod


def pod(container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    made = {"name": "main", "image": "any", "command": ["true"], **(container or {})}
    return {"metadata": {"name": "p"}, "spec": {"containers": [made], **spec}}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (pod(hostNetwork=True), r"spec\.hostNetwork"),
        (pod(topologySpreadConstraints=[{"maxSkew": 1}]), r"spec\.topologySpreadConstraints"),
        (pod(resourceClaims=[{"name": "gpu"}]), r"spec\.resourceClaims"),
        (pod({"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}), r"spec\.containers\[0\]\.lifecycle"),
        (pod({"startupProbe": {"grpc": {"port": 1}}}), r"spec\.containers\[0\]\.startupProbe\.grpc"),
        (pod({"startupProbe": {"periodSeconds": 1}}), "has none of exec, tcpSocket, httpGet"),
        (pod({"command": []}), "has no command"),
        (pod({"env": [{"name": "A", "valueFrom": {"fileKeyRef": {"key": "k"}}}]}), r"env\[0\]\.valueFrom\.fileKeyRef"),
        (pod(volumes=[{"name": "v", "image": {"reference": "r"}}]), r"spec\.volumes\[0\]\.image"),
        (pod(volumes=[{"name": "v"}]), "volume v: expected one of emptyDir"),
        (pod(volumes=[{"name": "v", "configMap": {"name": "c", "strange": 1}}]), r"volumes\[0\]\.configMap\.strange"),
        (
            pod({"volumeMounts": [{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/a/b"}]}),
            "mounts /a/b below /a",
        ),
    ],
)
def test_check_pod_field_not_honoured_is_refused_by_name(refused: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_pod(refused)


def test_check_pod_empty_and_false_fields_ask_for_nothing() -> None:
    check_pod(pod(hostNetwork=False, topologySpreadConstraints=[], affinity={}, securityContext={"runAsUser": 1}))
    check_pod(pod({"volumeMounts": [{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/ab"}]}))
