"""`ktrain doctor`: what is printed, in which form, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktrain.base import contract
from ktrain.cli.main import main
from ktrain.testing.fake_cluster import FakeCluster, Fault, Offer
from tests.unit.launcher.doctor.looking import add_gpu_nodes

JOB = ("--run", "/data/net", "--volume", "claim:/data", "--image", "example/train:1", "--state", "20Gi")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0")) as found:
        add_gpu_nodes(found, 2)
        yield found


@pytest.fixture
def doctor(cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    config = cluster.write_kubeconfig(tmp_path / "kubeconfig")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(("doctor", "--backend", "kubernetes", "--kubeconfig", str(config), *arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_doctor_of_a_cluster_prints_checks_conformance_and_a_verdict(doctor: Any) -> None:
    code, out, err = doctor()

    assert code == contract.EXIT_OK and err == ""
    assert out.startswith("Kubernetes 1.36, namespace default\n")
    assert "met       MUST" not in out or "robust_controller" in out
    assert "not shown MUST   gang_scheduling" in out and "1.36):" in out
    assert out.splitlines()[-1].startswith("Nothing was found that keeps a job from running here (")


def test_doctor_of_a_job_that_cannot_run_says_so_first_and_last(doctor: Any) -> None:
    code, out, _ = doctor(*JOB, "--nodes", "4", "--accelerator", "h100:8", "train.py")
    lines = out.splitlines()

    assert code == contract.EXIT_FAILED
    assert lines[0].endswith("job net") and lines[2].startswith("failed   ")
    assert "so: pods stay Pending" in out and "do: ask for fewer nodes" in out
    assert lines[-1].startswith("The job cannot run here: accelerators, references (")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_doctor_prints_one_value_with_the_documented_fields(doctor: Any, output: str) -> None:
    code, out, _ = doctor(*JOB, "--output", output, "train.py")
    value = json.loads(out) if output == "json" else yaml.safe_load(out)

    assert code == contract.EXIT_FAILED and value["failed"] == ["references"]  # the claim is not there
    assert set(value) == {"target", "job", "findings", "conformance", "conformance_source", "notes", "failed"}
    assert set(value["findings"][0]) == {"check", "outcome", "evidence", "cost", "remedy"}
    assert set(value["conformance"][0]) == {"id", "level", "status", "evidence"}


def test_doctor_with_a_job_file_takes_options_over_it(doctor: Any, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('name="a"\nrun="/d/a"\nimage="x"\ncommand=["t.py"]\nnodes=9\nmemory={state="1Gi"}\n'
                    'volumes=[{claim="c",path="/d"}]\n')  # fmt: skip
    code, out, _ = doctor("--job", str(file), "--nodes", "1", "--output", "json")

    assert json.loads(out)["job"] == "a" and "gang" not in json.loads(out)["failed"] and code == contract.EXIT_FAILED


def test_doctor_of_a_cluster_out_of_reach_is_unavailable(cluster: FakeCluster, doctor: Any) -> None:
    cluster.put_fault(Fault(401, times=1000))
    code, _, err = doctor()

    assert code == contract.EXIT_UNAVAILABLE and err.startswith("ktrain: ")


def run_local(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(("doctor", *arguments))
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_doctor_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_local(capsys, "--run", str(tmp_path / "run"), "--output", "json")
    value = json.loads(out)

    assert value["conformance"] == [] and code == (contract.EXIT_FAILED if value["failed"] else contract.EXIT_OK)
    assert not (tmp_path / "run").exists()

    code, out, _ = run_local(capsys, "--state", "900Ti", "--nodes", "2")
    assert code == contract.EXIT_FAILED and "No job can run here as it is: memory, tmpfs" in out


def test_doctor_of_this_machine_refuses_what_only_a_cluster_has(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_local(capsys, "--queue", "q")

    assert code == contract.EXIT_USAGE and "--queue" in err
