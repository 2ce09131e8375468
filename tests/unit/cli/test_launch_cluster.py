"""`ktrain launch --backend kubernetes`: what is printed, and what is refused before anything is sent."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktrain.base import contract
from ktrain.cli.main import main
from tests.unit.launcher import setups

CLUSTER = ("launch", "--backend", "kubernetes")
JOB = ("--run", "s3://bucket/net-a", "--image", "example/train:1", "--state", "4Gi")


@pytest.fixture
def ktrain(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns its exit code, what it printed and what it said."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_dry_run_prints_the_manifests_of_the_options(ktrain: Any) -> None:
    code, out, err = ktrain(
        *CLUSTER, *JOB, "--dry-run", "--nodes", "2", "--accelerator", "h100:8", "--secret", "HF_TOKEN=hub:token",
        "--env", "A=1", "--volume", "data:/data:ro", "--set", "placement.priority=high", "train.py", "--", "--lr", "1",
    )  # fmt: skip
    objects = list(yaml.safe_load_all(out))
    trainer = setups.pod_of(objects[0], "worker")["containers"][0]
    stored = next(item for item in objects if item["kind"] == "ConfigMap")["data"]["job.json"]

    assert code == contract.EXIT_OK and "gang none" in err and "one by one" in err
    assert objects[0]["metadata"]["name"] == "net-a"
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "A", "value": "1"} in trainer["env"]
    assert {"name": "data-0", "mountPath": "/data", "readOnly": True} in trainer["volumeMounts"]
    assert setups.pod_of(objects[0], "worker")["priorityClassName"] == "high"
    assert json.loads(stored)["command"] == ["train.py", "--lr", "1"]
    assert next(item for item in objects if item["kind"] == "Secret")["stringData"] == {"token": "<redacted>"}


@pytest.mark.parametrize("name", setups.NAMES)
def test_dry_run_of_a_setup_is_its_golden_file_and_the_secret(name: str, ktrain: Any) -> None:
    folder = setups.FOLDER / name
    code, out, err = ktrain(
        *CLUSTER, "--dry-run", "--job", str(folder / "job.toml"), "--facts", str(folder / "cluster.json")
    )
    if "archive" in (folder / "job.toml").read_text():  # its bytes are nowhere, so that this is not all that is sent
        assert code == contract.EXIT_USAGE and "code.archive: its bytes are missing" in err and not out
        return
    golden = list(yaml.safe_load_all((folder / "manifests.yaml").read_text()))

    assert code == contract.EXIT_OK
    assert [item for item in yaml.safe_load_all(out) if item["kind"] != "Secret"] == golden


def test_dry_run_as_json_has_objects_gang_and_plan(ktrain: Any) -> None:
    _, out, _ = ktrain(*CLUSTER, *JOB, "--dry-run", "--output", "json", "train.py")
    found = json.loads(out)

    assert found["gang"]["kind"] == "none" and found["released_by"] == "ktrain"
    assert found["objects"][0]["kind"] == "JobSet" and len(found["plan"]["recoveries"]) == 10


def test_explain_prints_tiers_memory_and_what_is_missing(ktrain: Any) -> None:
    code, out, _ = ktrain(*CLUSTER, *JOB, "--explain", "--nodes", "2", "--set", "saving.step_s=0.5", "train.py")

    assert code == contract.EXIT_OK
    assert all(word in out for word in ("a node is lost", "peer", "memory", "bucket", "not known", "assumed"))


def test_option_wins_over_the_job_file(tmp_path: Path, ktrain: Any) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'name = "a"\nrun = "s3://b/a"\nimage = "x:1"\ncommand = ["a.py"]\nnodes = 3\nmemory.state = "1Gi"\n'
    )
    _, out, _ = ktrain(*CLUSTER, "--dry-run", "--job", str(path), "--nodes", "5", "--name", "b", "other.py")
    jobset = next(yaml.safe_load_all(out))

    assert jobset["metadata"]["name"] == "b"
    assert setups.job_of(jobset, "worker")["spec"]["completions"] == 5


def test_job_file_with_a_table_of_another_form_is_refused(tmp_path: Path, ktrain: Any) -> None:
    path = tmp_path / "job.toml"
    for text, hint in (("secrets = 3", "secrets: expected a list"), ("env = 3", "env is no table")):
        path.write_text(f"{text}\n")
        code, _, err = ktrain(*CLUSTER, *JOB, "--dry-run", "--job", str(path), "--env", "A=1", "train.py")
        assert code == contract.EXIT_USAGE and hint in err


def test_code_is_carried_under_its_digest_and_never_printed(tmp_path: Path, ktrain: Any) -> None:
    (tmp_path / "train.py").write_text("print('xyzzy')\n")
    _, out, _ = ktrain(*CLUSTER, *JOB, "--dry-run", "--code", str(tmp_path), "train.py")
    objects = list(yaml.safe_load_all(out))
    carried = next(item for item in objects if "binaryData" in item)
    [unpack, _] = setups.pod_of(objects[0], "worker")["initContainers"]

    assert carried["metadata"]["name"] == f"net-a-code-{unpack['command'][-2][:10]}"
    assert carried["binaryData"]["code.zip"].endswith("characters of base64>")


COMMIT = f"git+https://example.com/me/net@{'b' * 40}"


def init_container(out: str) -> Any:
    [found, _] = setups.pod_of(next(yaml.safe_load_all(out)), "worker")["initContainers"]
    return found


def test_dry_run_says_which_way_code_goes_and_why(tmp_path: Path, ktrain: Any) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "data.bin").write_bytes(random.Random(1).randbytes(800_000))
    options = (*CLUSTER, *JOB, "--dry-run", "--code", str(tmp_path))
    _, out, err = ktrain(*options, "train.py")
    assert "code: 2 files, by the run's bucket: " in err and "too much for one ConfigMap" in err
    assert init_container(out)["command"][3] == "ktrain.run.code" and "binaryData" not in out

    _, out, err = ktrain(*options, "--set", "code.way=config-map", "train.py")
    assert "by 2 ConfigMaps" in err and out.count("binaryData") == 2

    _, out, err = ktrain(*options, "--volume", "c:/data", "--run", "/data/net", "train.py")
    assert "by 2 ConfigMaps" in err and "lies in no bucket" in err


def test_plan_of_code_without_its_bytes_is_refused_as_the_launch_is(tmp_path: Path, ktrain: Any) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'code = {{ archive = "{"a" * 64}", way = "config-map" }}\n')
    code, out, err = ktrain(*CLUSTER, *JOB, "--explain", "--job", str(path), "train.py")
    assert code == contract.EXIT_USAGE and "code.archive: its bytes are missing" in err and not out


def test_code_of_a_commit_or_an_image_takes_the_place_of_what_the_file_names(tmp_path: Path, ktrain: Any) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'code = {{ archive = "{"a" * 64}", way = "config-map" }}\n')
    options = (*CLUSTER, *JOB, "--dry-run", "--job", str(path))
    _, out, _ = ktrain(*options, "--code", COMMIT, "--set", "code.git_secret=deploy", "train.py")
    assert init_container(out)["command"][3] == "ktrain.launcher.code.git" and "deploy" in out

    _, out, _ = ktrain(*options, "--code", "image:example/code:1", "train.py")
    volumes = setups.pod_of(next(yaml.safe_load_all(out)), "worker")["volumes"]
    assert {"name": "code", "image": {"reference": "example/code:1", "pullPolicy": "IfNotPresent"}} in volumes


def test_code_that_looks_private_is_warned_of(tmp_path: Path, ktrain: Any) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / ".env").write_text("TOKEN=xyzzy")
    code, out, err = ktrain(*CLUSTER, *JOB, "--dry-run", "--code", str(tmp_path), "train.py")

    assert code == contract.EXIT_OK and ".env looks as if it held a secret" in err
    assert "xyzzy" not in out + err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((*CLUSTER, *JOB, "--dry-run", "--code", COMMIT[:-1], "t.py"), "all of its 40"),
        ((*CLUSTER, *JOB, "--dry-run", "--code", "nowhere", "t.py"), "expected a directory"),
        ((*CLUSTER, *JOB, "--kubeconfig", "nope.yaml", "train.py"), "kubeconfig nope.yaml: it cannot be used"),
        ((*CLUSTER, *JOB, "--wait", "--detach", "train.py"), "--wait and --detach"),
        ((*CLUSTER, "--dry-run", "train.py"), "run: it is missing"),
        ((*CLUSTER, "--dry-run", "--run", "s3://b/a", "train.py"), "image: it is missing"),
        ((*CLUSTER, *JOB, "--dry-run"), "command: it is missing"),
        (("launch", "--wait", "t.py"), "--wait: only --backend kubernetes"),
        ((*CLUSTER, *JOB, "--dry-run", "--fault", "kill-head@step=1", "t.py"), "--fault: only --backend local"),
        ((*CLUSTER, *JOB, "--dry-run", "--gang", "slurm", "t.py"), "placement.gang: expected one of auto, kueue"),
        ((*CLUSTER, *JOB, "--dry-run", "--env", "A", "t.py"), "--env NAME=VALUE"),
        ((*CLUSTER, *JOB, "--dry-run", "--secret", "A=b", "t.py"), "--secret NAME=SECRET:KEY"),
        ((*CLUSTER, *JOB, "--dry-run", "--volume", "a:/b:rx", "t.py"), "--volume CLAIM"),
        ((*CLUSTER, *JOB, "--dry-run", "--set", "name.x=1", "--name", "a", "t.py"), "name is no table"),
        ((*CLUSTER, *JOB, "--dry-run", "--facts", "nope.json", "t.py"), "--facts nope.json: cannot be read"),
        ((*CLUSTER, *JOB, "--dry-run", "--job", "nope.toml", "t.py"), "job file nope.toml"),
        (("launch", "--image", "x", "t.py"), "--image: only --backend kubernetes"),
        (("launch", "--dry-run", "t.py"), "--dry-run: only --backend kubernetes"),
        (("launch",), "no script was named"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], hint: str, ktrain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ktrain(*arguments)

    assert code == contract.EXIT_USAGE and hint in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_script_that_the_code_lacks_is_refused(tmp_path: Path, ktrain: Any) -> None:
    (tmp_path / "train.py").write_text("")
    _, _, err = ktrain(*CLUSTER, *JOB, "--dry-run", "--code", str(tmp_path), "tarin.py")

    assert "does not have the script 'tarin.py'" in err


def test_launcher_loads_nothing_heavy() -> None:
    program = (
        "import sys, ktrain.launcher.dropped, ktrain.launcher.explain, ktrain.cli.cluster;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    heavy = {"torch", "ray", "numpy", "fsspec", "kubernetes", "yaml", "rich", "pydantic", "matplotlib"}
    assert not heavy & set(done.stdout.split())
