"""What a container learns of its job and its place, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract, settings
from ktrain.base.control import Server
from ktrain.base.job import LaunchSpec
from ktrain.base.process import ProcessId
from ktrain.base.settings import PodSettings
from ktrain.errors import ConfigError, InternalError
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes.submission import new_sending
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import choose
from ktrain.run import pod
from ktrain.run.init import Ended

VALUE: dict[str, Any] = {
    "name": "small",
    "run": "s3://bucket/small",
    "image": "example.org/train:1",
    "command": ["train.py", "80"],
    "memory": {"state": "1Mi"},
    "nodes": 2,
    "workers_per_node": 4,
    "limits": {"max_restarts": 7, "patience_s": 20.0, "gang_wait_s": 600},
}
SLICES = {**{key: VALUE[key] for key in ("name", "run", "image", "command", "memory")}, "tpu": "v6e:4x4", "slices": 2}


@pytest.fixture
def place(tmp_path: Path) -> PodSettings:
    (tmp_path / "job.json").write_text(json.dumps(VALUE))
    (tmp_path / "token").write_text("0123456789abcdef\n")
    (tmp_path / "work").mkdir()
    return PodSettings(
        role="worker",
        run="s3://bucket/small",
        head="tcp:127.0.0.9:7410",
        head_port=7410,
        job_file=tmp_path / "job.json",
        token_file=tmp_path / "token",
        volume=tmp_path / "memory",
        work=tmp_path / "work",
        address="10.0.0.7",
        host="machine-a",
        job_index=0,
        pod_index=1,
    )


def environment(place: PodSettings) -> dict[str, str]:
    return {
        contract.ENV_ROLE: place.role,
        contract.ENV_RUN: place.run,
        contract.ENV_HEAD: place.head,
        contract.ENV_JOB: str(place.job_file),
        contract.ENV_TOKEN_FILE: str(place.token_file),
        contract.ENV_VOLUME: str(place.volume),
        contract.ENV_POD_IP: place.address,
        contract.ENV_HOST: place.host,
        contract.ENV_JOB_INDEX: str(place.job_index),
        contract.ENV_POD_INDEX: str(place.pod_index),
    }


def test_pod_settings_environment_of_the_manifest_is_understood(
    place: PodSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)

    assert settings.pod_settings() == replace(place, work=Path(contract.POD_WORK))


def test_pod_settings_of_a_pod_that_runs_as_processes_are_the_same_in_all_its_containers(
    place: PodSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for container in ("agent", "trainer"):
        root = tmp_path / container
        (root / "ktrain").mkdir(parents=True)
        (root / "ktrain" / "work").symlink_to(place.work)
        (root / "ktrain" / "token").symlink_to(place.token_file.parent)
        told = {**environment(place), contract.ENV_TOKEN_FILE: str(root / "ktrain" / "token" / "token")}
        for name, value in {**told, contract.ENV_ROOT: str(root)}.items():
            monkeypatch.setenv(name, value)
        found.append(settings.pod_settings())

    assert found == [place, place]


def test_prepare_run_on_a_volume_of_a_pod_that_runs_as_processes_is_found_below_its_root(
    place: PodSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, root = tmp_path / "claims" / "runs", tmp_path / "root"
    claim.mkdir(parents=True)
    root.mkdir()
    (root / "data").symlink_to(claim)
    monkeypatch.setenv(contract.ENV_ROOT, str(root))
    volumes = [{"claim": "runs", "path": "/data"}]
    command = ["train.py", "/data/text", "/database"]
    place.job_file.write_text(json.dumps({**VALUE, "run": "/data/small", "command": command, "volumes": volumes}))

    made = pod.prepare("trainer", replace(place, run=f"{root}/data/small"))

    assert made.spec.run == str(claim / "small")
    assert made.spec.args == (str(claim / "text"), "/database")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, "") for name in (contract.ENV_ROLE, contract.ENV_RUN, contract.ENV_JOB, contract.ENV_TOKEN_FILE)),
        *((name, "") for name in (contract.ENV_VOLUME, contract.ENV_HOST, contract.ENV_POD_IP, contract.ENV_HEAD)),
        *((contract.ENV_HEAD, text) for text in ("small-head:7410", "tcp:small-head", "tcp:h:0", "tcp:h:70000")),
        *((contract.ENV_POD_IP, text) for text in ("fd00::7", "node-a", "10.0.0")),
        *((contract.ENV_JOB_INDEX, text) for text in ("", "first", "-1")),
        *((contract.ENV_POD_INDEX, text) for text in ("", "1.0", "\u0661")),
    ],
)
def test_pod_settings_bad_variable_is_refused_by_name(
    name: str, text: str, place: PodSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, value in environment(place).items():
        monkeypatch.setenv(known, value)
    monkeypatch.setenv(name, text)

    with pytest.raises(ConfigError, match=name):
        settings.pod_settings()


def test_prepare_trainer_writes_what_the_supervisor_reads(place: PodSettings) -> None:
    made = pod.prepare("trainer", place)

    assert made.work.read_spec() == made.spec
    assert made.work.read_token() == "0123456789abcdef"
    assert made.work.token.is_symlink(), "the token stays where the Secret lies"
    assert json.loads(made.work.head.read_text())["address"] == place.head
    assert made.work.path.stat().st_mode & 0o777 == 0o700
    assert (made.node, made.spec.nodes, made.spec.workers_per_node) == ("node-1", 2, 4)
    assert (made.spec.script, made.spec.args, made.spec.max_restarts) == ("train.py", ("80",), 7)
    assert made.spec.node_address(1) == "10.0.0.7"
    assert (made.spec.join_s, made.spec.unjoined_exit(taken=False)) == (600.0, contract.EXIT_AGAIN)
    assert made.command()[2:] == ["-m", "ktrain.run.supervisor", str(made.work.path), "1", str(os.getpid())]


def test_prepare_head_listens_on_its_own_address_and_port(place: PodSettings) -> None:
    made = pod.prepare("head", replace(place, role="head", pod_index=0))

    assert made.spec.head_address == "tcp:10.0.0.7:7410"
    assert not made.work.head.exists(), "the head itself says where it is"
    assert made.command()[2:] == ["-m", "ktrain.run.head", str(made.work.path), str(os.getpid())]


def test_prepare_agent_takes_back_the_word_of_its_predecessor(place: PodSettings) -> None:
    ready = place.work / Path(contract.POD_READY_FILE).name
    ready.touch()
    pod.prepare("trainer", place)
    assert ready.exists()

    made = pod.prepare("agent", place)

    assert not ready.exists()
    assert made.spec.pod is not None and made.spec.pod.ready_file == str(ready)


def test_launch_of_one_submission_is_one_launch_on_all_pods(place: PodSettings) -> None:
    job = pod.read_job(place.job_file)
    other = replace(place, address="10.0.0.8", pod_index=0)

    ids = {pod.launch_of(job, where, token).launch_id for where in (place, other) for token in ("a", "a", "b")}

    assert len(ids) == 2


def test_launch_of_run_on_a_claim_keeps_its_logs_there(place: PodSettings) -> None:
    value = {**VALUE, "run": "/data/run", "volumes": [{"claim": "runs", "path": "/data"}]}

    found = pod.launch_of(spec_file.from_value(value), place, "a")

    assert found.log_dir == "/data/run/logs"


@pytest.mark.parametrize(("slice_index", "pod_index", "node"), [(0, 0, 0), (0, 3, 3), (1, 0, 4), (1, 3, 7)])
def test_node_index_slices_come_one_after_another(
    slice_index: int, pod_index: int, node: int, place: PodSettings
) -> None:
    job = spec_file.from_value(SLICES)
    assert job.num_nodes == 8, "the indexes above are of 2 slices with 4 hosts each"

    assert pod.node_index(replace(place, job_index=slice_index, pod_index=pod_index), job) == node


def test_launch_with_spares_has_a_node_for_each_of_its_pods(place: PodSettings) -> None:
    job = spec_file.from_value({**VALUE, "spares": 2})

    found = pod.launch_of(job, place, "a")

    assert (found.nodes, found.spares, len(found.node_names)) == (2, 2, 4)
    assert pod.node_index(replace(place, pod_index=3), job) == 3
    with pytest.raises(ConfigError, match="expected less than 4"):
        pod.node_index(replace(place, pod_index=4), job)


@pytest.mark.parametrize(("job_index", "pod_index"), [(1, 0), (0, 2)])
def test_node_index_pod_that_the_job_lacks_is_refused(job_index: int, pod_index: int, place: PodSettings) -> None:
    with pytest.raises(ConfigError, match="expected less than"):
        pod.node_index(replace(place, job_index=job_index, pod_index=pod_index), spec_file.from_value(VALUE))


def _absent(path: Path) -> None:
    path.unlink()


def _text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_absent, "cannot be read"),
        (_text('{"name": '), "cannot be read"),
        (_text("[]"), "expected an object"),
        (_text(json.dumps({**VALUE, "color": "red"})), "no such field"),
        (_text(json.dumps({**VALUE, "nodes": 0})), "nodes"),
    ],
)
def test_read_job_bad_file_is_refused_by_name(damage: Callable[[Path], None], said: str, place: PodSettings) -> None:
    damage(place.job_file)

    with pytest.raises(ConfigError, match=said) as caught:
        pod.read_job(place.job_file)
    assert str(place.job_file) in str(caught.value)


@pytest.mark.parametrize("damage", [_absent, _text(" \n"), _text("t\u00f6ken")])
def test_prepare_bad_token_is_refused_and_not_shown(damage: Callable[[Path], None], place: PodSettings) -> None:
    damage(place.token_file)

    with pytest.raises(ConfigError, match="token file") as caught:
        pod.prepare("agent", place)
    assert "ken'" not in str(caught.value)


@pytest.mark.parametrize(("name", "role"), [("head", "worker"), ("agent", "head"), ("trainer", "head")])
def test_prepare_container_of_another_pod_is_refused(name: str, role: str, place: PodSettings) -> None:
    with pytest.raises(ConfigError, match=contract.ENV_ROLE):
        pod.prepare(name, replace(place, role=role))


def test_prepare_run_that_is_not_the_job_s_is_refused(place: PodSettings) -> None:
    with pytest.raises(ConfigError, match=contract.ENV_RUN):
        pod.prepare("agent", replace(place, run="s3://bucket/other"))


def test_prepare_work_folder_that_is_not_there_is_refused(place: PodSettings) -> None:
    with pytest.raises(ConfigError, match="work folder"):
        pod.prepare("agent", replace(place, work=place.work / "gone"))


def test_prepare_head_alone_takes_along_what_made_its_pod(place: PodSettings) -> None:
    place.job_file.with_name(contract.SUBMISSION_FILE).write_text('{"id": "a"}')
    agent = pod.prepare("agent", place)
    assert not (agent.work.path / contract.SUBMISSION_FILE).exists()

    head = pod.prepare("head", replace(place, role="head", pod_index=0))
    assert json.loads((head.work.path / contract.SUBMISSION_FILE).read_text()) == {"id": "a"}


def test_launch_of_a_submission_is_that_of_its_pods(place: PodSettings) -> None:
    job = spec_file.from_value(VALUE)
    facts = ClusterFacts()
    sending = new_sending(job, facts, choose(job, facts), time=0.0)

    assert sending.submission.launch == pod.launch_of(job, place, sending.token).launch_id
    assert sending.token not in repr(sending) and sending.token not in json.dumps(sending.submission.to_value())


@contextmanager
def hearing() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A head that hears which processes ended: its address, and what it heard."""
    heard: list[dict[str, Any]] = []
    server = Server(
        {"process_exited": lambda said: heard.extend(said["processes"]) or {}},  # type: ignore[func-returns-value]
        address="tcp:127.0.0.1:0",
        token="0123456789abcdef",
    )
    try:
        yield server.address, heard
    finally:
        server.close()


