"""A function goes to a cluster as the guide shows it, is looked at, found from elsewhere, and stopped."""

from __future__ import annotations

import base64
import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ktrain
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.log import ObjectLog
from ktrain.errors import ConfigError, ConflictError, DeadlineError, NotFoundError
from ktrain.jobs import on_cluster
from ktrain.jobs.job import Job
from ktrain.jobs.look import State
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.code.function import FILE, open_function
from ktrain.launcher.code.members import MARK
from ktrain.launcher.code.unpack import unpack_code
from ktrain.testing.fake_cluster import FakeCluster, Offer
from ktrain.tier.location import open_tier
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, make_worker
from tests.unit.launcher.on_cluster.clusters import job as job_spec
from tests.unit.launcher.on_cluster.resumes import config_maps, end

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "notebooks.md"
BLOCK = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1]


CELL: dict[str, Any] = {"__name__": "__main__"}
exec("def train(steps):\n    return f'{steps} steps'\n", CELL)
train = CELL["train"]


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def place(cluster: FakeCluster, tmp_path: Path) -> ktrain.Kubernetes:
    config = cluster.write_kubeconfig(tmp_path / "kubeconfig")
    return ktrain.Kubernetes(image="example/train:1", state="1Gi", nodes=2, namespace="default", kubeconfig=config)


@pytest.fixture
def run() -> str:
    """A bucket of this process."""
    return f"memory://bucket-{ids.random_id()}/net"


def stored(cluster: FakeCluster, kind: Any, name: str) -> dict[str, Any]:
    return dict(cluster.store.get(kind, "default", name))


def sent_code(cluster: FakeCluster, folder: Path) -> Path:
    """The archive that was sent, unpacked as a pod does it."""
    maps = cluster.store.list(known.CONFIG_MAP, "default").items
    (carried,) = (item for item in maps if "binaryData" in item)
    text = str(stored(cluster, known.CONFIG_MAP, "net")["data"])
    found = re.search(r'"archive": "([0-9a-f]{64})"', text.replace('\\"', '"'))
    assert found is not None
    archive = folder.with_suffix(".zip")
    archive.write_bytes(base64.b64decode(carried["binaryData"]["code.zip"]))
    unpack_code(archive, found[1], folder)
    return folder


def test_block_of_the_guide_sends_the_function_as_proven_code(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str, tmp_path: Path
) -> None:
    text = BLOCK.replace("s3://bucket/net-a", run).replace(
        'namespace="default"', f'namespace="default", kubeconfig={str(place.kubeconfig)!r}'
    )
    names: dict[str, Any] = {"ktrain": ktrain, "train": train}
    exec(compile(text, "page", "exec"), names)

    job: Job = names["job"]
    code = sent_code(cluster, tmp_path / "code")
    container = str(stored(cluster, known.CONFIG_MAP, "net")["data"])
    sha256 = re.search(r'"ktrain_function.py",\s+"([0-9a-f]{64})"', container.replace("\\n", "\n").replace('\\"', '"'))
    assert sha256 is not None
    assert open_function((code / FILE).read_bytes(), sha256[1])() == "1000 steps"
    assert (job.name, job.run, job.status().state) == ("net", run, State.STARTING)
    assert "namespace default" in repr(job) and "net" in job._repr_html_()


