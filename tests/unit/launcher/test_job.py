"""From what was typed to a job: refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ktrain.base.job import LaunchSpec, WorkDir, canonical_url, local_path
from ktrain.errors import ConfigError
from ktrain.launcher.job import Wish, default_run, plan_job


@pytest.fixture
def wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wish:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    return Wish(script="train.py", nodes=2, workers_per_node=2)


def test_plan_job_defaults_run_beside_the_caller(wish: Wish, tmp_path: Path) -> None:
    spec = plan_job(wish)

    assert spec.run == str(tmp_path / "runs/train")
    assert spec.script == str(tmp_path / "train.py")
    assert spec.world_size == 4 and spec.node_names == ("node-0", "node-1")
    assert spec.log_dir == str(tmp_path / "runs/train/logs")


def test_plan_job_leaves_no_probe_behind(wish: Wish, tmp_path: Path) -> None:
    plan_job(wish)

    assert list((tmp_path / "runs/train").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"script": "nope.py"}, "nope.py"),
        ({"nodes": 0}, "--nodes"),
        ({"workers_per_node": 0}, "--workers-per-node"),
        ({"max_restarts": -1}, "--max-restarts"),
        ({"patience_s": 0.0}, "--patience"),
        ({"patience_s": float("nan")}, "--patience"),
        ({"faults": ("kill-worker@step=1,rank=4",)}, "ranks 0 to 3"),
        ({"run": "train.py/x"}, "cannot be written"),
    ],
)
def test_plan_job_bad_input_is_refused(wish: Wish, changes: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        plan_job(replace(wish, **changes))


def test_default_run_is_named_after_the_script() -> None:
    assert default_run("examples/01_text_gpt.py") == "runs/01_text_gpt"


def test_job_spec_survives_json(wish: Wish) -> None:
    spec = plan_job(replace(wish, args=("--lr", "1"), faults=("kill-head@step=1",)))
    assert LaunchSpec.from_json(spec.to_json()) == spec


def test_job_spec_of_another_version_is_refused(wish: Wish) -> None:
    with pytest.raises(ConfigError, match="gpus"):
        LaunchSpec.from_json({**plan_job(wish).to_json(), "gpus": 8})


def test_canonical_url_same_run_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {canonical_url(url) for url in ("a/b", "./a/b/", f"file://{tmp_path}/a/b", str(tmp_path / "a/../a/b"))} == {
        str(tmp_path / "a/b")
    }


def test_local_path_of_a_bucket_is_none() -> None:
    assert local_path("s3://bucket/a") is None
    assert canonical_url("s3://bucket/a/") == "s3://bucket/a"


def test_work_dir_is_private_and_short_enough_for_sockets(tmp_path: Path) -> None:
    work = WorkDir.of_run("/a" * 200)
    assert len(str(work.agent_socket("node-199"))) < 100


def test_work_dir_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)

    with pytest.raises(ConfigError, match="0700"):
        WorkDir(tmp_path / "open" / "x").make()


def test_work_dir_token_is_for_this_user_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    work = WorkDir(tmp_path / "w")
    work.make()
    work.write_token()
    first = work.read_token()
    work.write_token()

    assert work.token.stat().st_mode & 0o777 == 0o600
    assert len(first) == 32 and work.read_token() != first
