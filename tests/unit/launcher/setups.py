"""The named set-ups: what was asked for, what is known of the cluster, and the manifests that follow.

`python -m tests.unit.launcher.setups_page` writes the manifests, and the page of the guide that shows parts of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ktrain.launcher import spec_file
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.render.text import to_yaml
from ktrain.launcher.spec import JobSpec

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "golden" / "kubernetes"
CRDS = ROOT.parent / "shared" / "kubernetes" / "crds"
TRANSCRIPTS = ROOT.parent / "shared" / "kubernetes" / "transcripts"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def read_spec(name: str, /, **changes: Any) -> JobSpec:
    """The job of a set-up, with some of its values changed."""
    return spec_file.from_value({**spec_file.read_toml(FOLDER / name / "job.toml"), **changes})


def read_facts(name: str) -> ClusterFacts:
    return ClusterFacts.from_value(json.loads((FOLDER / name / "cluster.json").read_text()))


def rendered(name: str) -> Rendered:
    return render(read_spec(name), read_facts(name))


def job_of(jobset: dict[str, Any], role: str) -> dict[str, Any]:
    """The Job template of a role."""
    found: dict[str, Any] = next(job for job in jobset["spec"]["replicatedJobs"] if job["name"] == role)["template"]
    return found


def pod_of(jobset: dict[str, Any], role: str) -> dict[str, Any]:
    """The pod specification of a role."""
    found: dict[str, Any] = job_of(jobset, role)["spec"]["template"]["spec"]
    return found


def write_manifests() -> None:
    """Writes the golden manifests anew."""
    for name in NAMES:
        (FOLDER / name / "manifests.yaml").write_text(to_yaml(rendered(name).objects), encoding="ascii")