def test_job_is_found_by_its_run_and_by_its_name_from_elsewhere(
    place: ktrain.Kubernetes, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ktrain.launch(train, args=[3], on=place, run=run)
    assert [text.partition(":")[0] for text in job.warnings] == ["no gang scheduler was found"]
    asked: list[ktrain.Kubernetes] = []

    def client_of_place(found: ktrain.Kubernetes) -> Any:
        asked.append(found)
        return client_here(place)

    client_here = on_cluster.client_of
    assert [ktrain.attach(name, on=place).run for name in ("net", run)] == [run, run]
    monkeypatch.setattr(on_cluster, "client_of", client_of_place)

    assert ktrain.attach(run).name == "net" and ktrain.attach("net").run == run
    assert asked == [ktrain.Kubernetes(namespace="default"), ktrain.Kubernetes()]
    with pytest.raises(NotFoundError, match="there is no job of run memory://other/net"):
        ktrain.attach("memory://other/net", on=place)
    with pytest.raises(NotFoundError, match="a job on Kubernetes, not one of this machine"):
        ktrain.attach(run, on=ktrain.Local())


def test_name_that_another_run_has_taken_since_is_not_attached_to(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = on_cluster.client_of(place)
    monkeypatch.setattr(on_cluster, "client_of", lambda _: client)
    ktrain.launch("train.py", on=place, run=run)
    cluster.store.delete(known.JOB_SET, "default", "net")
    other = f"memory://other-{ids.random_id()}/net"
    submit(client, try_job(client, job_spec(run=other)), None)

    with pytest.raises(NotFoundError, match=f"recorded of run {run}, is of run {other} now"):
        ktrain.attach(run)
    assert ktrain.attach("net").run == other


def test_job_with_a_name_of_its_own_is_attached_to_by_its_run(place: ktrain.Kubernetes, run: str) -> None:
    ktrain.launch("train.py", on=dataclasses.replace(place, fields={"name": "odd"}), run=f"{run}/")

    found = ktrain.attach(run, on=place)

    assert (found.name, found.run) == ("odd", run)


def test_steps_losses_and_the_last_resume_come_from_the_run(place: ktrain.Kubernetes, run: str) -> None:
    job = ktrain.launch(["train.py", "--lr", "1"], on=place, run=run)
    log = ObjectLog(open_tier(run), timeouts=Timeouts())
    log.emit(Event("step", {"step": 4, "loss": 0.5}, attempt=1))
    log.emit(Event("restored", {"step": 4, "tier": "peer"}, attempt=2))
    log.close()

    status = job.status()

    assert (status.attempt, status.step, status.loss, status.restored) == (2, 4, 0.5, ("peer", 4))
    assert status.unread is None and "from step 4, out of tier peer" in job._repr_html_()
    assert job.report().step == 4


def test_run_that_cannot_be_read_from_here_is_said_and_left_alone(place: ktrain.Kubernetes, tmp_path: Path) -> None:
    job = ktrain.launch(train, args=[1], on=place, run="nowhere://bucket/net")

    assert "not recorded in its run; from Python attach('net', on=" in job.warnings[-1]
    first, second = job.status(), job.status()
    assert first.state is State.STARTING and first.unread is not None and first.unread == second.unread
    assert "not known" in str(first)


def test_job_is_waited_for_cancelled_and_ends(cluster: FakeCluster, run: str, tmp_path: Path, place: Any) -> None:
    ktrain.launch(train, args=[1], on=place, run=run)
    job = Job(on_cluster.find(client_of(cluster, tmp_path), "net", None))

    with pytest.raises(DeadlineError, match="job net"):
        job.wait(timeout_s=1.0)
    status = job.cancel()

    assert (status.state, status.exit_code) == (State.CANCELLED, 130) and status.is_final
    assert job.wait() == status and job.watch() == status


def test_code_of_a_folder_goes_beside_the_function(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str, tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.py").write_text("SIZE = 3\n")
    with_code = dataclasses.replace(place, code=tmp_path / "src")
    ktrain.launch(train, args=[1], on=with_code, run=run)

    code = sent_code(cluster, tmp_path / "code")

    files = sorted(path.name for path in code.iterdir() if path.name != MARK)
    assert files == [FILE, "ktrain_function.py", "model.py"]
    with pytest.raises(ConfigError, match=r"it does not have the script 'absent\.py'"):
        ktrain.launch("absent.py", on=with_code, run=run)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image": None}, "image: it is missing"),
        ({"state": None}, "memory"),
        ({"fields": {"placement.spott": "all"}}, "placement.spott: there is no such field"),
        ({"fields": {"image.name": "x"}}, "image.name: image is no table"),
        ({"accelerator": "h100:8", "fields": {"tpu": "v6e:4x4"}}, "a job runs on one kind"),
        ({"fields": {"env.API_KEY": "k"}}, "reads like a secret"),
    ],
)
def test_place_that_cannot_be_is_refused_before_anything_is_sent(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ktrain.launch(train, on=dataclasses.replace(place, **changed), run=run)
    with pytest.raises(ConfigError, match="run: it is missing"):
        ktrain.launch(train, on=place)
    assert cluster.requests() == []


def test_name_that_is_taken_is_a_conflict(place: ktrain.Kubernetes, run: str) -> None:
    ktrain.launch("train.py", on=place, run=run)
    with pytest.raises(ConflictError, match="ktrain delete"):
        ktrain.launch("train.py", on=place, run=run)


def test_logs_before_a_container_has_started_say_where_to_look(place: ktrain.Kubernetes, run: str) -> None:
    job = ktrain.launch("train.py", on=place, run=run)

    with pytest.raises(NotFoundError, match=r"job\.status\(\) says what it waits for"):
        job.logs()
    with pytest.raises(NotFoundError, match="no log of rank 1 in attempt 2; there are: none yet"):
        job.logs(1, attempt=2)
    open_tier(run).write("logs/attempt-2/rank-1.log", b"a\n", deadline=Deadline.after(5.0))
    open_tier(run).write("logs/attempt-2/rank-0.log", b"b\nc\n", deadline=Deadline.after(5.0))
    assert job.logs(1, attempt=2) == "a\n"
    assert job.logs(attempt=2) == "[0] b\n[0] c\n[1] a\n"


def test_logs_of_a_rank_are_its_own_lines_in_whichever_pods_it_has_been(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str
) -> None:
    job = ktrain.launch("train.py", on=dataclasses.replace(place, fields={"workers_per_node": 2}), run=run)
    make_worker(cluster, 0, "starts\n[0] a\n[1] b [0] \n")
    make_worker(cluster, 1, "[2] c\n[0] d\n")

    assert job.logs(0) == "a\nd\n" and job.logs(1) == "b [0] \n" and job.logs(2) == "c\n"
    assert job.logs().splitlines()[1:3] == ["[net-worker-0-0-abcde] [0] a", "[net-worker-0-0-abcde] [1] b [0] "]
    with pytest.raises(NotFoundError, match="rank 3 has written nothing"):
        job.logs(3)
    with pytest.raises(NotFoundError, match="ranks are 0 to 3"):
        job.logs(4)


def test_files_that_look_private_are_warned_of_before_they_are_sent(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str, tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").touch()
    (tmp_path / "src" / ".env").write_text("TOKEN=xyzzy\n")
    here = dataclasses.replace(place, code=tmp_path / "src")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"\.env"):
            ktrain.launch("train.py", on=here, run=run)
    assert cluster.requests() == []
    with pytest.warns(UserWarning, match=r"\.env") as caught:
        job = ktrain.launch("train.py", on=here, run=run)
    assert [item.filename for item in caught] == [__file__]
    assert any(".env" in text for text in job.warnings) and "<th" in (shown := job._repr_html_()) and ".env" in shown


def test_job_that_has_ended_goes_on_as_another_submission_with_its_code(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str
) -> None:
    job = ktrain.launch(train, args=[3], on=place, run=run)
    with pytest.raises(ConflictError, match="a job that lives is not replaced"):
        job.resume()
    code, uid = config_maps(cluster, "net-code"), stored(cluster, known.JOB_SET, "net")["metadata"]["uid"]
    end(cluster, "net")
    with pytest.raises(ConflictError, match="ktrain delete"):
        ktrain.launch(train, args=[3], on=place, run=run)
    attached = ktrain.attach("net", on=place)
    assert attached.warnings == ()

    assert attached.resume().state is State.STARTING

    assert stored(cluster, known.JOB_SET, "net")["metadata"]["uid"] != uid and config_maps(cluster, "net-code") == code
    assert [text.partition(":")[0] for text in attached.warnings] == ["no gang scheduler was found"]


def test_job_that_was_deleted_goes_on_by_the_record_of_its_run_and_one_that_is_done_does_not(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str
) -> None:
    job = ktrain.launch("train.py", on=place, run=run)
    end(cluster, "net")
    job.resume()  # keeps the record in the run
    cluster.store.delete(known.JOB_SET, "default", "net")

    assert job.resume().name == "net"

    end(cluster, "net", "Completed")
    with pytest.raises(ConfigError, match="nothing to resume"):
        job.resume()


def test_job_of_another_run_that_took_the_name_is_not_resumed(
    cluster: FakeCluster, place: ktrain.Kubernetes, run: str
) -> None:
    job = ktrain.launch("train.py", on=place, run=run)
    cluster.store.delete(known.JOB_SET, "default", "net")
    other = ktrain.launch("train.py", on=place, run=f"memory://bucket-{ids.random_id()}/net")
    end(cluster, "net")
    before = len(cluster.requests())

    with pytest.raises(ConflictError, match=f"which a job of run {other.run} has now"):
        job.resume()
    assert {request.method for request in cluster.requests()[before:]} == {"GET"}