@pytest.mark.parametrize("argv", [[], ["supervisor"], ["head", "agent"]])
def test_main_other_words_are_bad_input(argv: list[str]) -> None:
    assert pod.main(argv) == contract.EXIT_USAGE


@pytest.mark.parametrize(
    ("name", "told", "role"),
    [
        ("trainer", False, "supervisor"),
        ("trainer", True, "supervisor"),
        ("agent", False, "agent"),
        ("agent", True, "node"),
    ],
)
def test_tell_end_is_said_with_what_goes_with_the_process(name: str, told: bool, role: str, place: PodSettings) -> None:
    process, supervisor = ProcessId(12, 345), ProcessId(12, 678)
    with hearing() as (address, heard):
        agent = pod.prepare("agent", replace(place, head=address))
        pod.tell_end(agent, Ended(process, 0, told=True))
        assert heard.pop()["pid"] == -1, "no trainer was started in this pod"
        pod.note_child(pod.prepare("trainer", replace(place, head=address)), supervisor)
        pod.tell_end(pod.prepare(name, replace(place, head=address)), Ended(process, 137, told))

    number = (supervisor if role == "node" else process).number
    assert heard == [{"node": "node-1", "role": role, "pid": number, "exitcode": 137, "told": told}]


def test_tell_end_head_that_is_away_is_no_error(place: PodSettings) -> None:
    made = pod.prepare("agent", replace(place, head="tcp:127.0.0.1:1"))

    pod.tell_end(made, Ended(ProcessId(1, 2), 0, told=False))


