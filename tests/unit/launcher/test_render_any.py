"""Any job on any cluster is refused with a ConfigError, or rendered into what every rule allows."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrain.errors import ConfigError
from ktrain.launcher import catalogue, spec_file
from ktrain.launcher.explain import explain
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import choose
from ktrain.launcher.render.job import render
from ktrain.launcher.spec import GangKind, JobSpec
from ktrain.testing import structural
from tests.unit.launcher import setups
from tests.unit.launcher.test_render_golden import job_object, jobset_schema
from tests.unit.launcher.test_render_rules import ROLES, restricted_problems
from tests.unit.launcher.test_spec import JOB

_SERVED = (
    "kueue.x-k8s.io/v1beta2/localqueues",
    "scheduling.k8s.io/v1beta1/workloads",
    "scheduling.k8s.io/v1beta1/podgroups",
    "scheduling.k8s.io/v1alpha2/workloads",
    "scheduling.k8s.io/v1alpha2/podgroups",
    "scheduling.volcano.sh/v1beta1/podgroups",
    "scheduling.run.ai/v2alpha2/podgroups",
    "scheduling.x-k8s.io/v1alpha1/podgroups",
    "resource.k8s.io/v1/resourceclaimtemplates",
    "resource.nvidia.com/v1beta1/computedomains",
)
_MAYBE = st.none() | st.booleans()
_DEVICES = st.sampled_from(sorted(catalogue.models())).map(lambda name: f"{name}:{catalogue.models()[name].counts[-1]}")
_TPUS = st.sampled_from(sorted(catalogue.tpus())).flatmap(
    lambda name: st.sampled_from(catalogue.tpus()[name].topologies[:8]).map(lambda topology: f"{name}:{topology}")
)


_CODE: list[dict[str, Any]] = [
    {"archive": "a" * 64},
    {"archive": "a" * 64, "parts": 3},
    {"archive": "a" * 64, "way": "bucket", "size": 5000000},
    {"git": f"git+https://example.com/me/net@{'b' * 40}", "git_secret": "deploy"},
    {"image": "x/code:1"},
]


@st.composite
def facts(draw: st.DrawFn) -> ClusterFacts:
    queues = st.none() | st.lists(st.sampled_from(["default", "team", "q"]), unique=True).map(tuple)
    return ClusterFacts(
        served=draw(st.none() | st.sets(st.sampled_from(_SERVED)).map(frozenset)),
        queues=draw(queues),
        volcano_queues=draw(queues),
        queue_levels=draw(st.none() | st.just(("kubernetes.io/hostname",))),
        csi_drivers=draw(st.none() | st.just(())),
        restart_rules=draw(_MAYBE),
        scheduling_group=draw(_MAYBE),
        message_patterns=draw(_MAYBE),
        image_volumes=draw(_MAYBE),
    )


@st.composite
def values(draw: st.DrawFn) -> dict[str, Any]:
    """What a person might write: each part can be; together they may not."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "nodes": st.integers(1, 40),
        "accelerator": _DEVICES | st.just("h200:8,h100:8") | st.just("a100/1g.10gb:2"),
        "tpu": _TPUS,
        "slices": st.integers(1, 3),
        "spares": st.integers(0, 3),
        "fabric": st.sampled_from(["efa:32", "rdma:8", "mrdma:8"]),
        "secrets": st.just([{"env": "KEY_OF_IT", "secret": "s", "key": "k"}]),
        "volumes": st.just([{"claim": "c", "path": "/data", "read_only": True}]),
        "code": st.sampled_from(_CODE),
        "pull_secrets": st.just(["pull"]),
    }
    placement: dict[str, st.SearchStrategy[Any]] = {
        "queue": st.sampled_from(["default", "q"]),
        "priority": st.just("high"),
        "gang": st.sampled_from(list(GangKind)).map(str),
        "scheduler": st.just("gangs"),
        "spot": st.sampled_from(["none", "workers", "all"]),
        "provider": st.sampled_from(sorted(catalogue.providers())),
        "topology": st.sampled_from([{"label": "zone"}, {"label": "kubernetes.io/hostname", "mode": "preferred"}]),
        "avoid_nodes": st.just(["bad-1", "bad-2"]),
        "share_nodes": st.booleans(),
        "tolerations": st.just([{"key": "dedicated"}]),
        "node_selector": st.just({"pool": "a"}),
    }
    memory = draw(st.fixed_dictionaries({"state": st.integers(1, 1 << 40)}, optional={"scope": st.just("mtc")}))
    chosen = draw(st.fixed_dictionaries({}, optional=optional))
    return {**JOB, **chosen, "memory": memory, "placement": draw(st.fixed_dictionaries({}, optional=placement))}


def made(value: dict[str, Any]) -> JobSpec | None:
    try:
        return spec_file.from_value(value)
    except ConfigError:
        return None


@given(values(), facts())
@settings(max_examples=60)
def test_any_job_is_refused_or_rendered_by_every_rule(value: dict[str, Any], known: ClusterFacts) -> None:
    spec = made(value)
    if spec is None:
        return
    try:
        done = render(spec, known)
    except ConfigError:
        return
    jobset = json.loads(json.dumps(done.jobset))
    for role in ROLES:
        pod = setups.pod_of(jobset, role)
        found = set(restricted_problems(pod))
        assert found == ({"volume image"} if role == "worker" and spec.code.image is not None else set())
        mounts = {m["name"] for c in (*pod.get("initContainers", []), *pod["containers"]) for m in c["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        kubernetes_validate.validate(job_object(jobset, role), "1.37", strict=True)
    if setups.CRDS.is_dir():
        assert structural.problems(jobset, jobset_schema("0.13")) == []
    assert spec_file.from_value(spec_file.to_value(spec)) == spec
    explain(spec, known, done)


@given(values(), facts())
def test_any_job_has_one_gang_and_what_is_not_known_is_never_used(value: dict[str, Any], known: ClusterFacts) -> None:
    spec = made(value)
    if spec is None:
        return
    try:
        gang = choose(spec, known)
        jobset = json.dumps(render(spec, known).jobset)
    except ConfigError:
        return
    assert gang == choose(spec, known) and gang.kind is not GangKind.AUTO
    assert ("schedulingGroup" in jobset) <= (known.scheduling_group is True)
    assert ("restartPolicyRules" in jobset) == (known.restart_rules is True)
    assert ("onJobFailureMessagePatterns" in jobset) == (known.message_patterns is True)
    assert "schedulerName" not in jobset or "kueue.x-k8s.io/queue-name" not in jobset
