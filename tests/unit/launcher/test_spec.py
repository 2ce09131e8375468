"""A job on a cluster: what cannot be is refused where it is typed, and what is stored is read back."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError
from ktrain.launcher import catalogue, spec_file
from ktrain.launcher.spec import MOST_NAME, GangKind, JobSpec, default_name
from tests.unit.launcher import setups

JOB: dict[str, Any] = {
    "name": "net-a",
    "run": "s3://bucket/net-a",
    "image": "example.org/train:1",
    "command": ["train.py"],
    "memory": {"state": "4Gi"},
}


def job(**changes: Any) -> JobSpec:
    return spec_file.from_value({**JOB, **changes})


def test_job_spec_defaults_are_one_worker_on_one_node() -> None:
    spec = job()

    assert (spec.num_nodes, spec.num_workers, spec.world_size) == (1, 1, 1)
    assert spec.placement.gang is GangKind.AUTO and spec.namespace == "default"
    assert spec.memory.state == 4 << 30


@pytest.mark.parametrize(
    ("changes", "nodes", "workers"),
    [
        ({"nodes": 4, "accelerator": "h100:8"}, 4, 8),
        ({"accelerator": "a100/1g.10gb:2"}, 1, 2),
        ({"nodes": 2, "accelerator": "trn1:16"}, 2, 32),
        ({"tpu": "v6e:4x4"}, 4, 4),
        ({"tpu": "v6e:1x1"}, 1, 1),
        ({"tpu": "v5p:2x2x4", "slices": 2}, 8, 4),
        ({"nodes": 3, "workers_per_node": 2}, 3, 2),
    ],
)
def test_job_spec_size_follows_from_its_devices(changes: dict[str, Any], nodes: int, workers: int) -> None:
    spec = job(**changes)

    assert (spec.num_nodes, spec.num_workers) == (nodes, workers)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"name": "Net"}, "name 'Net': expected lower-case"),
        ({"name": "n" * (MOST_NAME + 1)}, f"at most {MOST_NAME}"),
        ({"image": "a b"}, "image: expected a reference"),
        ({"command": []}, "command: expected a script"),
        ({"nodes": 0}, "nodes: expected 1 to"),
        ({"nodes": True}, "nodes: expected a whole number"),
        ({"user": 0}, "user: expected 1"),
        ({"memory": {}}, "memory.state: it is missing"),
        ({"memory": {"state": "many"}}, "memory.state: expected bytes"),
        ({"memory": {"state": -1}}, "memory.state: expected bytes"),
        ({"memory": {"state": "1Gi", "scope": "rack"}}, "memory.scope: expected one of auto, pod, node, mtc"),
        ({"accelerator": "h100:3"}, "h100; expected 1, 2, 4, 8"),
        ({"accelerator": "h101:8"}, "no model 'h101'; known are a100"),
        ({"accelerator": "v6e:8"}, "it is a TPU"),
        ({"accelerator": "h100:8,h200:4"}, "same number of workers"),
        ({"accelerator": "h100/9g.1gb:1"}, "no partition '9g.1gb'; expected one of 1g.10gb"),
        ({"accelerator": "h100 x 8"}, "expected MODEL:COUNT"),
        ({"tpu": "v6e:3x3"}, "v6e slices are 1x1, 2x2"),
        ({"tpu": "v6e"}, "found none"),
        ({"tpu": "v9:2x2"}, "no generation 'v9'"),
        ({"tpu": "v6e:4x4", "slices": 0}, "slices: expected 1 or more"),
        ({"tpu": "v6e:4x4", "nodes": 3}, "are 4 nodes, found 3"),
        ({"tpu": "v6e:4x4", "accelerator": "h100:8"}, "one kind"),
        ({"tpu": "v6e:4x4", "spares": 1}, "spares"),
        ({"slices": 2}, "slices: expected with tpu alone"),
        ({"accelerator": "h100:8", "workers_per_node": 4}, "a node runs 8 workers"),
        ({"fabric": "efa:3"}, "expected efa:COUNT with 1, 2, 4"),
        ({"fabric": "ib:1"}, "no fabric 'ib'"),
        ({"placement": {"spot": "workers"}}, "name the provider"),
        ({"placement": {"provider": "moon"}}, "expected one of gke"),
        ({"placement": {"gang": "slurm"}}, "placement.gang: expected one of auto"),
        ({"placement": {"queue": "A B"}}, "placement.queue"),
        ({"placement": {"node_selector": {"a b": "c"}}}, "labels KEY = VALUE"),
        ({"placement": {"tolerations": [{"key": "a", "effect": "Never"}]}}, "effect"),
        ({"placement": {"topology": {"label": "no label!"}}}, "placement.topology.label"),
        ({"placement": {"que": "a"}}, "placement.que: there is no such field; expected some of queue"),
        ({"resources": {"cpu": "many"}}, "resources.cpu"),
        ({"limits": {"max_restarts": -1}}, "limits.max_restarts"),
        ({"limits": {"patience_s": "long"}}, "limits.patience_s: expected a number"),
        ({"saving": {"step_s": 0}}, "saving.step_s"),
        ({"env": {"A-B": "1"}}, "name of an environment variable"),
        ({"env": {"RANK": "1"}}, "the launcher sets it"),
        ({"env": {"KTRAIN_RUN": "x"}}, "the launcher sets it"),
        ({"env": {"A": 1}}, "env.A: expected a text"),
        ({"secrets": [{"env": "A", "secret": "s"}]}, r"secrets\[0\].key: it is missing"),
        ({"secrets": [{"env": "A", "secret": "s", "key": "k"}], "env": {"A": "1"}}, "every variable once"),
        ({"volumes": [{"claim": "c", "path": "data"}]}, "absolute path"),
        ({"volumes": [{"claim": "c", "path": "/ktrain/memory"}]}, "used by the job itself"),
        ({"volumes": [{"claim": "c", "path": "/dev"}]}, "used by the job itself"),
        ({"volumes": [{"claim": "c", "path": "/d"}, {"claim": "e", "path": "/d"}]}, "every path once"),
        ({"run": "/runs/a"}, "not seen by pods"),
        ({"run": "/d/a", "volumes": [{"claim": "c", "path": "/d", "read_only": True}]}, "not seen by pods"),
        ({"code": {"image": "a:1", "archive": "0" * 64}}, "found both"),
        ({"code": {"archive": "0"}}, "a SHA-256"),
        ({"code": {"archive": "0" * 64, "git": f"git+https://h/r@{'a' * 40}"}}, "found both archive and git"),
        ({"code": {"archive": "0" * 64, "way": "bucket"}}, "code.size: it is missing"),
        ({"code": {"archive": "0" * 64, "way": "exec"}}, "code.way"),
        ({"code": {"archive": "0" * 64, "parts": 0}}, "code.parts"),
        ({"code": {"git": "git+https://h/r@main"}}, "all of its 40"),
        ({"code": {"git": f"git+https://h/r@{'a' * 39}"}}, "all of its 40"),
        ({"code": {"git": f"git+https://h/r@{'A' * 40}"}}, "all of its 40"),
        ({"code": {"git": f"https://h/r@{'a' * 40}"}}, r"git\+https"),
        ({"code": {"git": f"git+ssh://git@h/r@{'a' * 40}"}}, r"git\+https"),
        ({"code": {"git": f"git+https://h/--upload-pack=x y@{'a' * 40}"}}, r"git\+https"),
        ({"code": {"git_secret": "deploy"}}, "no code.git that would need it"),
        ({"code": {"git": f"git+https://h/r@{'a' * 40}", "git_secret": "a b"}}, "the name of a Secret"),
        ({"code": {"env": ["NOT_THERE"]}}, "names of env or secrets"),
        (
            {
                "run": "/data/net",
                "volumes": [{"claim": "c", "path": "/data"}],
                "code": {"archive": "0" * 64, "way": "bucket", "size": 1},
            },
            "is a path on a volume",
        ),
        ({"overlay": {"worker": {"when": datetime.date(2026, 1, 1)}}}, "overlay.worker: expected what JSON can say"),
        ({"overlay": {"worker": {"weight": float("nan")}}}, "overlay.worker: expected what JSON can say"),
        ({"what": 1}, "what: there is no such field; expected some of name"),
    ],
)
def test_job_spec_bad_input_is_refused_with_what_was_expected(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        job(**changes)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "OPENAI_API_KEY", "my_api_key"])
def test_job_spec_env_that_reads_like_a_secret_is_refused_without_its_value(name: str) -> None:
    with pytest.raises(ConfigError, match="--secret NAME=SECRET:KEY") as caught:
        job(env={name: "hunter2"})

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "GOOGLE_APPLICATION_CREDENTIALS", "KEY_DIM"])
def test_job_spec_env_that_only_resembles_a_secret_is_taken(name: str) -> None:
    assert job(env={name: "1"}).env == {name: "1"}


@pytest.mark.parametrize("url", ["https://me:hunter2@host/x", "s3://bucket/x?sig=hunter2"])
def test_job_spec_url_with_a_secret_is_refused_without_it(url: str) -> None:
    for changes in ({"env": {"PROXY": url}}, {"run": url}):
        with pytest.raises(ConfigError) as caught:
            job(**changes)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", setups.NAMES)
def test_job_spec_value_is_read_back_equal(name: str) -> None:
    spec = setups.read_spec(name)

    assert spec_file.from_value(spec_file.to_value(spec)) == spec


def test_job_file_that_is_no_toml_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    with pytest.raises(ConfigError, match="job.toml"):
        spec_file.read_toml(path)
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="not TOML"):
        spec_file.read_toml(path)


def test_commit_with_a_password_is_refused_without_it() -> None:
    with pytest.raises(ConfigError, match="code.git_secret") as caught:
        job(code={"git": f"git+https://me:xyzzy@h/r@{'a' * 40}"})
    assert "xyzzy" not in str(caught.value)


@given(st.text(min_size=1, max_size=80))
def test_default_name_is_always_a_name(text: str) -> None:
    name = default_name(f"s3://bucket/{text}")

    assert job(name=name).name == name
    assert name == default_name(f"s3://bucket/{text}")


def test_default_name_of_a_plain_run_is_its_last_part() -> None:
    assert default_name("s3://bucket/runs/net-a/") == "net-a"
    assert default_name("s3://bucket/Net_A") != default_name("s3://other/Net_A")


def test_default_name_is_one_for_a_run_with_and_without_a_slash_at_its_end() -> None:
    assert default_name("s3://bucket/Net_A/") == default_name("s3://bucket/Net_A")


@pytest.mark.parametrize(
    ("run", "kept"), [("s3://bucket/net//", "s3://bucket/net"), ("memory://", "memory://"), ("/data/net/", "/data/net")]
)
def test_run_is_one_text_with_and_without_a_slash_at_its_end(run: str, kept: str) -> None:
    found = job(run=run, volumes=[{"claim": "shared", "path": "/data"}])

    assert found.run == kept and found == job(run=kept, volumes=[{"claim": "shared", "path": "/data"}])


def test_profiles_are_found_in_an_installed_package() -> None:
    """By the import system's resources, not by a path of the checkout."""
    from importlib import resources

    names = {item.name for item in resources.files("ktrain.launcher.profiles").iterdir()}
    assert {"nvidia.toml", "amd.toml", "tpu.toml", "fabrics.toml", "providers.toml"} <= names
    assert {"h100", "mi300x", "max1550", "gaudi3", "trn2"} <= set(catalogue.models())


def test_profiles_tpu_topologies_fill_their_hosts() -> None:
    for model in catalogue.tpus().values():
        for topology in model.topologies:
            chips = 1
            for axis in topology.split("x"):
                chips *= int(axis)
            assert chips < model.chips_per_host or chips % model.chips_per_host == 0


def test_profiles_tpu_cubes_are_ordered_and_within_their_limit() -> None:
    topologies = catalogue.tpus()["v4"].topologies
    boxes = [tuple(map(int, topology.split("x"))) for topology in topologies[4:]]

    assert topologies[4:7] == ("4x4x4", "4x4x8", "4x4x12")
    assert all(a <= b <= c and a * b * c <= 4096 for a, b, c in boxes)
    assert (16, 16, 16) in boxes and len(set(boxes)) == len(boxes)