def test_tell_end_agent_told_before_it_was_started_takes_its_node_along(place: PodSettings) -> None:
    with hearing() as (address, heard):
        for name in ("trainer", "agent"):
            pod.tell_end(pod.prepare(name, replace(place, head=address)), Ended(None, 143, told=True))

    assert heard == [{"node": "node-1", "role": "node", "pid": -1, "exitcode": 143, "told": True}]


def test_job_spec_with_a_place_survives_its_file(place: PodSettings) -> None:
    spec = pod.launch_of(pod.read_job(place.job_file), place, "a")

    assert LaunchSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_tell_begin_new_pod_says_that_the_one_before_it_is_gone(place: PodSettings) -> None:
    with hearing() as (address, heard):
        agent, trainer = (pod.prepare(name, replace(place, head=address)) for name in ("agent", "trainer"))
        pod.tell_begin(agent)
        pod.tell_begin(agent)  # it died before the trainer was started
        pod.tell_begin(trainer)
        pod.note_child(trainer, ProcessId(12, 345))
        pod.tell_begin(agent)  # started again in a pod that has begun

    assert heard == [{"node": "node-1", "role": "node", "pid": 0}] * 2


def test_tell_begin_container_after_one_that_died_without_a_word_says_so(
    place: PodSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted = place.work / "launch" / "child-trainer.json"
    until_noted = f"until [ -e {noted} ]; do sleep 0.01; done"
    monkeypatch.setattr(pod.Container, "command", lambda self: ["/bin/sh", "-c", until_noted])
    with hearing() as (address, heard):
        for name, value in environment(replace(place, head=address)).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(contract.ENV_ROOT, str(tmp_path))
        (tmp_path / "ktrain").mkdir()
        (tmp_path / "ktrain" / "work").symlink_to(place.work)
        monkeypatch.setenv(contract.ENV_FAULTS, "raise@pod.ended")
        with pytest.raises(InternalError, match="ended"):
            pod.main(["trainer"])
        said_before = list(heard)
        pod.tell_begin(pod.prepare("trainer", replace(place, head=address)))

    assert said_before == []
    number = json.loads(noted.read_text())["number"]
    assert heard == [{"node": "node-1", "role": "supervisor", "pid": number}]


def test_main_fault_points_count_the_starts_of_a_container_in_its_pod(
    place: PodSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(contract.ENV_ROOT, str(tmp_path))
    (tmp_path / "ktrain").mkdir()
    (tmp_path / "ktrain" / "work").symlink_to(place.work)
    plan = "raise@pod.prepared,rank=1;raise@pod.begun,epoch=2;raise@pod.prepared,rank=0,epoch=3"
    monkeypatch.setenv(contract.ENV_FAULTS, plan)

    def run(command: Sequence[str], note: Callable[[ProcessId], None], begin: Callable[[], None]) -> Ended:
        begin()
        return Ended(None, 7, told=False)

    monkeypatch.setattr(pod, "run_as_init", run)

    for point in ("pod.prepared", "pod.begun"):
        with pytest.raises(InternalError, match=point):
            pod.main(["trainer"])
    assert pod.main(["trainer"]) == 7
