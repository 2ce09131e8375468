"""The named set-ups: their manifests are golden, and valid for the core API and for the real definitions."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.job import render
from ktrain.launcher.render.text import to_yaml
from ktrain.testing import structural
from tests.unit.launcher import setups, setups_page

_CORE = ("v1", "rbac.authorization.k8s.io/v1", "networking.k8s.io/v1", "resource.k8s.io/v1")
_JOBSETS = {"0.8": "v0.8.2", "0.10": "v0.10.1", "0.11": "v0.11.1", "0.12": "v0.12.0", "0.13": "v0.13.0-devel"}
_DEFINITIONS = {
    ("scheduling.volcano.sh", "PodGroup"): "scheduling.volcano.sh_podgroups",
    ("scheduling.x-k8s.io", "PodGroup"): "scheduling.x-k8s.io_podgroups",
    ("resource.nvidia.com", "ComputeDomain"): "resource.nvidia.com_computedomains",
}
needs_definitions = pytest.mark.skipif(
    not setups.CRDS.is_dir(), reason=f"the definitions of the projects are not at {setups.CRDS}"
)


@functools.cache
def definition(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((setups.CRDS / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
    return found


def jobset_schema(release: str) -> dict[str, Any]:
    file = f"jobset.x-k8s.io_jobsets-{_JOBSETS[release]}"
    return dict(structural.schema_of(definition(file), "v1alpha2"))


def minor(version: str) -> int:
    return int(version.split(".")[1])


KUBERNETES = [version for version in kubernetes_validate.utils.all_versions() if minor(version) >= 31]


def job_object(jobset: dict[str, Any], role: str) -> dict[str, Any]:
    """The Job that JobSet makes of a role's template."""
    spec = json.loads(json.dumps(setups.job_of(jobset, role)["spec"]))
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": spec}


def test_setups_are_the_named_ones() -> None:
    assert len(setups.NAMES) == 11


@pytest.mark.parametrize("name", setups.NAMES)
def test_setup_renders_its_golden_manifests(name: str) -> None:
    golden = Path(setups.FOLDER / name / "manifests.yaml").read_text("ascii")

    assert to_yaml(setups.rendered(name).objects) == golden, "python -m tests.unit.launcher.setups_page writes it"


def test_guide_shows_the_setups_as_they_are() -> None:
    assert setups_page.PAGE.read_text("ascii") == setups_page.page(), (
        "python -m tests.unit.launcher.setups_page writes it"
    )


@pytest.mark.parametrize("name", setups.NAMES)
def test_setup_as_yaml_is_what_was_rendered(name: str) -> None:
    objects = setups.rendered(name).objects

    assert list(yaml.safe_load_all(to_yaml(objects))) == json.loads(json.dumps(objects))


@pytest.mark.parametrize("name", setups.NAMES)
def test_setup_is_valid_for_the_core_api(name: str) -> None:
    """Also the Jobs that JobSet makes of its templates; unknown fields are refused."""
    objects = setups.rendered(name).objects
    minor = (setups.read_facts(name).version or (1, 33))[1]
    version = f"1.{minor}"
    native = [item for item in objects if item["apiVersion"].startswith("scheduling.k8s.io/")]
    jobs = [job_object(objects[0], role) for role in ("head", "worker")]
    core = [item for item in objects if item["apiVersion"] in _CORE]

    for item in [*core, *jobs, *native]:
        kubernetes_validate.validate(json.loads(json.dumps(item)), version, strict=True)
    assert len(core) >= 5


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", ["01-single-gpu", "04-volcano", "05-tpu-v6e-slice", "09-spot-with-spares"])
def test_setup_without_facts_is_valid_for_every_kubernetes(name: str, version: str) -> None:
    """With nothing known, only fields are used that all of them have."""
    jobset = render(setups.read_spec(name), ClusterFacts()).jobset
    for role in ("head", "worker"):
        kubernetes_validate.validate(job_object(jobset, role), version, strict=True)


def test_core_schemas_refuse_unknown_fields_of_a_pod() -> None:
    """Otherwise the tests above would prove nothing."""
    job = job_object(setups.rendered("01-single-gpu").jobset, "worker")
    job["spec"]["template"]["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.35", strict=True)


@needs_definitions
@pytest.mark.parametrize("name", setups.NAMES)
def test_setup_jobset_is_valid_for_the_newest_definition(name: str) -> None:
    jobset = json.loads(json.dumps(setups.rendered(name).jobset))

    assert structural.problems(jobset, jobset_schema("0.13")) == []


@needs_definitions
@pytest.mark.parametrize("name", setups.NAMES)
def test_setup_other_objects_are_valid_for_their_definitions(name: str) -> None:
    for item in json.loads(json.dumps(setups.rendered(name).owned)):
        group, _, version = item["apiVersion"].partition("/")
        file = _DEFINITIONS.get((group, item["kind"]))
        if file is not None:
            assert structural.problems(item, structural.schema_of(definition(file), version)) == []


def last_names(paths: list[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@needs_definitions
@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("0.8", {"onJobFailureMessagePatterns", "restartPolicyRules", "schedulingGroup"}),
        ("0.10", {"schedulingGroup"}),
        ("0.11", {"schedulingGroup"}),
        ("0.12", set()),
        ("0.13", set()),
    ],
)
def test_setups_older_jobset_drops_only_what_facts_ask_about(release: str, expected: set[str]) -> None:
    """Every field that some JobSet prunes is one that is rendered only where a dry run kept it."""
    lost: set[str] = set()
    for name in setups.NAMES:
        jobset = json.loads(json.dumps(setups.rendered(name).jobset))
        lost |= last_names(structural.prune(jobset, jobset_schema(release))[1])

    assert lost == expected


@needs_definitions
@pytest.mark.parametrize("name", setups.NAMES)
@pytest.mark.parametrize("release", sorted(_JOBSETS))
def test_setup_without_facts_loses_nothing_anywhere(name: str, release: str) -> None:
    jobset = json.loads(json.dumps(render(setups.read_spec(name), ClusterFacts()).jobset))

    assert structural.prune(jobset, jobset_schema(release))[1] == []
