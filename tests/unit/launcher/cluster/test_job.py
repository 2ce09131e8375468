"""Jobs: what becomes of pods that end, and of the Job."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.launcher.cluster import indexes
from ktrain.launcher.cluster.nodes import evict
from tests.unit.launcher.cluster.making import JOB, POD, SPACE, Made, conditions, job_spec, pod_spec

FAIL_42 = {"rules": [{"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [42]}}]}
IGNORE = {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]}
LIMIT = ("True", "BackoffLimitExceeded", "Job has reached the specified backoff limit")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.mark.parametrize(
    ("found", "text"), [((), ""), ((3,), "3"), ((0, 1), "0,1"), ((0, 1, 2), "0-2"), ((0, 2, 3, 4, 7), "0,2-4,7")]
)
def test_indexes_as_text_give_the_same_indexes(found: tuple[int, ...], text: str) -> None:
    assert indexes.show(found) == text
    assert indexes.parse(text) == set(found)


def test_job_all_indexes_succeed_is_complete(made: Made) -> None:
    made.create(JOB, "a", job_spec(2))
    assert [pod["spec"]["hostname"] for pod in made.pods()] == ["a-0", "a-1"]
    assert made.get(JOB, "a")["status"]["active"] == 2
    made.exit("a-0", 0)
    assert made.get(JOB, "a")["status"]["completedIndexes"] == "0"
    made.exit("a-1", 0)
    job = made.get(JOB, "a")
    done = ("True", "CompletionsReached", "Reached expected number of succeeded pods")
    assert conditions(job) == {"SuccessCriteriaMet": done, "Complete": done}
    assert (job["status"]["succeeded"], job["status"]["completedIndexes"]) == (2, "0,1")
    assert all("finalizers" not in pod["metadata"] or not pod["metadata"]["finalizers"] for pod in made.pods())


def test_job_container_finds_its_index(made: Made) -> None:
    made.create(JOB, "a", job_spec(2))
    assert made.process("a-1").command.environment["JOB_COMPLETION_INDEX"] == "1"


def test_job_failed_pod_is_replaced_after_back_off_that_doubles(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, backoffLimit=3))
    for wait_s in (10, 20, 40):
        made.exit("a-0", 1)
        made.pass_time(wait_s - 1)
        assert not made.runtime.running()
        made.pass_time(1)
        assert len(made.runtime.running()) == 1
    made.exit("a-0", 1)
    assert conditions(made.get(JOB, "a"))["Failed"] == LIMIT
    assert made.get(JOB, "a")["status"]["failed"] == 4


def test_job_fail_rule_matches_ends_the_others(made: Made) -> None:
    made.create(JOB, "a", job_spec(2, backoffLimit=3, podFailurePolicy=FAIL_42))
    name = made.pod("a-1")["metadata"]["name"]
    made.exit("a-1", 42)
    made.cluster.step()
    job = made.get(JOB, "a")
    words = f"Container main for pod {SPACE}/{name} failed with exit code 42 matching FailJob rule at index 0"
    assert conditions(job)["Failed"] == ("True", "PodFailurePolicy", words)
    assert job["status"]["failed"] == 2
    assert [pod["metadata"]["name"] for pod in made.pods()] == [name]


def test_job_evicted_pod_is_ignored_and_replaced_at_once(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, podFailurePolicy=IGNORE))
    old = made.pod("a-0")
    evict(made.store, old)
    made.cluster.step()
    assert made.pod("a-0")["metadata"]["uid"] != old["metadata"]["uid"]
    assert "failed" not in made.get(JOB, "a")["status"]


def test_job_evicted_pod_that_exits_zero_has_succeeded(tmp_path: Path) -> None:
    made = Made(tmp_path, exit_on_terminate=0)
    made.create(JOB, "a", job_spec(1, podFailurePolicy=IGNORE))
    evict(made.store, made.pod("a-0"))
    made.cluster.step()
    assert "Complete" in conditions(made.get(JOB, "a"))


@pytest.mark.parametrize(("policy", "replaced_while_ending"), [("Failed", False), ("TerminatingOrFailed", True)])
def test_job_deleted_pod_is_replaced_as_the_policy_says(
    tmp_path: Path, policy: str, replaced_while_ending: bool
) -> None:
    made = Made(tmp_path, exit_on_terminate=None)
    slow = pod_spec(terminationGracePeriodSeconds=14)
    made.create(JOB, "a", job_spec(1, pod=slow, backoffLimit=3, podReplacementPolicy=policy))
    old = made.pod("a-0")["metadata"]["name"]
    made.store.delete(POD, SPACE, old)
    made.pass_time(0)
    made.pass_time(11)
    assert (len(made.pods()) == 2) is replaced_while_ending
    made.pass_time(4)
    made.pass_time(10)
    assert [pod["metadata"]["name"] for pod in made.pods()] != [old]
    assert made.get(JOB, "a")["status"]["failed"] == 1


def test_job_failures_of_one_index_spend_its_own_limit(made: Made) -> None:
    made.create(JOB, "a", job_spec(2, backoffLimit=None, backoffLimitPerIndex=1, maxFailedIndexes=1))
    made.exit("a-1", 7)
    made.pass_time(10)
    made.exit("a-1", 7)
    assert made.get(JOB, "a")["status"]["failedIndexes"] == "1"
    made.exit("a-0", 0)
    assert conditions(made.get(JOB, "a"))["Failed"] == ("True", "FailedIndexes", "Job has failed indexes")


def test_job_fail_index_rule_and_no_failed_index_allowed_fails(made: Made) -> None:
    policy = {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [43]}}]}
    spec = job_spec(2, backoffLimit=None, backoffLimitPerIndex=9, maxFailedIndexes=0, podFailurePolicy=policy)
    made.create(JOB, "a", spec)
    made.exit("a-1", 43)
    made.cluster.step()
    assert conditions(made.get(JOB, "a"))["Failed"][1] == "MaxFailedIndexesExceeded"


def test_job_success_policy_ends_the_others(made: Made) -> None:
    made.create(JOB, "a", job_spec(2, successPolicy={"rules": [{"succeededIndexes": "0"}]}))
    made.exit("a-0", 0)
    made.cluster.step()
    job = made.get(JOB, "a")
    assert conditions(job)["Complete"] == ("True", "SuccessPolicy", "Matched rules at index 0")
    assert "failed" not in job["status"]
    assert not made.runtime.running()


def test_job_past_its_deadline_fails(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, activeDeadlineSeconds=30))
    made.pass_time(29)
    assert made.runtime.running()
    made.pass_time(1)
    words = "Job was active longer than specified deadline"
    assert conditions(made.get(JOB, "a"))["Failed"] == ("True", "DeadlineExceeded", words)


def test_job_suspended_has_no_pods_and_counts_no_failure(made: Made) -> None:
    made.create(JOB, "a", job_spec(2, suspend=True, ttlSecondsAfterFinished=60))
    assert not made.pods()
    assert conditions(made.get(JOB, "a"))["Suspended"] == ("True", "JobSuspended", "Job suspended")
    for suspended in (False, True, False):
        made.store.mutate(JOB, SPACE, "a", lambda job, to=suspended: job["spec"].update(suspend=to))
        made.cluster.step()
        assert len(made.runtime.running()) == (0 if suspended else 2)
    assert "failed" not in made.get(JOB, "a")["status"]
    made.exit("a-0", 0)
    made.exit("a-1", 0)
    made.pass_time(60)
    assert not made.store.list(JOB).items
    assert not made.pods()


def test_job_containers_restarted_in_place_spend_the_limit(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, pod=pod_spec(restartPolicy="OnFailure"), backoffLimit=1))
    made.exit("a-0", 1)
    made.cluster.step()
    assert conditions(made.get(JOB, "a"))["Failed"] == LIMIT


@pytest.mark.parametrize(
    ("spec", "words"),
    [(job_spec(podFailurePolicy={}, managedBy="x/y"), r"spec\.managedBy"), (job_spec(completionMode=""), "Indexed")],
)
def test_job_that_is_not_honoured_fails_by_name(made: Made, spec: dict[str, object], words: str) -> None:
    made.create(JOB, "a", spec)
    status, reason, message = conditions(made.get(JOB, "a"))["Failed"]
    assert (status, reason) == ("True", "NotHonoured")
    assert words.replace("\\", "") in message


def test_job_parallelism_lowered_takes_back_the_highest_indexes(made: Made) -> None:
    made.create(JOB, "a", job_spec(3))
    made.store.mutate(JOB, SPACE, "a", lambda job: job["spec"].update(parallelism=1))
    made.settle()
    assert [pod["spec"]["hostname"] for pod in made.pods()] == ["a-0"]
    made.store.mutate(JOB, SPACE, "a", lambda job: job["spec"].update(parallelism=0))
    made.settle()
    assert not made.pods()
    assert "failed" not in made.get(JOB, "a")["status"]


def test_job_failure_whose_count_was_cut_off_is_counted_once(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, backoffLimit=9))
    status = {**made.get(JOB, "a")["status"], "uncountedTerminatedPods": {"failed": ["uid-of-a-pod-that-is-gone"]}}
    made.store.mutate(JOB, SPACE, "a", lambda job: job.update(status=status), status=True)
    made.settle()
    found = made.get(JOB, "a")["status"]
    assert (found["failed"], found["uncountedTerminatedPods"]) == (1, {})
